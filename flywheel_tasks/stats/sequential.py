"""Repeated looks at a growing experiment: what naive peeking costs, and the O'Brien-Fleming boundary that pays for it.

The z statistics at information fractions t_1 < ... < t_K = 1 are those of a Brownian motion: S_k = z_k sqrt(t_k) has
independent increments of variance t_k - t_{k-1}. The chance to cross is found by carrying the density of S over the
looks on a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_POINTS = 201


def crossing_probability(bounds: Sequence[float], fractions: Sequence[float]) -> float:
    """Chance that |z_k| >= bounds[k] at some look when there is no effect."""
    if len(bounds) != len(fractions) or not bounds or any(b <= 0 for b in bounds):
        raise ValueError("give one positive bound per information fraction")
    steps = np.diff([0.0, *fractions])
    if (steps <= 0).any() or fractions[-1] > 1 + 1e-9:
        raise ValueError("information fractions must rise, up to 1")
    grid, density = np.zeros(1), np.ones(1)
    for bound, t, step in zip(bounds, fractions, steps, strict=True):
        edge = min(bound, 9.0) * math.sqrt(t)
        # Simpson's rule keeps the error of the smooth integrand far below the digits that anyone prints.
        here = np.linspace(-edge, edge, _POINTS)
        value = _normal(here[:, None] - grid[None, :], math.sqrt(step)) @ density
        weights = np.full(_POINTS, 2.0)
        weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
        density = value * weights * (here[1] - here[0]) / 3
        grid = here
    return float(1 - density.sum())


def obrien_fleming(fractions: Sequence[float], alpha: float = 0.05) -> list[float]:
    """Critical |z| at each look, c / sqrt(t_k), with c such that the chance of any false alarm is alpha."""
    return list(_obrien_fleming(tuple(fractions), alpha))


@lru_cache(maxsize=256)
def _obrien_fleming(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    from scipy.optimize import brentq

    shape = [1 / math.sqrt(t) for t in fractions]
    c = brentq(lambda c: crossing_probability([c * s for s in shape], fractions) - alpha, 0.5, 8.0, xtol=1e-6)
    return tuple(c * s for s in shape)


def equal_looks(looks: int) -> list[float]:
    return [(k + 1) / looks for k in range(looks)]


def _normal(x: np.ndarray, sd: float) -> np.ndarray:
    return np.asarray(np.exp(-0.5 * (x / sd) ** 2) / (sd * math.sqrt(2 * math.pi)))
