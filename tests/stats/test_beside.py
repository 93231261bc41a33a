"""The statistics beside Fieller: each against scipy, a closed form, a published value or simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flywheel_tasks.stats.compare import delta_lift_pct, log_delta_lift_pct, p_value, z_statistic
from flywheel_tasks.stats.cuped import Arm, cuped
from flywheel_tasks.stats.fieller import fieller
from flywheel_tasks.stats.moments import Estimate, dot, estimate, moments
from flywheel_tasks.stats.multiplicity import benjamini_hochberg, holm
from flywheel_tasks.stats.power import minimum_detectable_lift, power, units_per_arm
from flywheel_tasks.stats.sequential import crossing_probability, equal_looks, obrien_fleming
from flywheel_tasks.stats.srm import sample_ratio

T, C = Estimate(1000, 1.05, 2e-4), Estimate(1000, 1.0, 1.5e-4)


def test_z_and_p() -> None:
    z = z_statistic(T, C)
    assert z == pytest.approx(0.05 / math.sqrt(3.5e-4))
    assert p_value(z) == pytest.approx(2 * stats.norm.sf(z))
    assert z_statistic(T, Estimate(1, 1.0, None)) is None
    assert z_statistic(Estimate(9, 1.0, 0.0), Estimate(9, 1.0, 0.0)) == 0
    assert p_value(z_statistic(Estimate(9, 1.0, 0.0), Estimate(9, 2.0, 0.0))) == 0


def test_delta_intervals_approach_fieller_as_the_variance_vanishes() -> None:
    t, c = Estimate(9, 1.05, 2e-10), Estimate(9, 1.0, 1.5e-10)
    exact = fieller(t.mean, t.se2, c.mean, c.se2).lift_pct_bounds
    assert delta_lift_pct(t, c) == pytest.approx(exact, abs=1e-6)
    assert log_delta_lift_pct(t, c) == pytest.approx(exact, abs=1e-6)
    assert delta_lift_pct(t, Estimate(9, 0.0, 1e-4)) is None
    assert log_delta_lift_pct(Estimate(9, 0.0, 1e-4), c) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_adjusted_p_values(p: list[float]) -> None:
    assert benjamini_hochberg(p) == pytest.approx(list(stats.false_discovery_control(p)))
    by_holm = holm(p)
    assert all(q <= h <= min(1, len(p) * q) + 1e-12 for q, h in zip(p, by_holm, strict=True))
    assert [x for _, x in sorted(zip(p, by_holm, strict=True))] == sorted(by_holm)


def test_holm_on_a_textbook_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_sample_ratio_is_pearsons_test() -> None:
    found = sample_ratio({"a": 5200, "b": 4800}, {"a": 1, "b": 1})
    assert (found.chi2, found.p) == pytest.approx(tuple(stats.chisquare([5200, 4800])))
    assert sample_ratio({"a": 2000, "b": 1000}, {"a": 0.2, "b": 0.1}).p == pytest.approx(1)
    with pytest.raises(ValueError, match="weight"):
        sample_ratio({"a": 1}, {"b": 1})


def test_seven_naive_looks_give_sixteen_percent_false_positives() -> None:
    assert crossing_probability([1.959964] * 7, equal_looks(7)) == pytest.approx(0.166, abs=0.001)
    assert crossing_probability([1.959964] * 5, equal_looks(5)) == pytest.approx(0.142, abs=0.001)


@pytest.mark.parametrize(("looks", "last"), [(1, 1.960), (2, 1.977), (5, 2.040), (7, 2.063)])
def test_obrien_fleming_has_the_published_constants(looks: int, last: float) -> None:
    bounds = obrien_fleming(equal_looks(looks))
    assert bounds[-1] == pytest.approx(last, abs=6e-4)
    assert bounds[0] == pytest.approx(last * math.sqrt(looks), rel=1e-3)


def test_obrien_fleming_keeps_its_level_in_simulation() -> None:
    """Seven looks at correlated information, 200,000 experiments without an effect."""
    fractions = [0.3, 0.5, 0.65, 0.75, 0.85, 0.92, 1.0]
    steps = np.sqrt(np.diff([0, *fractions]))
    paths = np.cumsum(np.random.default_rng(5).normal(size=(200_000, 7)) * steps, axis=1) / np.sqrt(fractions)
    false_alarms = (abs(paths) >= obrien_fleming(fractions)).any(axis=1).mean()
    assert abs(false_alarms - 0.05) < 0.0025
    assert (abs(paths) >= 1.96).any(axis=1).mean() > 0.1


def test_cuped_is_the_regression_adjustment() -> None:
    rng = np.random.default_rng(2)
    sides, raw = [], []
    for shift in (3, 0):
        x = rng.poisson(20, 4000)
        y = rng.poisson(x * 2 + 5 + shift)
        sides.append(Arm(moments(y), moments(x), dot(x, y)))
        raw.append((x, y))
    found = cuped(*sides)
    assert found is not None
    xs, ys = (np.concatenate([side[i] - side[i].mean() for side in raw]) for i in (0, 1))
    theta = (xs @ ys) / (xs @ xs)
    assert found.theta == pytest.approx(theta)
    centre = np.concatenate([raw[0][0], raw[1][0]]).mean()
    for side, (x, y) in zip((found.test, found.control), raw, strict=True):
        adjusted = y - theta * (x - centre)
        assert side.mean == pytest.approx(adjusted.mean())
        assert side.se2 == pytest.approx(adjusted.var(ddof=1) / len(y))
    plain = estimate(sides[0].y)
    assert found.test.se2 is not None
    assert plain.se2 is not None
    assert found.test.se2 < 0.5 * plain.se2
    assert found.variance_kept == pytest.approx(1 - np.corrcoef(xs, ys)[0, 1] ** 2)


def test_cuped_without_a_useful_covariate() -> None:
    flat = Arm(moments(np.array([1, 2, 3])), moments(np.array([4, 4, 4])), 24)
    assert cuped(flat, flat) is None


def test_power_and_its_inverses() -> None:
    n = units_per_arm(0.02, 1.0, 1.5)
    assert power(0.02, 1.0, 1.5, n, n) >= 0.8 > power(0.02, 1.0, 1.5, n - 1, n - 1)
    assert n == pytest.approx((1.959964 + 0.841621) ** 2 * 2 * 1.5**2 / 0.02**2, rel=1e-3)
    assert minimum_detectable_lift(1.0, 1.5, n, n) == pytest.approx(0.02, rel=1e-4)
    assert power(0.0, 1.0, 1.5, 100, 100) == pytest.approx(0.05)


def test_power_is_how_often_fieller_declares() -> None:
    rng = np.random.default_rng(3)
    n, lift = 5000, 0.05
    t = rng.normal(1 + lift, 1.2 / math.sqrt(n), 4000)
    c = rng.normal(1, 1.2 / math.sqrt(n), 4000)
    declared = np.mean([fieller(a, 1.44 / n, b, 1.44 / n).significant for a, b in zip(t, c, strict=True)])
    assert declared == pytest.approx(power(lift, 1.0, 1.2, n, n), abs=0.025)
