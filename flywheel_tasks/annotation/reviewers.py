"""How each annotator works (Sec. 3.4.1, person by person): agreement, drift between batches, pace, habits.

Flags are for a person to look at; nobody is left out unless the configuration says so. Each rests on a test with its
p-value adjusted over all annotators (Benjamini and Hochberg), so a large team does not raise false alarms by its size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.annotation.agreement import against_others
from flywheel_tasks.annotation.collect import Votes, ballots
from flywheel_tasks.stats.multiplicity import benjamini_hochberg

Flag = Literal["position", "fast", "drift", "disagrees"]
FloatArray = NDArray[np.float64]
_FEWEST = 20
"""Reviews below which nothing is said about a person."""
_Q = 0.01
_FAST = 3.5
"""Modified z-score (Iglewicz and Hoaglin 1993) beyond which a person's pace is no pace of reading."""
_SMALLEST_TEAM = 3
_LEAST_SPREAD = 0.1
"""Of log seconds: in a team of equal pace nobody is an outlier by seconds."""


class Reviewer(NamedTuple):
    annotator: str
    reviews: int
    agreement: float | None
    """Mean share of a pair's other reviewers who chose the same."""
    compared: int
    left_share: float | None
    """Of the choices of a side: with sides drawn by a coin it is a half for whoever reads."""
    median_seconds: float | None
    pace_z: float | None
    drift: tuple[dict[str, Any], ...]
    """Agreement by batch, and the change since the batch before with its adjusted p-value."""
    flags: tuple[Flag, ...]


def reviewers(annotations: pa.Table, ledger: pa.Table) -> list[Reviewer]:
    """Everybody who reviewed, by name."""
    if not len(annotations):
        return []
    votes, tasks = ballots(annotations, ledger)
    same = against_others(votes.pair, votes.label, votes.table)
    at_left = _at_left(votes, tasks)
    names, who = np.unique(annotations["annotator"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    batch = annotations["batch"].to_numpy(zero_copy_only=False).astype(str)
    seconds = pc.fill_null(annotations["seconds"], math.nan).to_numpy()
    people = [np.flatnonzero(who == person) for person in range(len(names))]
    rest = _mean(same)
    z = _pace([seconds[mine] for mine in people])
    left = [at_left[mine][~np.isnan(at_left[mine])] for mine in people]
    biased = benjamini_hochberg([_coin(side) for side in left])
    apart = benjamini_hochberg([_below(same[mine], rest) for mine in people])
    batches = [_by_batch(same[mine], batch[mine]) for mine in people]
    changes = benjamini_hochberg(_against_team(batches))
    result = []
    for person, mine in enumerate(people):
        history = batches[person]
        p_drift, changes = changes[: len(history)], changes[len(history) :]
        for step, p in zip(history, p_drift, strict=True):
            step["p"] = p
        flags: list[Flag] = []
        if biased[person] < _Q:
            flags.append("position")
        if (pace := z[person]) is not None and pace < -_FAST:
            flags.append("fast")
        if any(step["p"] < _Q for step in history):
            flags.append("drift")
        if apart[person] < _Q:
            flags.append("disagrees")
        timed = seconds[mine][~np.isnan(seconds[mine])]
        result.append(
            Reviewer(
                annotator=str(names[person]),
                reviews=len(mine),
                agreement=_mean(same[mine]),
                compared=int((~np.isnan(same[mine])).sum()),
                left_share=_mean(left[person]),
                median_seconds=float(np.median(timed)) if len(timed) else None,
                pace_z=z[person],
                drift=tuple(history),
                flags=tuple(flags),
            )
        )
    return result


def excluded(people: Sequence[Reviewer], flags: Sequence[Flag]) -> list[str]:
    """Annotators who carry one of the flags."""
    return [person.annotator for person in people if set(person.flags) & set(flags)]


def _at_left(votes: Votes, tasks: pa.Table) -> FloatArray:
    """1 where the left response was chosen, 0 where the right one, NaN where neither."""
    left = (tasks["left"].to_numpy(zero_copy_only=False) == "y1").astype(np.int64)[votes.pair]
    return np.where(votes.label < 2, votes.label == left, np.nan)


def _coin(side: FloatArray) -> float:
    """Exact two-sided p-value of a fair coin."""
    from scipy.stats import binomtest

    return float(binomtest(int(side.sum()), len(side)).pvalue) if len(side) >= _FEWEST else 1.0


def _below(same: FloatArray, everybody: float | None) -> float:
    """One-sided p-value of agreeing with others less than everybody does."""
    same = same[~np.isnan(same)]
    if len(same) < _FEWEST or everybody is None:
        return 1.0
    return 0.5 * math.erfc((everybody - float(same.mean())) / _error(same) / math.sqrt(2))


def _by_batch(same: FloatArray, batch: NDArray[np.str_]) -> list[dict[str, Any]]:
    """Agreement in every batch with enough comparisons, and its change, with standard error, since the one before."""
    history: list[dict[str, Any]] = []
    for name in sorted(set(batch.tolist())):
        mine = same[(batch == name) & ~np.isnan(same)]
        if len(mine) >= _FEWEST:
            rate, error = float(mine.mean()), _error(mine)
            change = rate - history[-1]["agreement"] if history else None
            spread = math.hypot(error, history[-1]["error"]) if history else None
            history.append({"batch": name, "agreement": rate, "error": error, "compared": len(mine),
                            "change": change, "change_error": spread})  # fmt: skip
    return history


def _against_team(histories: Sequence[list[dict[str, Any]]]) -> list[float]:
    """p-value of every step's change beyond the team's median change: when one person drifts, the agreement of all who
    share pairs with them falls too."""
    changes: dict[str, list[float]] = defaultdict(list)
    for history in histories:
        for step in history:
            if step["change"] is not None:
                changes[step["batch"]].append(step["change"])
    p = []
    for history in histories:
        for step in history:
            of_team = changes[step["batch"]]
            usual = float(np.median(of_team)) if len(of_team) >= _SMALLEST_TEAM else 0.0
            beyond = 0.0 if step["change"] is None else (step["change"] - usual) / step["change_error"]
            p.append(math.erfc(abs(beyond) / math.sqrt(2)))
    return p


def _error(same: FloatArray) -> float:
    """Standard error of a mean; perfect agreement in a few reviews is no certainty."""
    return max(float(same.std(ddof=1)), 0.5 / math.sqrt(len(same))) / math.sqrt(len(same))


def _pace(seconds: Sequence[FloatArray]) -> list[float | None]:
    """Modified z-scores of each person's median log seconds among all."""
    logs = [np.log(np.maximum(s[~np.isnan(s)], 0.1)) for s in seconds]
    medians = np.array([np.median(log) if len(log) >= _FEWEST else np.nan for log in logs])
    if (~np.isnan(medians)).sum() < 3:
        return [None] * len(medians)
    middle = np.nanmedian(medians)
    spread = max(float(np.nanmedian(np.abs(medians - middle))), _LEAST_SPREAD)
    return [None if math.isnan(m) else float(0.6745 * (m - middle) / spread) for m in medians]


def _mean(values: FloatArray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
