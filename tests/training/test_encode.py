"""Rows to tokens: what is trained, what is cut, and what is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.training import dpo, preference, rows, sft, signal
from flywheel_tasks.training.encode import with_card
from tests.training import chats

HISTORY = chats.turns("Hello there, keeper.", "Evening. The lamp is lit.", "Tell me about the storm of '71.")


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> Template:
    return Template(load_tokenizer(tiny_model))


def pair(name: str, chosen: str = "It came at dusk.", rejected: str = "No.", **more: object) -> dict:
    return chats.preference(name, HISTORY, chosen, rejected, **more)


def test_every_bad_pair_is_refused_with_its_reason_and_none_is_lost(template: Template) -> None:
    table = chats.preferences(
        [pair("good"), pair("equal", "Same.", " Same. "), pair("empty", "  "), pair("long", "storm " * 2000)]
    )
    for encoded in (
        preference.encode(table, chats.CARDS, template, kind="pointwise", max_tokens=512),
        preference.encode(table, chats.CARDS, template, kind="pairwise", max_tokens=512),
        dpo.encode(table, chats.CARDS, template, max_tokens=512),
    ):
        assert encoded.table.column("row_id").to_pylist() == ["good"]
        assert encoded.reasons == {"equal_responses": 1, "empty_response": 1, "too_long": 1}
        assert encoded.rejected.column("user").to_pylist() == ["u-1"] * 3


def test_all_ties_leave_nothing(template: Template) -> None:
    table = chats.preferences([pair(f"tie-{i}", "Same.", "Same.") for i in range(5)])
    encoded = preference.encode(table, chats.CARDS, template, kind="pointwise", max_tokens=512)
    assert encoded.table.num_rows == 0
    assert encoded.reasons == {"equal_responses": 5}


def test_both_sides_of_a_pair_answer_the_same_history(template: Template) -> None:
    """The long response forces a cut; the short one alone would have kept more."""
    history = chats.turns(*(f"Turn {i}: the sea was calm and the lamp was lit." for i in range(21)))
    made = chats.preference("p", history, "Yes.", "The storm was long. " * 20)
    encoded = dpo.encode(chats.preferences([made]), chats.CARDS, template, max_tokens=420)
    ids = [np.array(side) for side in encoded.table.column("ids").to_pylist()[0]]
    assert encoded.dropped_turns > 0
    text = [template.tokenizer.decode(side) for side in ids]
    first_turn = [t[t.index("Turn ") : t.index(":", t.index("Turn "))] for t in text]
    assert first_turn[0] == first_turn[1]
    assert rows.common_prefix(*ids) > 0.5 * len(ids[0])


def test_dpo_sums_leave_the_end_of_turn_out(template: Template) -> None:
    table = chats.preferences([pair("p")])
    masked, whole = (
        dpo.encode(table, chats.CARDS, template, max_tokens=512, mask_eot=mask).table.to_pylist()[0]
        for mask in (True, False)
    )
    for ids, without, with_eot in zip(masked["ids"], masked["trained"], whole["trained"], strict=True):
        differ = [i for i, (a, b) in enumerate(zip(without, with_eot, strict=True)) if a != b]
        assert [ids[i] for i in differ] == [template.eot_id]


def test_sft_trains_the_marked_assistant_turns_alone(template: Template) -> None:
    messages = [
        {"role": "user", "content": "Hi, I am a sailor."},
        {"role": "assistant", "content": "Welcome ashore.", "trained": False},
        {"role": "user", "content": "Any news?"},
        {"role": "assistant", "content": "A whale passed."},
    ]
    encoded = sft.encode(chats.examples([chats.example("e", messages)]), chats.CARDS, template, max_tokens=512)
    row = encoded.table.to_pylist()[0]
    told = template.tokenizer.decode([i for i, t in zip(row["ids"][0], row["trained"][0], strict=True) if t])
    assert told.replace("<|eot_id|>", "").strip() == "A whale passed."
    assert row["count"] == sum(row["trained"][0])


def test_an_example_without_a_trained_turn_is_refused(template: Template) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "trained": False}]
    encoded = sft.encode(chats.examples([chats.example("e", messages)]), chats.CARDS, template, max_tokens=512)
    assert encoded.reasons == {"nothing_trained": 1}


def test_signals_count_their_known_labels(template: Template) -> None:
    table = pa.Table.from_pylist(
        [
            {"row_id": r, "user": "u", "character_id": "c1", "turns": HISTORY, "response": text, "love": a, "up": b}
            for r, text, a, b in [("a", "Aye.", True, None), ("b", "Aye.", None, None), ("c", "", True, True)]
        ]
    )
    encoded = signal.encode(table, ("love", "up"), chats.CARDS, template, max_tokens=512)
    assert encoded.table.column("count").to_pylist() == [1.0]
    assert encoded.reasons == {"no_label": 1, "empty_response": 1}


def test_the_order_of_a_pairwise_row_is_a_fair_coin_of_seed_and_step() -> None:
    import torch

    from flywheel_tasks.training.task import Step

    draws = [[preference.first(f"r{i}", Step(s, 3, torch.device("cpu"))) for i in range(500)] for s in range(4)]
    assert draws[0] == [preference.first(f"r{i}", Step(0, 3, torch.device("cpu"))) for i in range(500)]
    assert 0.45 < np.mean(draws) < 0.55
    flips = np.mean(np.diff(np.array(draws, int), axis=0) != 0, axis=1)
    assert ((flips > 0.4) & (flips < 0.6)).all(), "a step must say nothing of the next one"


def test_real_pairs_share_their_prompt(template: Template, data_dir: Path) -> None:
    encoded = dpo.encode(chats.hh(data_dir, 60), {}, template, max_tokens=4096)
    assert encoded.table.num_rows > 50
    tokens, cost = (np.sum(encoded.table.column(name).to_numpy()) for name in ("tokens", "cost"))
    assert cost < 0.8 * tokens


def test_a_pairwise_row_weighs_one_of_its_two_orders(template: Template) -> None:
    encoded = preference.encode(chats.preferences([pair("p")]), chats.CARDS, template, kind="pairwise", max_tokens=512)
    row = encoded.table.to_pylist()[0]
    assert row["tokens"] == row["cost"] == len(row["ids"][0]) == len(row["ids"][1])


def test_a_character_without_a_card_is_refused_everywhere_and_talk_without_one_is_read(template: Template) -> None:
    table = chats.preferences([pair("known"), pair("stranger", character_id="c9"), pair("nobody", character_id="none")])
    responses = table.append_column("row_id", table["preference_id"]).append_column("response", table["chosen"])
    responses = responses.append_column("love", pa.array([True] * 3))
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    examples = [chats.example(n, talk) | {"character_id": c} for n, c in [("known", "c1"), ("stranger", "c9")]]
    limits = {"cards": chats.CARDS, "template": template, "max_tokens": 512}
    for encoded in (
        preference.encode(table, kind="pointwise", **limits),
        preference.encode(table, kind="pairwise", **limits),
        dpo.encode(table, **limits),
        signal.encode(responses, ("love",), **limits),
        sft.encode(chats.examples([*examples, chats.example("nobody", talk) | {"character_id": None}]), **limits),
    ):
        assert encoded.table.column("row_id").to_pylist() == ["known", "nobody"]
        assert encoded.reasons == {"unknown_character": 1}
    kept, refused = with_card(table, chats.CARDS, "preference_id")
    assert kept["preference_id"].to_pylist() == ["known", "nobody"]
    assert refused.select(["row_id", "reason"]).to_pylist() == [{"row_id": "stranger", "reason": "unknown_character"}]


def test_a_row_that_the_chat_template_refuses_is_lost_alone(template: Template) -> None:
    """A system message beside a card."""
    odd = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}]
    good = [{"role": "user", "content": "Hi"}]
    answer = {"role": "assistant", "content": "Ho"}
    table = chats.examples([chats.example("odd", [*odd, answer]), chats.example("good", [*good, answer])])
    encoded = sft.encode(table, chats.CARDS, template, max_tokens=512)
    assert encoded.table.column("row_id").to_pylist() == ["good"]
    assert encoded.reasons == {"template_refuses": 1}
