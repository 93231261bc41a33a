"""Lines 6 to 9 of Algorithm 1 on arrays: the best of k responses to each prompt, where it is good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flywheel_tasks.stats import within
from flywheel_tasks.stats.within import Floats, Ints

NONE = -1


def best(prompt: Ints, score: Floats, prompts: int) -> Ints:
    """For each prompt the row of its highest score, the first of equals; NONE where no score is a number."""
    found = np.full(prompts, NONE, np.int64)
    rows = np.flatnonzero(np.isfinite(score))
    order = rows[np.lexsort((-rows, score[rows], prompt[rows]))]
    found[prompt[order]] = order  # the last write of a prompt is its best row
    return found


def thresholds(
    highest: Floats, segment: Sequence[str], *, value: float | None = None, quantile: float | None = None
) -> Floats:
    """τ for each prompt: the absolute value, or the quantile of the highest rewards of its segment."""
    if value is not None:
        return np.full(len(highest), value)
    _, at = np.unique(np.asarray(segment, object).astype(str), return_inverse=True)
    tau = np.full(len(highest), np.nan)
    for number in range(at.max(initial=-1) + 1):
        rows = at == number
        known = highest[rows][np.isfinite(highest[rows])]
        if known.size:
            tau[rows] = np.quantile(known, quantile or 0.0)
    return tau


def ranking(prompt: Ints, reward: Floats, signals: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """The reward with the user signals beside it (Sec. 2.4.1), each as its distance from the mean of its prompt in
    standard deviations within a prompt: eq. 1 leaves a constant of each prompt open, and pooled over prompts such
    constants would decide what a signal weighs. A signal that is missing neither helps nor harms.

    Without weights this is the reward's own order, and the choice is Algorithm 1's to the letter.
    """
    total = _standard(prompt, reward)
    for name, weight in weights.items():
        total = total + weight * np.nan_to_num(_standard(prompt, signals[name]))
    return total


def choose(prompt: Ints, reward: Floats, rank: Floats, tau: Floats) -> Ints:
    """For each prompt the best-ranked row among those whose reward reaches τ; NONE where there is none."""
    eligible = np.isfinite(reward) & (reward >= tau[prompt])
    return best(prompt, np.where(eligible, rank, np.nan), len(tau))


def best_of(reward: Floats, k: int) -> list[float]:
    """Expected highest reward of j = 1 … k responses, from rows of k each, without bias (order statistics).

    Rows with a failed response are left out.
    """
    rows = np.sort(reward.reshape(-1, k), axis=1)
    rows = rows[np.isfinite(rows).all(axis=1)]
    if not rows.size:
        return []
    mean = rows.mean(axis=0)
    curve, place = [], np.arange(1, k + 1)
    for j in range(1, k + 1):
        # P(the i-th smallest of k is the largest of j drawn without replacement) = C(i-1, j-1) / C(k, j)
        weight = np.ones(k)
        for step in range(j - 1):
            weight = weight * np.maximum(place - 1 - step, 0) / (k - 1 - step)
        curve.append(float(mean @ (weight * j / k)))
    return curve


def _standard(prompt: Ints, values: Floats) -> Floats:
    apart, spread = within.deviations(prompt, values), within.spread(prompt, values)
    return apart / spread if spread > 0 else np.where(np.isfinite(values), 0.0, np.nan)
