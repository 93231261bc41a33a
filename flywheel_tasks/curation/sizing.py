"""The largest subset that meets the hard bounds of Table 1, exactly and without a solver.

A subset of N prompts may take at most K = floor(cap x N) of any character and must hold at least F = ceil(floor x N)
first turns. Choosing rows under a cap per character is a partition matroid: any set of first turns that respects the
caps grows to a set of any size up to sum_c min(n_c, K) that still does. So N is feasible if and only if

    sum_c min(n_c, K) >= N   and   sum_c min(f_c, K) >= F,

with n_c the prompts and f_c the first turns of character c. Feasibility is not monotone in N (below 1 / cap not even
one row of a character is allowed), so every N is checked; that is one pass over N, for any number of characters."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


def exact(share: float) -> Fraction:
    """The decimal number a configuration means: 0.03 is 3/100, not the nearest binary fraction."""
    return Fraction(repr(float(share)))


def cap_rows(share: float, size: int) -> int:
    """Most rows of one character among `size`."""
    return int(exact(share) * size)


def floor_rows(share: float, size: int) -> int:
    """Fewest first turns among `size`."""
    return -int(-exact(share) * size // 1) if share else 0


def _within(counts: Counts, most: int) -> Counts:
    """sum_c min(counts_c, K) for K = 0 .. most."""
    at_least = len(counts) - np.cumsum(np.bincount(np.minimum(counts, most + 1), minlength=most + 2))[:-1]
    return np.concatenate([[0], np.cumsum(at_least[:most])])


def feasible(rows: Counts, first_turns: Counts, cap: float, floor: float) -> NDArray[np.bool_]:
    """For N = 0 .. all rows: can a subset of that size meet both bounds?"""
    total = int(rows.sum())
    sizes = np.arange(total + 1, dtype=np.int64)
    share, least = exact(cap), exact(floor)
    most = sizes * share.numerator // share.denominator
    need = -(-sizes * least.numerator // least.denominator)
    top = int(most[-1])
    return np.asarray((_within(rows, top)[most] >= sizes) & (_within(first_turns, top)[most] >= need))


def largest(rows: Counts, first_turns: Counts, cap: float, floor: float, limit: int | None = None) -> int:
    """The largest feasible size not above `limit`; 0 where there is none."""
    sizes = np.flatnonzero(feasible(rows, first_turns, cap, floor))
    return int(sizes[sizes <= (limit if limit is not None else sizes[-1])][-1])


def smallest(rows: Counts, first_turns: Counts, cap: float, floor: float, least: int) -> int:
    """The smallest feasible size not below `least`; 0 where there is none."""
    sizes = np.flatnonzero(feasible(rows, first_turns, cap, floor))
    above = sizes[sizes >= least]
    return int(above[0]) if len(above) else 0


@dataclass(frozen=True)
class Relaxation:
    """Bounds that some subset of at least the wanted size does meet, and the largest such subset."""

    cap: float
    floor: float
    size: int


_GRID = 10_000


def _smallest_cap(rows: Counts, first_turns: Counts, floor: float, least: int, limit: int | None) -> Relaxation | None:
    """The tightest cap, to four decimals, under which `least` rows are feasible. A looser cap only ever allows more."""
    return _loosest(lambda cap: (cap, floor), rows, first_turns, least, limit, ascending=True)


def _largest_floor(rows: Counts, first_turns: Counts, cap: float, least: int, limit: int | None) -> Relaxation | None:
    return _loosest(lambda floor: (cap, floor), rows, first_turns, least, limit, ascending=False)


def _loosest(
    bounds: Callable[[float], tuple[float, float]],
    rows: Counts,
    first_turns: Counts,
    least: int,
    limit: int | None,
    *,
    ascending: bool,
) -> Relaxation | None:
    def tried(step: int) -> Relaxation:
        cap, floor = bounds((step if ascending else _GRID - step) / _GRID)
        return Relaxation(cap, floor, largest(rows, first_turns, cap, floor, limit))

    if tried(_GRID).size < least:
        return None
    low, high = 0, _GRID
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tried(middle).size >= least else (middle, high)
    return tried(high)


def conflicts(
    rows: Counts, first_turns: Counts, cap: float, floor: float, least: int, limit: int | None = None
) -> tuple[str, ...]:
    """The bounds that no subset of `least` to `limit` rows meets together: an irreducible set."""
    if largest(rows, first_turns, cap, 0.0, limit) < least:
        return ("character_cap",)
    if largest(rows, first_turns, 1.0, floor, limit) < least:
        return ("first_turn_floor",)
    return ("character_cap", "first_turn_floor")


def relaxations(
    rows: Counts, first_turns: Counts, cap: float, floor: float, least: int, limit: int | None = None
) -> list[Relaxation]:
    """The smallest relaxations that make `least` to `limit` rows feasible, least change relative to the bound first.

    One bound alone where that is enough; otherwise the cap without the floor, and then as much of the floor as that
    leaves."""
    one = [
        _smallest_cap(rows, first_turns, floor, least, limit),
        _largest_floor(rows, first_turns, cap, least, limit) if floor else None,
    ]
    found = [relaxed for relaxed in one if relaxed is not None]
    if not found and (loose := _smallest_cap(rows, first_turns, 0.0, least, limit)):
        both = _largest_floor(rows, first_turns, loose.cap, least, limit)
        found = [both] if both else []
    return sorted(found, key=lambda r: abs(r.cap - cap) / cap + (abs(r.floor - floor) / floor if floor else 0.0))
