"""Which exposure rows make the population, whatever else the log holds."""

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import find
from flywheel_tasks.release.population import microseconds, read_head, read_log
from flywheel_tasks.release.readout_cli import read_out_files
from tests.release.worlds import (
    exposure_table,
    settings,
    strip,
    world,
    write,
)


def test_times_of_several_zones_mean_their_instants(tmp_path: Path) -> None:
    """23:30 in New York on day 0 is day 1 in UTC; a file per zone, and one with offsets as text."""
    exposures, activity = world(9, staggered=False)
    _, a = write(tmp_path, exposures, activity)
    table = exposure_table(exposures)
    third = len(exposures) // 3
    for i, zone in enumerate(("America/New_York", "Asia/Kolkata")):
        part = table.slice(i * third, third)
        moved = part.column("exposed_at").cast(pa.timestamp("us", tz=zone))
        pq.write_table(part.set_column(3, "exposed_at", moved), tmp_path / f"zone-{i}.parquet")
    rest = table.slice(2 * third)
    text = pa.array([t.isoformat().replace("+00:00", "Z") for t in rest.column("exposed_at").to_pylist()])
    pq.write_table(rest.set_column(3, "exposed_at", text), tmp_path / "zone-2.parquet")
    whole = read_out_files(str(tmp_path / "exposures-*.parquet"), a, settings())
    assert read_out_files(str(tmp_path / "zone-*.parquet"), a, settings()).as_json() == whole.as_json()
    local = read_out_files(str(tmp_path / "exposures-*.parquet"), a, settings(time_zone="Pacific/Kiritimati"))
    assert local.rows["before exposure"] > 0

    naive = table.set_column(3, "exposed_at", table.column("exposed_at").cast(pa.timestamp("us")))
    pq.write_table(naive, tmp_path / "naive.parquet")
    with pytest.raises(InputError, match="no time zone"):
        read_out_files(str(tmp_path / "naive.parquet"), a, settings())
    assert read_out_files(str(tmp_path / "naive.parquet"), a, settings(naive_zone="UTC")).as_json() == whole.as_json()


def test_odd_times_follow_the_printed_rule(tmp_path: Path) -> None:
    """Nanoseconds are cut; a wall-clock time that comes twice or never is the earlier instant."""
    exposures, activity = world(9, staggered=False)
    _, a = write(tmp_path, exposures, activity)
    table = exposure_table(exposures)
    nano = pc.add(table.column("exposed_at").cast(pa.timestamp("ns", tz="UTC")).cast(pa.int64()), 999)
    pq.write_table(
        table.set_column(3, "exposed_at", nano.cast(pa.timestamp("ns", tz="UTC"))), tmp_path / "nano.parquet"
    )
    whole = read_out_files(str(tmp_path / "exposures-*.parquet"), a, settings())
    assert read_out_files(str(tmp_path / "nano.parquet"), a, settings()).as_json() == whole.as_json()
    assert any("clock change" in rule for rule in whole.rules)
    walls = pa.array([dt.datetime(2026, 10, 25, 2, 30), dt.datetime(2026, 3, 29, 2, 30)])
    found = [dt.datetime.fromtimestamp(t / 1e6, dt.UTC) for t in microseconds(walls, "", "Europe/Paris").tolist()]
    assert found[0] == dt.datetime(2026, 10, 25, 0, 30, tzinfo=dt.UTC)
    assert found[1].replace(microsecond=0) == dt.datetime(2026, 3, 29, 0, 59, 59, tzinfo=dt.UTC)


def test_several_experiments_and_unknown_arms(tmp_path: Path) -> None:
    exposures, activity = world(10)
    e, a = write(tmp_path, exposures, activity)
    other = exposure_table(exposures).set_column(0, "experiment", pa.array(["y"] * len(exposures)))
    pq.write_table(other, tmp_path / "exposures-9.parquet")
    with pytest.raises(InputError, match="2 experiments"):
        read_out_files(e, a, settings())
    assert read_out_files(e, a, settings(experiment="y")).rows["of another experiment"] == len(exposures)
    with pytest.raises(InputError, match="control arm 'base'"):
        read_out_files(e, a, settings(experiment="y", control="base"))


def test_arms_of_another_experiment_are_not_missed(tmp_path: Path) -> None:
    """A cumulative log holds arms that the experiment never had; a dictionary may hold arms that nobody had."""
    exposures, activity = world(10)
    e, a = write(tmp_path, exposures, activity)
    alone = read_out_files(e, a, settings(experiment="x"))
    other = [(u, {"test": "treatment"}.get(arm, arm), t) for u, arm, t in exposures]
    table = exposure_table(other).set_column(0, "experiment", pa.array(["y"] * len(exposures)))
    names = pa.array(["unused", "treatment", "control"])
    codes = pc.index_in(table.column("arm"), names).combine_chunks()
    pq.write_table(
        table.set_column(2, "arm", pa.DictionaryArray.from_arrays(codes, names)), tmp_path / "exposures-9.parquet"
    )
    for bits in (0, 2):
        for name, arms in (("x", {"test", "control"}), ("y", {"treatment", "control"})):
            found = read_out_files(e, a, settings(experiment=name, partition_bits=bits))
            assert found.status == "closed", found.problems
            assert set(found.arms) == arms
        assert read_out_files(e, a, settings(experiment="x", partition_bits=bits)).arms == alone.arms


def test_ids_of_any_length_keep_their_part(tmp_path: Path) -> None:
    """A batch of short ids and one of long ones must agree on where each id belongs."""
    exposures, activity = world(16, text=True)
    long = {u: u + "x" * (30 * (i % 3)) for i, (u, _, _) in enumerate(exposures)}
    exposures = sorted(((long[u], arm, t) for u, arm, t in exposures), key=lambda row: len(row[0]))
    activity = [(long.get(u, u), d, s) for u, d, s in activity]
    e, a = write(tmp_path, exposures, activity)
    for i in range(3):
        pq.write_table(exposure_table(exposures[i * 133 : (i + 1) * 133 + (i == 2)]), tmp_path / f"part-{i}.parquet")
    whole = read_out_files(e, a, settings())
    assert strip(read_out_files(str(tmp_path / "part-*.parquet"), a, settings(partition_bits=3))) == strip(whole)


def test_a_part_holds_only_its_own_units(tmp_path: Path) -> None:
    exposures, activity = world(17, text=True)
    e, _ = (find(g, "") for g in write(tmp_path, exposures, activity, 2))
    head = read_head(e, None)
    assert (len(head.at), head.arms, head.width) == (0, read_log(e, None).arms, read_log(e, None).width)
    sizes = [len(read_log(e, "x", part=(n, 2), width=head.width).at) for n in range(4)]
    assert sum(sizes) == len(exposures)
    assert max(sizes) < len(exposures) / 2


def test_workers_without_parts_are_refused() -> None:
    with pytest.raises(ValidationError, match="partition_bits"):
        settings(workers=4)
