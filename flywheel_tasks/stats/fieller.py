"""Fieller's confidence set for a ratio of means and its percentage lift (eq. 14, 16-18, Appendix 6).

Eq. 16 keeps every ratio r with (mu_T - r mu_C)^2 <= z^2 (s_T + r^2 s_C), where s is a squared standard error.
Written in the lift l = r - 1 that is a quadratic

    a l^2 - 2 b l + c <= 0,
    a = mu_C^2 - z^2 s_C,   b = d mu_C + z^2 s_C,   c = d^2 - z^2 (s_T + s_C),   d = mu_T - mu_C.

c > 0 is the two-sided z-test on the difference, so significance and the set can't disagree. Eq. 17 gives the end
points only while a > 0, that is while g = z^2 s_C / mu_C^2 < 1. The other cases:

    input                                             kind         set of ratios             ratio_bounds
    a > 0 and a variance that matters                 bounded      [R-, R+]                  (R-, R+)
    a > 0 and no width: s_T = s_C = 0,
      or s_T = 0 and mu_T = 0                         point        {mu_T / mu_C}             (R, R)
    a < 0 and the discriminant > 0                    exclusive    (-inf, lo] or [hi, inf)   (lo, hi): the excluded gap
    a = 0 exactly (g = 1) and mu_T != 0               exclusive    one ray                   (-inf, hi) or (lo, inf)
    a < 0 and the discriminant <= 0; g = 1 and mu_T = 0    whole_line   every ratio               (-inf, inf)
    mu_C = 0, s_C = 0, mu_T beyond z sqrt(s_T)        empty        none: the base is zero    None
    mu_C = 0, s_C = 0, mu_T within z sqrt(s_T), s_T > 0    whole_line   every ratio               (-inf, inf)
    mu_C = mu_T = 0 and no variance                   undefined    0 / 0                     None
    a mean or variance missing, NaN or infinite (n < 2)    undefined    -                         None
    a negative variance                               refused      -                         None
    mu_C < 0: a percentage of a negative base has the
      wrong sign, so a worse test arm would read as a win  refused      -                         None

`significant` is the z-test for every kind but undefined and refused, where it is False. In `empty` it may be True:
the arms differ, and no percentage says by how much. `lift_pct` is None where the ratio of the means doesn't exist.

The quadratic is formed in exact integers (a float is an integer times a power of two), so no rounding chooses the
kind, offsets of 1e9 or variances of 1e-300 cost nothing, and only the last division rounds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

Kind = Literal["bounded", "exclusive", "whole_line", "point", "empty", "undefined", "refused"]
Bounds = tuple[float, float]

_ROOT_BITS = 140
"""Extra bits of the integer square root: its error stays below the rounding of the final float."""


@dataclass(frozen=True, slots=True)
class FiellerSet:
    """The set of plausible ratios mu_T / mu_C. For `exclusive` the bounds are the ends of the excluded gap."""

    kind: Kind
    ratio_bounds: Bounds | None
    lift_pct: float | None
    lift_pct_bounds: Bounds | None
    significant: bool
    alpha: float
    reason: str = ""

    def contains(self, ratio: float) -> bool:
        """Whether a ratio is plausible; undefined and refused sets contain nothing."""
        if self.ratio_bounds is None:
            return False
        lo, hi = self.ratio_bounds
        return ratio <= lo or ratio >= hi if self.kind == "exclusive" else lo <= ratio <= hi

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: an infinite end is null."""
        plain = asdict(self)
        for key in ("ratio_bounds", "lift_pct_bounds"):
            if plain[key] is not None:
                plain[key] = [end if math.isfinite(end) else None for end in plain[key]]
        return plain

    def __str__(self) -> str:
        level = f"{100 * (1 - self.alpha):g} %"
        if self.lift_pct_bounds is None or self.kind == "whole_line":
            words = {
                "empty": "control is zero, no percentage exists",
                "whole_line": f"any lift is plausible at {level}",
            }
            return words.get(self.kind, self.reason or self.kind)
        lo, hi = self.lift_pct_bounds
        if self.kind == "point":
            return f"exactly {lo:+.3g} % (no variance)"
        if self.kind == "bounded":
            return f"{level} [{lo:+.3g} %, {hi:+.3g} %]"
        rays = [f"below {lo:+.3g} %"] * math.isfinite(lo) + [f"above {hi:+.3g} %"] * math.isfinite(hi)
        return f"{level} {' or '.join(rays)}"


