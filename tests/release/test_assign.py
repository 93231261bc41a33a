"""Random assignment: uniform, independent, stable, exclusive within a layer."""

from itertools import combinations, product

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from flywheel_tasks.release.assign import Experiment, assign, conflicts, positions
from flywheel_tasks.release.expose import ExposeConfig

UNITS = [f"{i:032x}" for i in range(60_000)]


def test_positions_are_uniform() -> None:
    for key in ("a", "b", "release-2026-W47"):
        counts = np.bincount((positions(UNITS, key, "arm") * 256).astype(int), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_arms_have_their_shares() -> None:
    arms = assign(UNITS, Experiment(name="x"))
    counts = [int((arms == a).sum()) for a in (0, 1, -1)]
    assert stats.chisquare(counts, [6000, 6000, 48_000]).pvalue > 1e-4


def test_salts_are_independent() -> None:
    """Two experiments in different layers: every pair of arms at the product of its shares."""
    shares = {"test": 0.5, "control": 0.5}
    one = assign(UNITS, Experiment(name="one", layer="l1", arms=shares))
    two = assign(UNITS, Experiment(name="two", layer="l2", arms=shares))
    table = [[int(((one == i) & (two == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-4
    again = assign(UNITS, Experiment(name="one", salt="new", layer="l1", arms=shares))
    assert 0.48 < (again == one).mean() < 0.52


def test_a_salt_used_twice_still_gives_independent_arms() -> None:
    """In two layers, or under two names; and no two keys may be written alike."""
    shares = {"test": 0.5, "control": 0.5}
    twins = [("one", "l1", "s"), ("one", "l2", "s"), ("two", "l1", "s"), ("one", "l1", "")]
    drawn = [assign(UNITS, Experiment(name=n, layer=la, salt=s, arms=shares)) for n, la, s in twins]
    for one, two in combinations(drawn, 2):
        table = [[int(((one == i) & (two == j)).sum()) for j in (0, 1)] for i in (0, 1)]
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_layer_and_arm_hashes_are_independent_even_under_one_name() -> None:
    """With one hash for both, a slice would hold only one arm."""
    arms = assign(UNITS, Experiment(name="same", layer="same", slice_to=0.5, arms={"test": 0.5, "control": 0.5}))
    assert stats.chisquare([(arms == 0).sum(), (arms == 1).sum()]).pvalue > 1e-4
    assert abs((arms >= 0).mean() - 0.5) < 0.01


def test_assignment_is_deterministic_across_versions() -> None:
    """A change of the hash would move every running experiment."""
    assert positions(["u1", "u2", "ünit"], "salt", "arm").tolist() == pytest.approx(EXPECTED, abs=0)
    assert (assign(UNITS[::-1], Experiment(name="x"))[::-1] == assign(UNITS, Experiment(name="x"))).all()


def test_resizing_never_moves_a_unit_between_arms() -> None:
    small = assign(UNITS, Experiment(name="x", arms={"a": 0.05, "b": 0.1, "control": 0.1}))
    for sizes in product((0.05, 0.2, 1 / 3), repeat=3):
        large = assign(UNITS, Experiment(name="x", arms=dict(zip(("a", "b", "control"), sizes, strict=True))))
        both = (small >= 0) & (large >= 0)
        assert (small[both] == large[both]).all()
        for arm, (was, now) in enumerate(zip((0.05, 0.1, 0.1), sizes, strict=True)):
            if now >= was:
                assert (large[small == arm] == arm).all()


def test_widening_a_slice_keeps_its_units() -> None:
    narrow = assign(UNITS, Experiment(name="x", slice_from=0.2, slice_to=0.4))
    wide = assign(UNITS, Experiment(name="x", slice_from=0.1, slice_to=0.6))
    assert (wide[narrow >= 0] == narrow[narrow >= 0]).all()


def test_experiments_of_one_layer_share_no_unit() -> None:
    one = Experiment(name="one", slice_to=0.5, arms={"test": 0.5, "control": 0.5})
    two = Experiment(name="two", slice_from=0.5, arms={"test": 0.5, "control": 0.5})
    assert conflicts([one, two]) is None
    assert not ((assign(UNITS, one) >= 0) & (assign(UNITS, two) >= 0)).any()
    assert "overlap" in str(conflicts([one, two.model_copy(update={"slice_from": 0.4})]))
    assert "named" in str(conflicts([one, one.model_copy(update={"layer": "z"})]))
    with pytest.raises(ValidationError, match="overlap"):
        ExposeConfig(experiments=(Experiment(name="a"), Experiment(name="b")))


@pytest.mark.parametrize(
    "wrong", [{"arms": {"test": 0.6, "control": 0.1}}, {"arms": {"test": 0.1}}, {"slice_from": 0.5, "slice_to": 0.4}]
)
def test_impossible_experiments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Experiment.model_validate({"name": "x"} | wrong)


EXPECTED = [0.5416238932037429, 0.6956617114217596, 0.5712449336721429]
