"""Scores: the same for a row whatever it is scored with, in both orders, and from the checkpoint as from memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card
from flywheel_tasks.models.checkpoint import save_scorer
from flywheel_tasks.models.heads import RewardModel, load_scorer
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.packed import pack
from flywheel_tasks.models.score import PairRow, Scorer, ScoreRow, batches
from tests.models.small import template, token_rows, turns

CARD = Card("Ada", "a poet", ("kind",))
SIGNALS = ("continue", "thumb_up")
texts = st.text("abc dé", min_size=0, max_size=30)


@cache
def scorer(folder: Path, kind: Any, budget: int = 4096, max_tokens: int = 2048) -> Scorer:
    names = SIGNALS if kind == "signals" else ()
    model = load_scorer(folder, kind=kind, names=names, dtype=torch.float32, trainable=False)
    torch.nn.init.normal_(model.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    return Scorer(model, template=template(folder), budget=budget, max_tokens=max_tokens)


@given(said=st.lists(st.tuples(texts, texts, st.booleans()), min_size=2, max_size=7), budget=st.sampled_from([1, 4096]))
@settings(max_examples=25)
def test_a_score_depends_on_no_companion_and_no_order(
    tiny_model: Path, said: list[tuple[str, str, bool]], budget: int
) -> None:
    rows = [ScoreRow(turns(ask or "?"), answer, CARD if card else None) for ask, answer, card in said]
    together = scorer(tiny_model, "pointwise", budget).pointwise(rows)
    alone = np.concatenate([scorer(tiny_model, "pointwise").pointwise([row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=2e-4, rtol=1e-4)
    backwards = scorer(tiny_model, "pointwise", budget).pointwise(rows[::-1])
    np.testing.assert_allclose(backwards[::-1], together, atol=2e-4, rtol=1e-4)


@given(tail=st.integers(5, 500), seed=st.integers(0, 50))
@settings(max_examples=20)
def test_the_last_token_counts_whatever_its_id(tiny_model: Path, tail: int, seed: int) -> None:
    """Rows that end in the end-of-text, end-of-turn or any other token are all read at their end."""
    model = scorer(tiny_model, "pointwise").model
    for last in (1, 4, tail):
        row = np.append(token_rows(seed, [20])[0], last)
        longer = np.append(row, last)
        with torch.no_grad():
            score, other = model(pack([row, longer])).squeeze(1).tolist()
            again = model(pack([row])).item()
        assert score == pytest.approx(again, abs=2e-4)
        assert abs(score - other) > 1e-6


@given(y0=texts, y1=texts)
@settings(max_examples=20)
def test_a_pair_is_judged_the_same_from_both_sides(tiny_model: Path, y0: str, y1: str) -> None:
    p, q = scorer(tiny_model, "pairwise").pairwise([PairRow(turns("Hi"), y0, y1), PairRow(turns("Hi"), y1, y0)])
    assert p + q == pytest.approx(1.0, abs=1e-4)
    assert 0 <= p <= 1
    if y0.strip() == y1.strip():
        assert p == pytest.approx(0.5, abs=1e-5)


def test_a_pairwise_score_is_the_mean_of_both_orders(tiny_model: Path) -> None:
    judge = scorer(tiny_model, "pairwise")
    row = PairRow(turns("Hello there"), "Yes, of course!", "no", CARD)
    both = [judge.template.pair(row.turns, *y, card=CARD).ids for y in ((row.y0, row.y1), (row.y1, row.y0))]
    with torch.no_grad():
        first, second = torch.sigmoid(judge.model(pack(both))[:, 0]).tolist()
    assert judge.pairwise([row])[0] == pytest.approx((first + 1 - second) / 2, abs=1e-5)
    assert abs(first - (1 - second)) > 1e-3


def test_signals_are_probabilities_by_name(tiny_model: Path) -> None:
    out = scorer(tiny_model, "signals").signals([ScoreRow(turns("Hi"), "a"), ScoreRow(turns("Hi"), "b")])
    assert tuple(out) == SIGNALS
    assert all(((p > 0) & (p < 1)).all() for p in out.values())
    assert not np.allclose(out["continue"], out["thumb_up"])


def test_what_does_not_fit_is_nan_and_counted_once(tiny_model: Path) -> None:
    long = "word " * 100
    judge = scorer(tiny_model, "pointwise", max_tokens=80)
    scores = judge.pointwise([ScoreRow(turns("Hi"), long), ScoreRow(turns("Hi"), "ok")])
    assert np.isnan(scores).tolist() == [True, False]
    assert judge.too_long == 1
    judge.pointwise([ScoreRow(turns(long, "I see", "So?"), "ok")])
    assert judge.dropped_turns == 2
    pairs = scorer(tiny_model, "pairwise", max_tokens=80)
    assert np.isnan(pairs.pairwise([PairRow(turns("Hi"), long, "ok"), PairRow(turns("Hi"), "a", "b")])).tolist() == [
        True,
        False,
    ]
    assert pairs.too_long == 1
    pairs.pairwise([PairRow(turns(long, "I see", "So?"), "yes", "no")])
    assert pairs.dropped_turns == 2  # read in two orders, cut from one history


def test_no_rows_give_no_scores(tiny_model: Path) -> None:
    assert scorer(tiny_model, "pointwise").pointwise([]).shape == (0,)


def test_samples_of_one_prompt_are_computed_with_one_prompt(tiny_model: Path) -> None:
    judge = Scorer(scorer(tiny_model, "pointwise").model, template=template(tiny_model))
    judge.pointwise([ScoreRow(turns("a long question " * 10), f"answer {i}", CARD) for i in range(8)])
    assert judge.computed < judge.tokens / 3


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), budget=st.integers(1, 200))
def test_batches_keep_every_row_and_the_budget(lengths: list[int], budget: int) -> None:
    rows = [row.astype(np.int32) for row in token_rows(1, lengths, shared=20)]
    made = list(batches(rows, budget))
    assert sorted(place for batch in made for place, _ in batch) == list(range(len(rows)))
    for batch in made:
        packed = pack([row for _, row in batch])
        assert len(packed.ids) <= budget or len(batch) == 1


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_a_saved_scorer_scores_as_the_trained_one(tiny_model: Path, tmp_path: Path, lora: Lora | None) -> None:
    model = load_scorer(tiny_model, kind="signals", names=SIGNALS, lora=lora, dtype=torch.float32, seed=5)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)
    reader = template(tiny_model)
    save_scorer(model, reader.tokenizer, tmp_path)
    rows = [ScoreRow(turns("Hi"), "one", CARD), ScoreRow(turns("Hi", "Hm", "So"), "two")]
    before = Scorer(model.eval(), template=reader).signals(rows)
    after = Scorer(tmp_path, dtype=torch.float32).signals(rows)
    for name in SIGNALS:
        np.testing.assert_allclose(after[name], before[name], atol=1e-5)
    assert not any("lora" in path.name or path.suffix in (".bin", ".pt") for path in tmp_path.iterdir())


def test_a_fresh_head_is_the_same_in_every_worker(tiny_model: Path) -> None:
    heads = [load_scorer(tiny_model, kind="pointwise", dtype=torch.float32, seed=s).weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_heads_of_another_kind_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no scoring head"):
        load_scorer(tiny_model)
    with pytest.raises(InputError, match="names of their signals"):
        load_scorer(tiny_model, kind="signals")
    reader = template(tiny_model)
    save_scorer(load_scorer(tiny_model, kind="pointwise", dtype=torch.float32), reader.tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"trained as pointwise \(reward\), not as signals"):
        load_scorer(tmp_path, kind="signals", names=SIGNALS)
    with pytest.raises(InputError, match="gives no pairwise scores"):
        Scorer(tmp_path, dtype=torch.float32).pairwise([PairRow(turns("a"), "b", "c")])
    with pytest.raises(InputError, match="needs the template"):
        Scorer(RewardModel(scorer(tiny_model, "pointwise").model.model, "pointwise", ("reward",)))
    (tmp_path / "head.json").write_text('{"kind": "oracle", "names": []}')
    with pytest.raises(InputError, match="kind 'oracle'"):
        load_scorer(tmp_path)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_trunk_and_head_are_on_the_device_that_was_named(tiny_model: Path, trainable: bool, lora: Lora | None) -> None:
    made = load_scorer(tiny_model, kind="pointwise", lora=lora, device="meta", trainable=trainable)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert any(parameter.requires_grad for parameter in made.parameters()) is trainable


def test_a_scorer_reads_as_much_as_it_was_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    model = load_scorer(tiny_model, kind="pointwise", dtype=torch.float32, max_tokens=90)
    save_scorer(model, template(tiny_model).tokenizer, tmp_path)
    judge = Scorer(tmp_path, dtype=torch.float32)
    assert judge.max_tokens == 90
    assert np.isnan(judge.pointwise([ScoreRow(turns("Hi"), "word " * 100)])).all()
    assert Scorer(tmp_path, dtype=torch.float32, max_tokens=800).max_tokens == 800
    about = tmp_path / "head.json"
    about.write_text(about.read_text().replace("90", "-1"))
    with pytest.raises(InputError, match="max_tokens is -1"):
        load_scorer(tmp_path)
