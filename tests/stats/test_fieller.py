"""Fieller sets against eq. 16, the z-test, their own symmetries and simulation."""

import math
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flywheel_tasks.stats.fieller import FiellerSet, fieller

Z = NormalDist().inv_cdf(0.975)
mean = st.floats(0, 1e6, allow_subnormal=False) | st.floats(0, 1e-3, allow_subnormal=False)
variance = st.just(0.0) | st.floats(1e-12, 1e8, allow_subnormal=False)
positive = st.floats(1e-6, 1e6)


def inside(r: float, mt: float, vt: float, mc: float, vc: float) -> bool:
    """Eq. 16 in exact rationals."""
    mt_, vt_, mc_, vc_, r_, z_ = (Fraction(x) for x in (mt, vt, mc, vc, r, Z))
    return (mt_ - r_ * mc_) ** 2 <= z_ * z_ * (vt_ + r_ * r_ * vc_)


@settings(max_examples=400, deadline=None)
@given(mean, variance, mean, variance, st.floats(-1e3, 1e3))
def test_set_is_eq_16(mt: float, vt: float, mc: float, vc: float, r: float) -> None:
    s = fieller(mt, vt, mc, vc)
    assume(s.kind not in ("undefined", "point"))
    ends = () if s.ratio_bounds is None else s.ratio_bounds
    assume(all(not math.isclose(r, end, rel_tol=1e-9, abs_tol=1e-12) for end in ends))
    assert s.contains(r) == inside(r, mt, vt, mc, vc)


@settings(max_examples=400, deadline=None)
@given(mean, variance, mean, variance, st.sampled_from([0.2, 0.05, 0.001]))
def test_never_nan_never_inverted_and_the_z_test(mt: float, vt: float, mc: float, vc: float, alpha: float) -> None:
    s = fieller(mt, vt, mc, vc, alpha)
    for bounds in (s.ratio_bounds, s.lift_pct_bounds):
        if bounds is not None:
            lo, hi = bounds
            assert not math.isnan(lo)
            assert not math.isnan(hi)
            assert lo <= hi
    se = math.sqrt(vt + vc)
    z = NormalDist().inv_cdf(1 - alpha / 2)
    assume(not math.isclose(abs(mt - mc), z * se, rel_tol=1e-9))
    assert s.significant == (abs(mt - mc) > z * se)
    if s.lift_pct_bounds is not None:
        lo, hi = s.lift_pct_bounds
        assert s.significant == ((lo < 0 < hi) if s.kind == "exclusive" else not lo <= 0 <= hi)
        assert s.kind != "bounded" or not s.significant or (lo > 0) == (mt > mc)


@settings(max_examples=300, deadline=None)
@given(mean, variance, mean, variance, positive)
def test_swapping_arms_gives_the_reciprocal_set(mt: float, vt: float, mc: float, vc: float, r: float) -> None:
    s, swapped = fieller(mt, vt, mc, vc), fieller(mc, vc, mt, vt)
    assert s.significant == swapped.significant
    if s.ratio_bounds is None or swapped.ratio_bounds is None:
        return
    ends = [*s.ratio_bounds, *(1 / e if e else math.inf for e in swapped.ratio_bounds)]
    assume(all(not math.isclose(r, e, rel_tol=1e-9) for e in ends))
    assert s.contains(r) == swapped.contains(1 / r)


@settings(max_examples=200, deadline=None)
@given(mean, variance, mean, variance, st.integers(-300, 300))
def test_scaling_both_arms_changes_nothing(mt: float, vt: float, mc: float, vc: float, power: int) -> None:
    k = Fraction(2) ** power
    scaled = [
        float(Fraction(mt) * k),
        float(Fraction(vt) * k * k),
        float(Fraction(mc) * k),
        float(Fraction(vc) * k * k),
    ]
    assume(all(math.isfinite(x) for x in scaled))
    assume(all((x == 0) == (y == 0) and (y == 0 or y > 1e-300) for x, y in zip((mt, vt, mc, vc), scaled, strict=True)))
    assert fieller(*scaled) == fieller(mt, vt, mc, vc)


def test_closed_form_of_eq_17_when_g_is_small() -> None:
    mt, vt, mc, vc = 1.05, 1e-4, 1.0, 1.2e-4
    root = Z * math.sqrt(mt**2 * vc + mc**2 * vt - Z**2 * vt * vc)
    below = mc**2 - Z**2 * vc
    s = fieller(mt, vt, mc, vc)
    assert s.kind == "bounded"
    assert s.ratio_bounds == pytest.approx(((mt * mc - root) / below, (mt * mc + root) / below), rel=1e-12)
    assert s.lift_pct == pytest.approx(5.0)


