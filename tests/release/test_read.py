"""The readout against a slow reference, and the same bits whatever the files, batches, threads or parts."""

import datetime as dt
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import find
from flywheel_tasks.release.population import populate, read_log
from flywheel_tasks.release.read import read_out
from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.resolve import resolve_window
from flywheel_tasks.release.scan import Scan, scan
from flywheel_tasks.release.table import plain_text
from tests.release.worlds import (
    START,
    Rows,
    activity_table,
    at,
    day,
    reference,
    settings,
    strip,
    tweak,
    world,
    write,
)


@pytest.mark.parametrize("text", [False, True], ids=["integer ids", "string ids"])
@pytest.mark.parametrize("estimand", ["calendar_window", "days_since_exposure", "per_user_window"])
def test_parity_with_the_reference(tmp_path: Path, estimand: str, text: bool) -> None:
    exposures, activity = world(1, text=text)
    found = read_out_files(*write(tmp_path, exposures, activity, 3), settings(estimand=estimand))
    expected = reference(exposures, activity, estimand, last=13)
    assert found.status == "closed", found.problems
    assert {a: {m: tuple(e) for m, e in metrics.items()} for a, metrics in found.arms.items()} == {
        a: {m: (n, mean, pytest.approx(se2, rel=1e-14)) for m, (n, mean, se2) in metrics.items()}
        for a, metrics in expected.items()
    }
    assert estimand in plain_text(found)
    rows = found.rows
    where = ("rows used", "outside the window", "unit not exposed", "before exposure")
    left = sum(rows.get(key, 0) for key in (*where, "unit left out of the population", "after the unit's own window"))
    assert left == rows["activity rows"] == len(activity)


@pytest.mark.parametrize("estimand", ["calendar_window", "days_since_exposure"])
@pytest.mark.parametrize("days", [1, 3, 6])
def test_a_look_is_what_a_window_of_that_length_would_have_said(tmp_path: Path, estimand: str, days: int) -> None:
    files = write(tmp_path, *world(3))
    whole = read_out_files(*files, settings(estimand=estimand, start=day(0), days=7, as_of=day(7)))
    short = read_out_files(*files, settings(estimand=estimand, start=day(0), days=days, as_of=day(days)))
    for metric in ("breadth", "depth"):
        look = [found for found in whole.novelty if found.metric == metric][days - 1]
        (same,) = (found for found in short.comparisons if found.metric == metric)
        assert look.through.lift_pct == pytest.approx(same.lift.lift_pct, rel=1e-12)


def test_a_unit_first_exposed_on_day_5_had_two_observable_days(tmp_path: Path) -> None:
    """Days are counted from 0: a week has days 5 and 6 left."""
    exposures, activity = world(2, staggered=False)
    exposures.append((5, "test", at(5)))
    activity += [(5, day(5), 1), (5, day(6), 1)]
    files = write(tmp_path, exposures, activity)
    by_calendar = read_out_files(*files, settings()).arms["test"]["breadth"]
    since = read_out_files(*files, settings(estimand="days_since_exposure")).arms["test"]["breadth"]
    n = by_calendar.n
    assert by_calendar.mean is not None
    assert since.mean is not None
    assert since.mean - by_calendar.mean == pytest.approx((1 - 2 / 7) / n)


@pytest.mark.parametrize("text", [False, True], ids=["integer ids", "string ids"])
def test_the_same_bits_for_any_files_threads_and_parts(tmp_path: Path, text: bool) -> None:
    exposures, activity = world(3, text=text, pre=3)
    first = read_out_files(*write(tmp_path / "a", exposures, activity), settings(threads=1, pre_days=3))
    shuffled = write(tmp_path / "b", exposures[::-1], activity[::-1], 5)
    for options in ({"threads": 4}, {"partition_bits": 3}, {"threads": 2, "partition_bits": 1}):
        assert strip(read_out_files(*shuffled, settings(pre_days=3, **options))) == strip(first)


def test_the_same_matrix_for_any_batch_size(tmp_path: Path) -> None:
    exposures, activity = world(4)
    e, a = (find(g, "") for g in write(tmp_path, exposures, activity, 2))
    log = read_log(e, None)
    window = resolve_window(log, a, settings()).window
    population = populate(log, window, "UTC")
    one, many = (scan(a, Scan(population, window, batch_rows=n), threads=2) for n in (1 << 18, 13))
    assert (one.matrix == many.matrix).all()
    assert one.rows == many.rows


