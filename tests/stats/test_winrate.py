"""Win-rates: ties, and intervals that cover when prompts of one character are alike, however few characters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flywheel_tasks.stats.winrate import cluster_bootstrap, compare, difference, wilson, win_rate


def test_a_tie_is_half_a_win() -> None:
    outcome = compare([1.0, 2.0, 3.0, 3.0], [0.0, 2.0, 4.0, 2.5])
    assert outcome.tolist() == [1.0, 0.5, 0.0, 1.0]
    found = win_rate(outcome, ["a", "a", "b", "c"])
    assert (found.rate, found.n, found.clusters) == (0.625, 4, 3)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)


scores = st.lists(st.floats(-5, 5).map(lambda x: round(x, 2)), min_size=1, max_size=40)


@given(scores, st.randoms())
def test_swapping_the_models_mirrors_the_rate(a: list[float], random: object) -> None:
    b = list(a)
    random.shuffle(b)  # type: ignore[attr-defined]
    assert np.allclose(compare(a, b) + compare(b, a), 1)
    assert compare(a, a).tolist() == [0.5] * len(a)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: win_rate([], []), "no comparison"),
        (lambda: win_rate([1.0, 0.3], ["a", "b"]), "an outcome is"),
        (lambda: win_rate([1.0], ["a", "b"]), "1 outcomes, 2 cluster names"),
        (lambda: compare([1.0, float("nan")], [0.0, 0.0]), "row 1 is not a finite number"),
        (lambda: compare([1.0], [0.0, 1.0]), "the same prompts"),
    ],
)
def test_what_cannot_be_a_win_rate_is_refused(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]


def test_wilson_and_newcombe_agree_with_published_and_library_values() -> None:
    for k, n in ((81, 263), (15, 148), (0, 20), (20, 20), (1, 29)):
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # Newcombe (1998), Statistics in Medicine 17:873, method 10, 56/70 against 48/80.
    low, high = difference(56 / 70, wilson(56 / 70, 70), 48 / 80, wilson(48 / 80, 80))
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_few_clusters_never_claim_certainty() -> None:
    assert cluster_bootstrap([1.0] * 500, ["one"] * 500) == (0.0, 1.0)
    low, high = cluster_bootstrap([1.0] * 500, [f"c{i % 5}" for i in range(500)])
    assert (low, high) == wilson(1.0, 5)
    assert low < 0.6


def test_the_same_seed_gives_the_same_bits_whatever_the_names_and_the_order() -> None:
    rng = np.random.default_rng(3)
    y, c = rng.integers(0, 2, 400) * 1.0, rng.integers(0, 30, 400)
    first = cluster_bootstrap(y, [f"c{i:02d}" for i in c], seed=5)
    shuffled = rng.permutation(400)
    assert cluster_bootstrap(y[shuffled], [f"c{i:02d}" for i in c[shuffled]], seed=5) == first
    assert cluster_bootstrap(y, [f"c{i:02d}" for i in c], seed=6) != first


def simulate(rng: np.random.Generator, clusters: int, spread: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters with their own win probability around 0.58, of unequal sizes."""
    p = np.clip(rng.normal(0.58, spread, clusters), 0, 1)
    sizes = 1 + rng.poisson(size, clusters)
    c = np.repeat(np.arange(clusters), sizes)
    return (rng.random(c.size) < p[c]).astype(float), c


@pytest.mark.parametrize(("clusters", "spread"), [(12, 0.15), (40, 0.15), (150, 0.10)])
def test_intervals_cover_where_prompts_of_a_character_are_alike(clusters: int, spread: float) -> None:
    rng = np.random.default_rng(clusters)
    runs = 600
    covered = naive = 0
    for seed in range(runs):
        y, c = simulate(rng, clusters, spread, 20)
        low, high = cluster_bootstrap(y, c, draws=400, seed=seed)
        covered += low <= 0.58 <= high
        wide = wilson(y.mean(), y.size)
        naive += wide[0] <= 0.58 <= wide[1]
    assert 0.925 <= covered / runs <= 0.98, covered / runs
    assert naive / runs < 0.90, "prompts treated as independent cover far less: that is why whole characters are drawn"


@pytest.mark.parametrize("sizes", ["equal", "one far larger"])
@pytest.mark.parametrize("clusters", [2, 3, 4, 8, 12])
def test_few_characters_cover_too(clusters: int, sizes: str) -> None:
    """A percentile of resampled clusters stays between their means: of two characters it covered 58 %."""
    rng = np.random.default_rng(clusters)
    rows = np.full(clusters, 60)
    if sizes != "equal":
        rows[0] *= 4
    c = np.repeat(np.arange(clusters), rows)
    runs, covered, precise = 500, 0, 0
    for seed in range(runs):
        p = np.clip(rng.normal(0.5, 0.12, clusters), 0, 1)
        low, high = cluster_bootstrap((rng.random(c.size) < p[c]).astype(float), c, draws=400, seed=seed)
        covered += low <= 0.5 <= high
        precise += (high - low) / 2 <= 0.10
    assert 0.91 <= covered / runs <= 0.99, covered / runs
    if clusters <= 3:
        assert precise / runs < 0.3, "two or three characters seldom know a win-rate to ten points"


def test_a_large_evaluation_takes_no_time() -> None:
    """The draws are matrix products over characters: 200,000 prompts of 2,000 characters, in a bounded block."""
    rng = np.random.default_rng(0)
    y, c = rng.integers(0, 2, 200_000) * 1.0, rng.integers(0, 2000, 200_000)
    found = win_rate(y, c.tolist(), draws=2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 200_000**0.5, rel=0.15)
