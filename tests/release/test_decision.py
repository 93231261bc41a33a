"""The decision ships only on evidence, and everything doubtful holds."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from flywheel_tasks.release.analysis import Comparison, adjust, information, lift_of
from flywheel_tasks.release.decision import decide
from flywheel_tasks.stats.compare import p_value, z_statistic
from flywheel_tasks.stats.moments import Estimate


def comparison(metric: str, lift: float, se: float = 0.004, control: float = 1.0) -> Comparison:
    t, c = Estimate(9999, control * (1 + lift), (control * se) ** 2), Estimate(9999, control, (control * se) ** 2)
    return Comparison(metric, "test", "all", t, c, lift_of(t, c, 0.05), p_value(z_statistic(t, c)))


def verdict(breadth: float = 0.0, depth: float = 0.0, sends: float = 0.0, share: float = 0.0, **more: float) -> str:
    lifts = {"breadth": breadth, "depth": depth, "sends_per_exposed": sends, "active_share": share}
    return decide(adjust([comparison(m, x, **more) for m, x in lifts.items()]), "test", [], 0.05, 2.0).verdict


@pytest.mark.parametrize(
    ("lifts", "expected"),
    [
        ({"breadth": 0.03, "depth": 0.02, "sends": 0.04}, "ship"),
        ({"depth": 0.05, "sends": 0.04}, "ship"),
        ({}, "hold"),
        ({"breadth": 0.012}, "hold"),
        ({"breadth": -0.03}, "roll back"),
        ({"depth": 0.19, "breadth": -0.03}, "roll back"),
        ({"depth": 0.05, "share": -0.03}, "roll back"),
        ({"depth": 0.05, "sends": -0.03}, "roll back"),
        ({"depth": 0.05, "sends": -0.011}, "hold"),
    ],
)
def test_the_rule(lifts: dict[str, float], expected: str) -> None:
    assert verdict(**lifts) == expected


def test_a_win_before_holm_is_no_win_after() -> None:
    found = [
        comparison("breadth", 0.0115),
        comparison("depth", 0.0),
        comparison("sends_per_exposed", 0.01),
        comparison("active_share", 0.0),
    ]
    assert found[0].lift.significant
    assert decide(adjust(found), "test", [], 0.05, 2.0).verdict == "hold"


def test_it_fails_closed() -> None:
    good = adjust([comparison(m, 0.05) for m in ("breadth", "depth", "sends_per_exposed", "active_share")])
    assert decide(good, "test", [], 0.05, 2.0).verdict == "ship"
    assert decide(good, "test", ["sample ratio mismatch"], 0.05, 2.0).verdict == "hold"
    assert decide(good[:-1], "test", [], 0.05, 2.0).verdict == "hold"
    assert decide(good, "other", [], 0.05, 2.0).verdict == "hold"
    assert decide([], "test", [], 0.05, 2.0).verdict == "hold"
    for strange in (Estimate(9, 1.0, None), Estimate(9, None, None), Estimate(9, 0.001, 1.0), Estimate(9, -1.0, 0.1)):
        lift = lift_of(good[0].test, strange, 0.05)
        broken = [
            replace(good[0], control=strange, lift=lift, p=p_value(z_statistic(good[0].test, strange))),
            *good[1:],
        ]
        assert decide(adjust(broken), "test", [], 0.05, 2.0).verdict != "ship"


def test_information_fractions_rise_to_one() -> None:
    assert information([4.0, 2.0, 1.0]) == pytest.approx([0.25, 0.5, 1.0])
    assert information([None, 2.0, 1.0]) == pytest.approx([1 / 3, 2 / 3, 1])
    odd = information([1.0, 3.0, 1.0, 0.9])
    assert all(a < b for a, b in pairwise(odd))
    assert math.isclose(odd[-1], 1.0)