def test_sums_past_2_to_the_31_and_squares_past_2_to_the_63(tmp_path: Path) -> None:
    exposures, activity = world(6, units=60, staggered=False)
    activity = [(u, d, s + 10**9) for u, d, s in activity]
    found = read_out_files(*write(tmp_path, exposures, activity), settings())
    expected = reference(exposures, activity, "calendar_window")
    for arm in ("test", "control"):
        assert found.arms[arm]["depth"].mean == expected[arm]["depth"][1]
        assert found.arms[arm]["depth"].se2 == pytest.approx(expected[arm]["depth"][2], rel=1e-14)
    with pytest.raises(InputError, match="2\\^63"):
        read_out_files(*write(tmp_path / "b", exposures, [(u, d, 2**62) for u, d, _ in activity]), settings())


def test_depth_takes_the_variance_among_active_units(tmp_path: Path) -> None:
    """With half the units inactive, dividing by all of them would understate the squared error about twofold."""
    exposures = [(i, "test" if i % 2 else "control", at(0)) for i in range(400)]
    activity = [(i, day(d), 1 + (i * 7 + d) % 5) for i in range(0, 400) for d in range(7) if i % 4 < 2]
    found = read_out_files(*write(tmp_path, exposures, activity), settings(as_of=day(7))).arms["test"]
    assert found["depth"].n == 100
    assert found["active_share"].mean == 0.5
    assert found["depth"].se2 is not None
    assert found["depth"].se2 == pytest.approx(reference(exposures, activity, "calendar_window")["test"]["depth"][2])


def test_duplicate_exposures_and_units_in_both_arms_are_counted(tmp_path: Path) -> None:
    def change(e: Rows, a: Rows) -> tuple[Rows, Rows]:
        other = "control" if e[1][1] == "test" else "test"
        return [*e, (e[0][0], e[0][1], at(3)), (e[1][0], other, at(2))], a

    found = tweak(change, tmp_path)
    assert found.status == "closed"
    assert found.rows["duplicate rows of a unit in its arm"] == 1
    assert found.rows["units in two arms"] == 1
    assert found.rows["units"] == 399
    assert sum(a["breadth"].n for a in found.arms.values()) == 399


def test_too_many_units_in_both_arms_refuse_the_readout(tmp_path: Path) -> None:
    found = tweak(lambda e, a: ([*e, *((u, "test", at(1)) for u, _, _ in e[:100])], a), tmp_path)
    assert found.status == "refused"
    assert "two arms" in found.problems[0]


def test_a_broken_split_blocks_the_readout(tmp_path: Path) -> None:
    found = tweak(lambda e, a: ([x for i, x in enumerate(e) if x[1] == "test" or i % 2], a), tmp_path)
    assert found.status == "refused"
    assert "sample ratio" in found.problems[0]
    assert not found.comparisons
    assert [d.verdict for d in found.decisions] == ["hold"]


def test_resized_arms_of_which_no_unit_kept_its_place_are_refused(tmp_path: Path) -> None:
    """There is nobody left to check the split by, and an unchecked split gives no lift."""
    exposures, activity = (find(path, "") for path in write(tmp_path, *world(1, staggered=False)))
    kept = read_out(exposures, activity, settings(), {"test": 120, "control": 110})
    assert kept.status == "closed", kept.problems
    found = read_out(exposures, activity, settings(), {"test": 0, "control": 0})
    assert (found.status, found.sample_ratio, found.comparisons) == ("refused", None, [])
    assert "no unit kept its place" in found.problems[0]
    assert [decision.verdict for decision in found.decisions] == ["hold"]


def test_activity_before_exposure_does_not_count(tmp_path: Path) -> None:
    found = tweak(lambda e, a: ([(u, arm, at(2)) for u, arm, _ in e], a), tmp_path, days=7)
    early = [x for x in world(8, staggered=False)[1] if x[1] < day(2)]
    strangers = sum(x[0] >= 400 * 7919 - 10**6 for x in early)
    assert found.rows["before exposure"] == len(early) - strangers


def test_an_arm_without_an_active_unit_is_refused(tmp_path: Path) -> None:
    tested = {u for u, arm, _ in world(8, staggered=False)[0] if arm == "test"}
    found = tweak(lambda e, a: (e, [x for x in a if x[0] not in tested]), tmp_path)
    assert found.status == "refused"
    assert "arm 'test' has no active unit in the window" in found.problems


