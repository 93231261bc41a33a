"""A row in a packed batch is the row alone, whatever shares the batch with it and however it came padded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models.load import load_policy
from flywheel_tasks.models.packed import hidden_states, pack
from tests.models.small import ragged, token_rows

trees = st.lists(st.lists(st.integers(5, 6), min_size=1, max_size=50), min_size=1, max_size=8)


@cache
def policy(folder: Path) -> Any:
    return load_policy(folder, dtype=torch.float32, trainable=False).model


@given(rows=trees, share=st.booleans())
def test_every_row_is_found_again_with_its_positions(rows: list[list[int]], share: bool) -> None:
    packed = pack(rows, share=share)
    for i, row in enumerate(rows):
        index = packed.index[packed.offsets[i] : packed.offsets[i + 1]]
        assert packed.ids[index].tolist() == row
        assert packed.positions[index].tolist() == list(range(len(row)))
        assert index[-1] == packed.last[i]
        assert (packed.row_of[packed.offsets[i] : packed.offsets[i + 1]] == i).all()
    assert len(packed.ids) <= sum(map(len, rows))
    assert share or len(packed.ids) == sum(map(len, rows))


@given(rows=trees)
def test_a_token_sees_its_own_row_up_to_itself_and_nothing_else(rows: list[list[int]]) -> None:
    packed = pack(rows)
    seen = {}
    for own, above in packed.segments:
        before = [t for part in above for t in range(part.start, part.stop)]
        for token in range(own.start, own.stop):
            seen[token] = [*before, *range(own.start, token + 1)]
    for i in range(len(rows)):
        path = packed.index[packed.offsets[i] : packed.offsets[i + 1]].tolist()
        assert all(seen[token] == path[: place + 1] for place, token in enumerate(path))


def test_a_common_beginning_is_computed_once() -> None:
    prompt = list(range(5, 105))
    rows = [[*prompt, *range(200 + 20 * i, 210 + 20 * i)] for i in range(4)]
    assert len(pack(rows).ids) == 100 + 4 * 10
    assert len(pack(rows, share=False).ids) == 440
    assert len(pack([rows[0], rows[0]]).ids) == 110


@given(lengths=ragged, shared=st.integers(0, 40), seed=st.integers(0, 99), side=st.booleans(), extra=st.integers(0, 9))
@settings(max_examples=25)
def test_states_depend_on_no_companion_and_no_padding(
    tiny_model: Path, lengths: list[int], shared: int, seed: int, side: bool, extra: int
) -> None:
    model = policy(tiny_model)
    rows = token_rows(seed, lengths, shared)
    alone = [hidden_states(model, pack([row])) for row in rows]
    width = max(map(len, rows)) + extra
    pad = int(rows[0][-1])  # a token that is also a real one, as when pad == eos
    mask = np.zeros((len(rows), width), bool)
    ids = np.full((len(rows), width), pad)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side else slice(0, len(row))
        ids[i, place], mask[i, place] = row, True
    packed = pack([row[real] for row, real in zip(ids, mask, strict=True)])
    together = hidden_states(model, packed)[packed.index]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [0, 300])
def test_rows_longer_than_a_block_of_queries_match_transformers(tiny_model: Path, shared: int) -> None:
    from transformers import AutoModelForCausalLM

    rows = token_rows(1, [300, 570, 40], shared)
    packed = pack(rows)
    ours = hidden_states(policy(tiny_model), packed)[packed.index]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").model
    with torch.no_grad():
        theirs = [plain(torch.from_numpy(row)[None]).last_hidden_state[0] for row in rows]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "message"), [([], "no rows"), ([[5], []], "row 1 of the batch has no tokens")])
def test_what_can_not_be_packed_is_named(rows: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(rows)


def test_a_packed_model_refuses_a_padded_batch(tiny_model: Path) -> None:
    with pytest.raises(FlywheelError, match="packed batches"):
        policy(tiny_model)(torch.tensor([[5, 6, 7]]))
