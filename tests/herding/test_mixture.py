"""Mixture ratios hold within one row, the same rows come every time, and what can't be mixed is refused by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.herding import mixture
from flywheel_tasks.training.rows import Encoded
from tests.wide import ROWS, TEXT, wide

SOURCES = schemas.EXAMPLE_SOURCES


def examples(counts: dict[str, int]) -> pa.Table:
    rows = [
        {
            "example_id": f"{source}-{n}",
            "user": None,
            "source": source,
            "character_id": None,
            "locale": None,
            "messages": [],
        }
        for source, count in counts.items()
        for n in range(count)
    ]
    return pa.Table.from_pylist(rows, schemas.EXAMPLE)


def drawn(table: pa.Table, ratios: dict[str, float], rows: int | None, seed: int) -> pa.Table:
    return table.take(mixture.sample(table, ratios, rows, seed))


@given(st.lists(st.integers(1, 20), min_size=6, max_size=6), st.lists(st.integers(1, 300), min_size=6, max_size=6))
def test_every_source_is_within_one_row_of_its_share_and_none_is_repeated(weights: list[int], sizes: list[int]) -> None:
    ratios = {source: weight / sum(weights) for source, weight in zip(SOURCES, weights, strict=True)}
    counts = dict(zip(SOURCES, sizes, strict=True))
    taken = mixture.quotas(counts, ratios, None)
    total = sum(taken.values())
    assert all(abs(taken[source] - ratios[source] * total) < 1 for source in SOURCES)
    assert all(taken[source] <= counts[source] for source in SOURCES)
    short = [source for source in SOURCES if counts[source] < ratios[source] * (total + 2)]
    assert short, "a larger mixture without repeats was possible"


def test_the_same_seed_gives_the_same_rows_in_any_order_of_arrival() -> None:
    table = examples({"user_rjs": 50, "safety": 30})
    ratios = {"user_rjs": 0.75, "safety": 0.25}
    first = drawn(table, ratios, 40, seed=3)
    again = drawn(table.take(list(reversed(range(80)))), ratios, 40, seed=3)
    assert first["example_id"].to_pylist() == again["example_id"].to_pylist()
    assert Counter(first["source"].to_pylist()) == {"user_rjs": 30, "safety": 10}
    other = drawn(table, ratios, 40, seed=4)
    assert set(other["example_id"].to_pylist()) != set(first["example_id"].to_pylist())


@pytest.mark.parametrize(
    ("counts", "ratios", "rows", "error", "says"),
    [
        ({"user_rjs": 9}, {"user_rjs": 0.5, "safety": 0.5}, None, InputError, "'safety' has no rows"),
        ({"user_rjs": 9}, {"user_rjs": 0.9}, None, ConfigError, "sum to 0.9"),
        ({"user_rjs": 9}, {"user_rjs": 1.5, "safety": -0.5}, None, ConfigError, "ratio of 'safety' is -0.5"),
        ({"user_rjs": 9}, {"user_rsj": 1.0}, None, ConfigError, "'user_rsj' is no source"),
        ({"user_rjs": 9, "safety": 1}, {"user_rjs": 0.5, "safety": 0.5}, 8, InputError, "2 examples are the most"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    counts: dict[str, int], ratios: dict[str, float], rows: int | None, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        mixture.sample(examples(counts), ratios, rows, seed=1)


def test_a_source_of_ratio_zero_is_left_out() -> None:
    mixed = drawn(examples({"user_rjs": 5, "safety": 5}), {"user_rjs": 1.0, "safety": 0.0}, None, seed=1)
    assert Counter(mixed["source"].to_pylist()) == {"user_rjs": 5}


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(1, 400))
def test_a_mixture_has_exactly_the_rows_that_were_asked_for(weights: list[int], rows: int) -> None:
    ratios = {source: weight / sum(weights) for source, weight in zip(SOURCES, weights, strict=False)}
    assert sum(mixture.quotas(dict.fromkeys(ratios, 1000), ratios, rows).values()) == rows


def too_long(refused: set[str]) -> Callable[[pa.Table], Encoded]:
    """An encoder that refuses these ids."""

    def encode(table: pa.Table) -> Encoded:
        ids = table["example_id"].to_pylist()
        reject = [
            {"row_id": name, "reason": "too_long", "where": "examples", "user": None, "raw": None}
            for name in ids
            if name in refused
        ]
        kept = [(name, source) for name, source in zip(ids, table["source"].to_pylist(), strict=True)]
        kept = [one for one in kept if one[0] not in refused]
        body = pa.table({"row_id": [n for n, _ in kept], "source": [s for _, s in kept]}, schema=ENCODED)
        return Encoded(body, pa.Table.from_pylist(reject, schemas.QUARANTINE))

    return encode


ENCODED = pa.schema({"row_id": pa.string(), "source": pa.string()})


@given(st.lists(st.floats(0.1, 1), min_size=3, max_size=3), st.integers(0, 2**31), st.booleans())
def test_the_ratios_hold_for_the_rows_that_can_be_trained_on(chances: list[float], seed: int, sized: bool) -> None:
    sources = SOURCES[:3]
    table = examples(dict.fromkeys(sources, 60))
    rng = np.random.default_rng(seed)
    odds = dict(zip(sources, chances, strict=True))
    pick = zip(table["example_id"].to_pylist(), table["source"].to_pylist(), strict=True)
    refused = {name for name, source in pick if rng.random() > odds[source]}
    ratios = dict(zip(sources, (0.5, 0.3, 0.2), strict=True))
    left = Counter(name.rsplit("-", 1)[0] for name in table["example_id"].to_pylist() if name not in refused)
    assume(all(left[source] >= 2 for source in sources))
    rows = 4 if sized else None
    found, undrawn = mixture.encoded(table, ratios, rows, seed, too_long(refused))
    total = found.table.num_rows
    taken = Counter(found.table["source"].to_pylist())
    assert all(abs(taken[source] - ratios[source] * total) < 1 for source in sources)
    assert all(taken[source] <= left[source] for source in sources)
    assert total >= sum(mixture.quotas(left, ratios, rows).values())
    names = found.table["row_id"].to_pylist()
    assert len(set(names)) == total
    assert not refused & set(names)
    assert total + found.rejected.num_rows + int(undrawn.sum()) == table.num_rows


def test_a_source_whose_rows_are_all_refused_says_why() -> None:
    table = examples({"user_rjs": 4, "safety": 4})
    with pytest.raises(InputError, match=r"'safety' has no rows.*too_long \(4\)"):
        mixture.encoded(table, {"user_rjs": 0.5, "safety": 0.5}, None, 1, too_long({f"safety-{n}" for n in range(4)}))


def test_more_text_than_arrow_can_join_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "_PIECE", 1)
    table = wide(examples({"user_rjs": ROWS}), "messages")

    def encode(drawn: pa.Table) -> Encoded:
        turns = [chunk.flatten().field("content") for chunk in drawn["messages"].chunks]
        assert [pc.binary_length(one).to_pylist() for one in turns] == [[TEXT]] * drawn.num_rows
        return too_long({"user_rjs-3"})(drawn)

    found, left = mixture.encoded(table, {"user_rjs": 1.0}, 2, 1, encode)
    assert (found.table.num_rows, int(left.sum())) == (2, ROWS - 2 - found.rejected.num_rows)


@given(st.integers(1, 7), st.integers(0, 2**31))
def test_the_mixture_does_not_depend_on_the_chunks_of_its_table(size: int, seed: int) -> None:
    whole = examples({"user_rjs": 30, "safety": 20})
    pieces = pa.concat_tables([whole.slice(first, size) for first in range(0, 50, size)])
    refused = too_long({f"safety-{n}" for n in range(0, 20, 3)})
    (a, left), (b, same) = (
        mixture.encoded(table, {"user_rjs": 0.6, "safety": 0.4}, 20, seed, refused) for table in (whole, pieces)
    )
    assert a.table.equals(b.table)
    assert a.rejected.equals(b.rejected)
    assert (left == same).all()