def test_a_look_counts_only_the_units_exposed_by_then(tmp_path: Path) -> None:
    """Units that enter on day 4 are no zeros of days 0 to 3."""
    exposures, activity = world(15, staggered=False)
    files = write(tmp_path / "early", exposures, activity)
    late = [(10**9 + i, ("test", "control")[i % 2], at(4)) for i in range(300)]
    more = activity + [(u, day(d), 1) for u, _, _ in late for d in range(4, 14)]
    with_late = write(tmp_path / "late", exposures + late, more)
    before, after = (read_out_files(*f, settings()).novelty for f in (files, with_late))
    for one, two in zip(before, after, strict=True):
        if one.day < str(day(4)):
            assert (two.z, two.through.lift_pct) == (one.z, one.through.lift_pct)


def test_negative_sends_are_refused_or_dropped(tmp_path: Path) -> None:
    def change(e: Rows, a: Rows) -> tuple[Rows, Rows]:
        return e, [*a, (a[0][0], day(1), -3)]

    with pytest.raises(InputError, match="negative sends"):
        tweak(change, tmp_path)
    dropped = tweak(change, tmp_path / "b", bad_rows="drop")
    assert dropped.rows["negative sends"] == 1
    clean = tweak(lambda e, a: (e, a), tmp_path / "c")
    assert dropped.arms == clean.arms
    assert tweak(change, tmp_path / "d", bad_rows="drop", partition_bits=2).rows == dropped.rows


@pytest.mark.parametrize("rows_a_group", [1, 37, 10_000])
@pytest.mark.parametrize("bits", [0, 2])
def test_rows_outside_the_window_are_not_looked_at(tmp_path: Path, rows_a_group: int, bits: int) -> None:
    """Whatever is wrong with them and however the file is cut; a row without a day is in no such place."""
    exposures, activity = world(8, units=120)
    e, a = write(tmp_path / "clean", exposures, activity)
    loose = settings(partition_bits=bits, as_of=day(7))
    clean = read_out_files(e, a, loose)
    outside = [(None, day(-3), 1), (exposures[0][0], day(20), -5), (exposures[1][0], day(9), None)]

    def with_rows(more: Rows) -> str:
        path = tmp_path / "dirty.parquet"
        pq.write_table(activity_table([*activity[:300], *more, *activity[300:]]), path, row_group_size=rows_a_group)
        return str(path)

    dirty = read_out_files(e, with_rows(outside), loose)
    assert dirty.rows.pop("outside the window") == clean.rows.pop("outside the window") + 3
    assert dirty.rows.pop("activity rows") == clean.rows.pop("activity rows") + 3
    assert strip(dirty) == strip(clean)
    for inside in ((exposures[0][0], day(2), -5), (exposures[0][0], None, 1)):
        with pytest.raises(InputError, match="1 rows with"):
            read_out_files(e, with_rows([*outside, inside]), loose)