KINDS: list[tuple[str, tuple[float | None, ...], str, bool]] = [
    ("two rays, where eq. 17 prints the gap between them", (5.0, 0.25, 0.5, 0.25), "exclusive", True),
    ("control indistinguishable from zero", (0.5, 1.0, 0.5, 1.0), "whole_line", False),
    ("eq. 17 takes a negative root here", (0.1, 1.0, 0.1, 1.0), "whole_line", False),
    ("zero control mean with variance, strong test", (10.0, 1.0, 0.0, 1.0), "exclusive", True),
    ("zero control mean with variance, weak test", (1.0, 1.0, 0.0, 1.0), "whole_line", False),
    ("no variance in either arm", (1.1, 0.0, 1.0, 0.0), "point", True),
    ("no variance and no difference", (1.0, 0.0, 1.0, 0.0), "point", False),
    ("no variance in control", (1.1, 0.01, 1.0, 0.0), "bounded", False),
    ("no variance in test", (1.1, 0.0, 1.0, 0.01), "bounded", False),
    ("test arm is all zeros", (0.0, 0.0, 1.0, 0.01), "point", True),
    ("control is all zeros", (1.0, 0.01, 0.0, 0.0), "empty", True),
    ("control is all zeros, test near it", (0.1, 0.01, 0.0, 0.0), "whole_line", False),
    ("nothing happened in either arm", (0.0, 0.0, 0.0, 0.0), "undefined", False),
    ("one unit in test: no variance estimate", (1.0, math.nan, 1.0, 0.01), "undefined", False),
    ("one unit in control", (1.0, 0.01, 1.0, None), "undefined", False),
    ("no unit at all", (None, None, 1.0, 0.01), "undefined", False),
    ("infinite mean", (math.inf, 1.0, 1.0, 0.01), "undefined", False),
    ("negative variance", (1.0, -1e-9, 1.0, 0.01), "refused", False),
    ("negative control mean would turn a loss into a win", (-3.0, 0.01, -2.0, 0.01), "refused", False),
]


@pytest.mark.parametrize(("args", "kind", "significant"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_every_degenerate_case_has_its_stated_kind(
    args: tuple[float, float, float, float], kind: str, significant: bool
) -> None:
    s = fieller(*args)
    assert (s.kind, s.significant) == (kind, significant)
    assert str(s)
    assert "NaN" not in str(s.as_json())


def test_g_of_exactly_one_is_one_ray() -> None:
    s = fieller(2.0, 0.01, Z, 1.0)
    assert s.kind == "exclusive"
    assert s.ratio_bounds is not None
    assert s.ratio_bounds[0] == -math.inf
    assert not s.contains(s.ratio_bounds[1] - 1e-6)
    assert s.contains(1e9)


def test_offsets_of_1e9_keep_their_last_digits() -> None:
    s = fieller(1e9 + 3.0, 0.5, 1e9, 0.5)
    assert s.kind == "bounded"
    assert s.significant
    assert s.lift_pct == pytest.approx(3e-7, rel=1e-12)
    assert s.lift_pct_bounds == pytest.approx(((3 - Z) * 1e-7, (3 + Z) * 1e-7), rel=1e-6)
    assert fieller(1.0, 1e-300, 1.0, 1e-300).kind == "bounded"
    assert fieller(1e308, 1.0, 5e-324, 0.0).kind == "bounded"


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        fieller(1.0, 0.1, 1.0, 0.1, alpha)


REGIMES = [1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25]


def simulated(g: float, n: int, users: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means and estimated squared standard errors of two arms of `users` normal users, n experiments."""
    rng = np.random.default_rng(round(1 / g))
    vc, vt, mt = g / Z**2, 1.3 * g / Z**2, 1.07
    chi = rng.chisquare(users - 1, (2, n)) / (users - 1)
    return rng.normal(mt, math.sqrt(vt), n), vt * chi[0], rng.normal(1.0, math.sqrt(vc), n), vc * chi[1]


@pytest.mark.parametrize("g", REGIMES)
def test_coverage_by_simulation(g: float) -> None:
    """The true ratio is in the set 95 +- 0.5 % of the time: eq. 16 on 400,000 draws, `fieller` on 4,000 of them."""
    mt, vt, mc, vc = simulated(g, 400_000)
    covered = (mt - 1.07 * mc) ** 2 <= Z**2 * (vt + 1.07**2 * vc)
    assert abs(100 * covered.mean() - 95) <= 0.5
    for i in range(4000):
        assert fieller(mt[i], vt[i], mc[i], vc[i]).contains(1.07) == covered[i]


def test_naive_interval_undercovers_where_fieller_does_not() -> None:
    """The reason for Fieller: at g = 0.25 the symmetric delta interval misses its level."""
    mt, vt, mc, vc = simulated(0.25, 400_000)
    ratio = mt / mc
    se = np.sqrt(vt + ratio**2 * vc) / mc
    assert abs(100 * (abs(ratio - 1.07) <= Z * se).mean() - 95) > 0.1


def test_a_set_prints_what_it_is() -> None:
    assert "or" in str(fieller(5.0, 0.25, 0.5, 0.25))
    assert str(fieller(0.5, 1.0, 0.5, 1.0)) == "any lift is plausible at 95 %"
    assert isinstance(fieller(1.0, 0.1, 1.0, 0.1), FiellerSet)
