"""User-signal models on held-out conversations: how well, how honestly, and with which biases (Sec. 3.5.5)."""

from __future__ import annotations

from collections.abc import Mapping
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


def run(held_out: pa.Table, cards: Mapping[str, Card], max_tokens: int, out: Output) -> Measured:
    """Score every held-out response and compare with what its user did."""
    readable, strangers = with_card(held_out, cards, "row_id")
    scorer = Scorer(out.folder("model"), max_tokens=max_tokens)
    rows = [
        ScoreRow(row["turns"], row["response"], card_of(cards, row["character_id"]))
        for row in readable.select(["turns", "response", "character_id"]).to_pylist()
    ]
    scores = {name: values.astype(np.float64) for name, values in scorer.signals(rows).items()}
    fits = np.isfinite(scores[SIGNALS[0]])
    if not fits.any():
        raise InputError(
            f"none of {held_out.num_rows} held-out responses can be measured: {strangers.num_rows} are of characters "
            f"without a card, the others are longer than signal-rm.max_tokens={max_tokens}: raise it"
        )
    found = readable.filter(pa.array(fits))
    beside = {
        "is_last": np.array(found["is_last"].to_pylist(), bool),
        "words": features.word_count(found["response"].combine_chunks()).astype(np.float64),
        "jtbd": np.array([name or "unknown" for name in found["jtbd"].to_pylist()], object),
    }
    report: dict[str, Any] = {}
    for name in SIGNALS:
        label, score = _numbers(found[name]), scores[name][fits]
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
    lost = quarantined(readable.filter(pa.array(~fits)), "row_id", "too_long")
    cut = {"too_long": scorer.too_long, "dropped_turns": scorer.dropped_turns}
    return Measured({"signals": report} | cut, pa.concat_tables([strangers, lost]), found.num_rows)


def _numbers(column: pa.ChunkedArray) -> Floats:
    """1, 0, and NaN for what is not known."""
    return np.array([np.nan if value is None else float(value) for value in column.to_pylist()], np.float64)