@pytest.mark.parametrize(
    ("column", "kind", "said"),
    [
        ("sends", pa.float64(), "sends"),
        ("day", pa.string(), "day"),
        ("day", pa.timestamp("us"), "day"),
        ("unit_id", pa.float64(), "unit_id"),
        ("unit_id", pa.string(), "same type"),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(tmp_path: Path, column: str, kind: pa.DataType, said: str) -> None:
    exposures, activity = world(8)
    e, _ = write(tmp_path, exposures, activity)
    table = activity_table(activity)
    table = table.set_column(table.schema.get_field_index(column), column, table.column(column).cast(kind))
    pq.write_table(table, tmp_path / "wrong.parquet")
    with pytest.raises(InputError, match=said):
        read_out_files(e, str(tmp_path / "wrong.parquet"), settings())


def test_nulls_and_missing_columns_are_refused(tmp_path: Path) -> None:
    exposures, activity = world(8)
    e, a = write(tmp_path, exposures, activity)
    table = activity_table(activity)
    pq.write_table(table.drop_columns(["sends"]), tmp_path / "short.parquet")
    with pytest.raises(InputError, match="no column sends"):
        read_out_files(e, str(tmp_path / "short.parquet"), settings())
    holes = pc.if_else(pc.equal(table.column("sends"), 3), None, table.column("sends"))
    pq.write_table(table.set_column(2, "sends", holes), tmp_path / "holes.parquet")
    with pytest.raises(InputError, match="null"):
        read_out_files(e, str(tmp_path / "holes.parquet"), settings())
    with pytest.raises(InputError, match="no exposures file"):
        read_out_files(str(tmp_path / "nothing*"), a, settings())
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(InputError, match=r"text\.parquet"):
        read_out_files(e, str(tmp_path / "text.parquet"), settings())


def test_segments_warn_and_merge_to_the_whole(tmp_path: Path) -> None:
    exposures, activity = world(11, pre=3)
    locale = ["en" if e[2].hour % 3 else None for e in exposures]
    files = write(tmp_path, exposures, activity, 2, {"locale": locale})
    found = read_out_files(*files, settings(segments=("locale", "returning"), pre_days=3))
    assert {c.segment for c in found.segments} >= {"locale=en", "locale=(none)", "returning=returning"}
    assert any("false alarms" in w for w in found.warnings)
    for name in ("locale", "returning"):
        mine = [c for c in found.segments if c.metric == "breadth" and c.segment.startswith(name)]
        assert sum(c.test.n for c in mine) == found.arms["test"]["breadth"].n
    primary = [c for c in found.segments if c.p_holm is not None]
    assert all(c.p is not None and c.p_holm is not None and c.p_holm >= c.p for c in primary)
    plain = read_out_files(*files, settings(pre_days=3))
    assert found.arms == plain.arms


def test_cuped_uses_the_pre_period(tmp_path: Path) -> None:
    exposures, activity = world(12, pre=5, staggered=False)
    busy = {u for u, _, _ in exposures[::2]}
    activity = [(u, d, s + 20 * (u in busy)) for u, d, s in activity]
    found = read_out_files(*write(tmp_path, exposures, activity), settings(pre_days=5))
    sends = next(c for c in found.cuped if c.metric == "sends_per_exposed")
    assert sends.variance_kept < 0.5
    assert {c.metric for c in found.cuped} == {"breadth", "sends_per_exposed"}


def test_no_cuped_where_the_pre_period_has_a_hole(tmp_path: Path) -> None:
    exposures, activity = world(12, units=1000, pre=5, staggered=False)
    tested = {u for u, arm, _ in exposures if arm == "test"}
    holed = [x for x in activity if not (day(-4) <= x[1] <= day(-2) and x[0] in tested)]
    found = read_out_files(*write(tmp_path, exposures, holed), settings(pre_days=5))
    assert (found.status, found.cuped) == ("closed", [])
    assert [str(day(d)) in w for d, w in zip((-4, -3, -2), found.warnings[-3:], strict=True)] == [True] * 3
    whole = read_out_files(*write(tmp_path / "b", exposures, activity), settings(pre_days=5))
    assert len(whole.cuped) == 2
    assert found.comparisons == whole.comparisons


def test_novelty_ends_at_the_readout(tmp_path: Path) -> None:
    found = tweak(lambda e, a: (e, a), tmp_path)
    for metric in ("breadth", "depth"):
        looks = [x for x in found.novelty if x.metric == metric]
        assert [x.day for x in looks] == [str(day(d)) for d in range(7)]
        whole = next(c for c in found.comparisons if c.metric == metric)
        assert looks[-1].through.lift_pct == whole.lift.lift_pct
        assert looks[0].on_day == looks[0].through or metric == "breadth"
        assert all(a.boundary > b.boundary for a, b in pairwise(looks))


def test_the_clock_plays_no_part(tmp_path: Path) -> None:
    """The window and the as-of day come from config or data."""
    exposures, activity = world(13)
    e, a = (find(g, "") for g in write(tmp_path, exposures, activity))
    inferred = read_out(e, a, ReadoutConfig())
    assert inferred.window["first"] == str(START)
    assert any("start was not given" in w for w in inferred.warnings)
    assert read_out(e, a, settings(as_of=day(7))).status == "closed"
    assert read_out(e, a, settings(as_of=day(6))).status == "running"
    assert dt.date.fromisoformat(inferred.window["last"]) == day(6)


@pytest.mark.slow
def test_ray_data_gives_the_same_bits(tmp_path: Path) -> None:
    """Each task reads the units of one hash range; their exact sums are added."""
    exposures, activity = world(14, text=True, pre=2)
    files = write(tmp_path, exposures, activity, 3)
    alone = read_out_files(*files, settings(pre_days=2))
    spread = read_out_files(*files, settings(pre_days=2, partition_bits=2, workers=4))
    assert strip(spread) == strip(alone)
