"""How often a reward model agrees with people, by mode and batch (Table 8), beside what content-blind rules reach."""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.stats import winrate
from flywheel_tasks.style import features

Floats = NDArray[np.float64]
ALL = "all"


class Cell(TypedDict):
    """Accuracy on one batch of one mode; `batch` is 'all' for everything until now."""

    model: str
    mode: str
    batch: str
    n: int
    accuracy: float
    low: float
    high: float


class Drop(TypedDict):
    """How much of the earlier model's accuracy on an old batch the new one lost, on the same pairs."""

    mode: str
    batch: str
    n: int
    drop: float
    low: float
    high: float


def by_batch(pairs: pa.Table, outcomes: Floats, model: str, *, seed: int = 0) -> list[Cell]:
    """A cell for every mode and batch, and for all batches of a mode. Intervals resample characters."""
    characters = pairs["character_id"].to_numpy(zero_copy_only=False)
    cells = []
    for mode, batch, rows in _groups(pairs):
        low, high = winrate.cluster_bootstrap(outcomes[rows], list(characters[rows]), seed=seed)
        share = float(outcomes[rows].mean())
        cells.append(Cell(model=model, mode=mode, batch=batch, n=int(rows.sum()), accuracy=share, low=low, high=high))
    return cells


def overall(pairs: pa.Table, outcomes: Floats, *, seed: int = 0) -> dict[str, float]:
    """Accuracy over every batch and mode."""
    low, high = winrate.cluster_bootstrap(outcomes, pairs["character_id"].to_pylist(), seed=seed)
    return {"accuracy": float(outcomes.mean()), "low": low, "high": high, "n": pairs.num_rows}


def baselines(pairs: pa.Table) -> dict[str, Floats]:
    """What rules that read nothing would score: the longer response wins, or the one with more emoji. A tie is 1/2."""
    return {
        "longer_wins": winrate.compare(*(pc.utf8_length(pairs[side]).to_numpy() for side in ("chosen", "rejected"))),
        "more_emoji_wins": winrate.compare(*(features.emoji_count(_text(pairs, s)) for s in ("chosen", "rejected"))),
    }


def drops(pairs: pa.Table, before: Floats, now: Floats, newest: str, *, seed: int = 0) -> list[Drop]:
    """What the new model loses against the earlier one on every old batch, on the same pairs; the gate judges it."""
    characters = pairs["character_id"].to_numpy(zero_copy_only=False)
    found = []
    for mode, batch, rows in _groups(pairs):
        if batch in (ALL, newest):
            continue
        lost = (before - now)[rows]
        low, high = winrate.cluster_bootstrap((lost + 1) / 2, list(characters[rows]), seed=seed)
        drop, low, high = float(lost.mean()), 2 * low - 1, 2 * high - 1
        found.append(Drop(mode=mode, batch=batch, n=int(rows.sum()), drop=drop, low=low, high=high))
    return found


def calibration(margin: Floats, bins: int = 10) -> dict[str, Any]:
    """Whether p = σ(margin) means what it says: each pair counts in both orders, so the curve is symmetric about ½."""
    p = 1 / (1 + np.exp(-np.concatenate([margin, -margin]).clip(-60, 60)))
    return reliability(p, np.repeat([1.0, 0.0], len(margin)), bins)


def reliability(p: Floats, happened: Floats, bins: int = 10) -> dict[str, Any]:
    """How often what was given the probability p happened, in bins of p, and the mean gap between the two."""
    at = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    seen = count > 0
    predicted = np.bincount(at, weights=p, minlength=bins)[seen] / count[seen]
    observed = np.bincount(at, weights=happened, minlength=bins)[seen] / count[seen]
    error = float(np.abs(predicted - observed) @ count[seen] / max(count.sum(), 1))
    curve = [
        {"predicted": float(x), "observed": float(y), "n": int(n)}
        for x, y, n in zip(predicted, observed, count[seen], strict=True)
    ]
    return {"curve": curve, "expected_calibration_error": error}


def _groups(pairs: pa.Table) -> list[tuple[str, str, NDArray[np.bool_]]]:
    modes, batches = (pairs[name].to_numpy(zero_copy_only=False) for name in ("mode", "batch"))
    groups = []
    for mode in sorted(set(modes)):
        inside = modes == mode
        groups += [(mode, batch, inside & (batches == batch)) for batch in sorted(set(batches[inside]))]
        groups.append((mode, ALL, inside))
    return groups


def _text(pairs: pa.Table, column: str) -> pa.StringArray:
    return pairs[column].combine_chunks()
