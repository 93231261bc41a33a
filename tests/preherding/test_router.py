"""The router sends a segment where it earned most, and keeps trying the others."""

from __future__ import annotations

import numpy as np
import pytest

from flywheel_tasks.preherding.router import Earned, learn, route, segment_names

IDS = [f"p{i}" for i in range(4000)]
SEGMENTS = ["en · romance" if i % 2 else "hi · advice" for i in range(4000)]
POOL = ("champion", "sibling")


def earned(policy: str, segment: str, mean: float, n: int = 200) -> Earned:
    return Earned(policy=policy, segment=segment, n=n, mean=mean)


KNOWN = [
    earned("champion", "en · romance", 1.0),
    earned("champion", "hi · advice", 0.2),
    earned("sibling", "en · romance", 0.5),
    earned("sibling", "hi · advice", 0.9),
]


def test_each_segment_goes_to_its_best_policy_but_for_the_share_of_chance() -> None:
    chosen, by_chance = route(IDS, SEGMENTS, POOL, KNOWN, explore=0.2, seed=1)
    assert by_chance.mean() == pytest.approx(0.2, abs=0.02)
    for policy, segment, chance in zip(chosen, SEGMENTS, by_chance, strict=True):
        assert chance or policy == ("champion" if segment == "en · romance" else "sibling")
    explored = np.array(chosen)[by_chance]
    assert (explored == "sibling").mean() == pytest.approx(0.5, abs=0.07)


def test_with_nothing_known_chance_decides_alone() -> None:
    chosen, by_chance = route(IDS, SEGMENTS, POOL, [], explore=0.0, seed=1)
    assert by_chance.all()
    assert (np.array(chosen) == "champion").mean() == pytest.approx(0.5, abs=0.03)


def test_a_route_belongs_to_the_prompt_not_to_its_company() -> None:
    whole, _ = route(IDS, SEGMENTS, POOL, KNOWN, explore=0.2, seed=1)
    part, _ = route(IDS[:100], SEGMENTS[:100], POOL, KNOWN, explore=0.2, seed=1)
    assert part == whole[:100]


def test_a_lucky_handful_does_not_outweigh_what_a_policy_earns_everywhere() -> None:
    lucky = [*KNOWN, earned("sibling", "de · small talk", 1.3, n=1), earned("champion", "de · small talk", 1.1, n=300)]
    chosen, _ = route(["p"], ["de · small talk"], POOL, lucky, explore=0.0, seed=1)
    assert chosen == ["champion"]


def test_what_was_learned_counts_every_finite_reward() -> None:
    found = learn(["a", "a", "b"], ["x", "x", "x"], [1.0, 3.0, float("nan")], KNOWN)
    assert found == [Earned(policy="a", segment="x", n=2, mean=2.0)]


def test_a_week_without_exploration_forgets_nothing() -> None:
    earned: list[Earned] = []
    chance = []
    for week in range(3):
        chosen, by_chance = route(IDS, SEGMENTS, POOL, earned, explore=0.0, seed=week)
        at = np.flatnonzero(by_chance)
        rewards = [float(chosen[n] == "sibling") for n in at]
        earned = learn([chosen[n] for n in at], [SEGMENTS[n] for n in at], rewards, earned)
        chance.append(by_chance.mean())
    assert chance == [1, 0, 0]
    assert set(chosen) == {"sibling"}
    assert learn(["a"], ["x"], [float("nan")], KNOWN) == KNOWN


def test_segments_are_named_from_their_columns() -> None:
    assert segment_names({"locale": ["en_US", None], "jtbd": ["advice", "romance"]}, 2) == [
        "en_US · advice",
        "unknown · romance",
    ]
    assert segment_names({}, 2) == ["all", "all"]


def test_a_new_champion_is_the_favourite_until_it_is_known() -> None:
    chosen, by_chance = route(IDS, SEGMENTS, ("new", "sibling"), KNOWN, explore=0.2, seed=1)
    assert {policy for policy, chance in zip(chosen, by_chance, strict=True) if not chance} == {"new"}
    assert by_chance.mean() == pytest.approx(0.2, abs=0.02)
