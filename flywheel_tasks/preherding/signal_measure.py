"""User-signal models on held-out conversations: how well, how honestly, and with which biases (Sec. 3.5.5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import quarantined
from flywheel_tasks.models.chat import Card, card_of
from flywheel_tasks.models.score import Scorer, ScoreRow
from flywheel_tasks.preherding import accuracy, biases
from flywheel_tasks.preherding.accuracy import Floats
from flywheel_tasks.preherding.responses import SIGNALS
from flywheel_tasks.style import features
from flywheel_tasks.training.encode import with_card


@dataclass(frozen=True)
class Measured:
    report: dict[str, Any]
    rejected: pa.Table
    rows: int


def run(held_out: Iterable[pa.Table], cards: Mapping[str, Card], max_tokens: int, out: Output) -> Measured:
    """Score every held-out response, a table at a time, and compare with what its user did."""
    scorer = Scorer(out.folder("model"), max_tokens=max_tokens)
    found, strangers, lost = (pa.concat_tables(parts) for parts in zip(*_scored(held_out, cards, scorer), strict=True))
    if not found.num_rows:
        raise InputError(
            f"none of {strangers.num_rows + lost.num_rows} held-out responses can be measured: {strangers.num_rows} "
            "are of characters without a card, the others are longer than "
            f"signal-rm.max_tokens={max_tokens}: raise it"
        )
    beside = {
        "is_last": np.array(found["is_last"].to_pylist(), bool),
        "words": _numbers(found["words"]),
        "jtbd": np.array([name or "unknown" for name in found["jtbd"].to_pylist()], object),
    }
    report: dict[str, Any] = {}
    for name in SIGNALS:
        label, score = _numbers(found[name]), _numbers(found[f"p({name})"])
        known = np.isfinite(label)
        area = biases.auc(label[known], score[known])
        calibrated = accuracy.reliability(score[known], label[known])
        report[name] = {
            "n": int(known.sum()),
            "positives": int(label[known].sum()),
            "auc": area,
            "calibration": calibrated,
            "biases": biases.measured(label, score, earlier=_numbers(found[f"earlier_{name}"]), **beside),
        }
        out.metric(f"eval/calibration_error/{name}", calibrated["expected_calibration_error"])
        if area is not None:
            out.metric(f"eval/auc/{name}", area)
    cut = {"too_long": scorer.too_long, "dropped_turns": scorer.dropped_turns}
    return Measured({"signals": report} | cut, pa.concat_tables([strangers, lost]), found.num_rows)


def _scored(
    held_out: Iterable[pa.Table], cards: Mapping[str, Card], scorer: Scorer
) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    """What the report needs of each table, without the words; and the quarantine of what can't be read or scored."""
    for table in held_out:
        readable, strangers = with_card(table, cards, "row_id")
        rows = [
            ScoreRow(row["turns"], row["response"], card_of(cards, row["character_id"]))
            for row in readable.select(["turns", "response", "character_id"]).to_pylist()
        ]
        scores = scorer.signals(rows)
        fits = np.isfinite(scores[SIGNALS[0]])
        words = features.word_count(readable["response"].combine_chunks())
        found = readable.select([*SIGNALS, *(f"earlier_{name}" for name in SIGNALS), "is_last", "jtbd"])
        for name, values in {"words": words, **{f"p({name})": scores[name] for name in SIGNALS}}.items():
            found = found.append_column(name, pa.array(values))
        lost = quarantined(readable.filter(pa.array(~fits)), "row_id", "too_long")
        yield found.filter(pa.array(fits)), strangers, lost


def _numbers(column: pa.ChunkedArray) -> Floats:
    """1, 0, and NaN for what is not known."""
    return np.array([np.nan if value is None else float(value) for value in column.to_pylist()], np.float64)