def fieller(
    mean_t: float | None, se2_t: float | None, mean_c: float | None, se2_c: float | None, alpha: float = 0.05
) -> FiellerSet:
    """Fieller's set for mean_t / mean_c from two independent means and their squared standard errors (eq. 15-18).

    The module's table says which kind each case gets. A squared standard error of None or NaN means that the arm has
    fewer than two units.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    given = [math.nan if x is None else float(x) for x in (mean_t, se2_t, mean_c, se2_c)]
    if not all(map(math.isfinite, given)):
        return _without_set(
            "undefined", None, False, alpha, "a mean or its variance is missing (fewer than two units?)"
        )
    if given[1] < 0 or given[3] < 0:
        return _without_set("refused", None, False, alpha, "a squared standard error is negative")
    if given[2] < 0:
        return _without_set(
            "refused", None, False, alpha, "the control mean is negative: a percentage of it has the wrong sign"
        )

    mt, st, mc, sc = _common_integers(*given)
    zn, zd = _z_squared(alpha)
    d = mt - mc
    a = zd * mc * mc - zn * sc
    b = zd * d * mc + zn * sc
    c = zd * d * d - zn * (st + sc)
    significant = c > 0
    lift_pct = _divide(100 * d, mc) if mc else None

    if mc == 0 and sc == 0:
        if mt == 0 and st == 0:
            return _without_set("undefined", None, False, alpha, "both means are zero without variance")
        if significant:
            return _without_set("empty", None, True, alpha, "the control mean is zero without variance")
        return _whole_line(None, alpha)
    disc = zn * (zd * (mt * mt * sc + mc * mc * st) - zn * st * sc)
    if a == 0:
        if b == 0:
            return _whole_line(lift_pct, alpha)
        end = (c, 2 * b)
        gap = ((-1, 0), end) if b > 0 else (end, (1, 0))
        return _with_set("exclusive", *gap, lift_pct, significant, alpha)
    if a < 0 and disc <= 0:
        return _whole_line(lift_pct, alpha)
    low, high = _roots(a, b, c, disc)
    kind: Kind = "exclusive" if a < 0 else "bounded" if disc else "point"
    return _with_set(kind, low, high, lift_pct, significant, alpha)


def _without_set(kind: Kind, lift_pct: float | None, significant: bool, alpha: float, reason: str) -> FiellerSet:
    return FiellerSet(kind, None, lift_pct, None, significant, alpha, reason)


def _whole_line(lift_pct: float | None, alpha: float) -> FiellerSet:
    line = (-math.inf, math.inf)
    return FiellerSet("whole_line", line, lift_pct, line, False, alpha, "the control mean can't be told from zero")


def _with_set(
    kind: Kind, low: tuple[int, int], high: tuple[int, int], lift_pct: float | None, significant: bool, alpha: float
) -> FiellerSet:
    """A set from its ends in lift space, each a numerator and a denominator."""
    ratios = (_divide(low[0] + low[1], low[1]), _divide(high[0] + high[1], high[1]))
    lifts = (_divide(100 * low[0], low[1]), _divide(100 * high[0], high[1]))
    return FiellerSet(kind, ratios, lift_pct, lifts, significant, alpha)


def _roots(a: int, b: int, c: int, disc: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both roots of a l^2 - 2 b l + c in ascending order, the smaller one by c / q so that nothing cancels."""
    root = math.isqrt(disc << 2 * _ROOT_BITS)
    q = (b << _ROOT_BITS) + (root if b >= 0 else -root)
    if q == 0:
        return (0, 1), (0, 1)
    one, two = (q, a << _ROOT_BITS), (c << _ROOT_BITS, q)
    apart = one[0] * two[1] - two[0] * one[1]
    ascending = apart <= 0 if (one[1] > 0) == (two[1] > 0) else apart >= 0
    return (one, two) if ascending else (two, one)


def _common_integers(mean_t: float, se2_t: float, mean_c: float, se2_c: float) -> tuple[int, int, int, int]:
    """The means over one power of two and the variances over its square, as integers."""
    (tn, td), (vn, vd), (cn, cd), (wn, wd) = (x.as_integer_ratio() for x in (mean_t, se2_t, mean_c, se2_c))
    bits = max(td.bit_length() - 1, cd.bit_length() - 1, vd.bit_length() // 2, wd.bit_length() // 2)
    unit, square = 1 << bits, 1 << 2 * bits
    return tn * (unit // td), vn * (square // vd), cn * (unit // cd), wn * (square // wd)


@lru_cache(maxsize=64)
def _z_squared(alpha: float) -> tuple[int, int]:
    n, d = NormalDist().inv_cdf(1 - alpha / 2).as_integer_ratio()
    return n * n, d * d


def _divide(numerator: int, denominator: int) -> float:
    """The nearest float; a zero denominator or an overflow is an infinite end."""
    if denominator == 0:
        return math.inf if numerator > 0 else -math.inf
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if (numerator > 0) == (denominator > 0) else -math.inf
