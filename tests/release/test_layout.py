"""A layout is faster and nothing else: the same checks, the same bits, and never a mix of two."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.layout import write_layout
from flywheel_tasks.release.parts import find
from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.release.readout_config import ReadoutConfig
from tests.release.worlds import START, at, day, world, write

Files = tuple[str, str]


def settings(**more: Any) -> ReadoutConfig:
    return ReadoutConfig(**({"start": START, "as_of": day(14)} | more))


def lay(files: Files, folder: Path, config: ReadoutConfig) -> Files:
    write_layout(*(find(f, "") for f in files), config, folder)
    return str(folder / "units.parquet"), str(folder / "activity-*.parquet")


def test_a_layout_gives_the_same_bits(tmp_path: Path) -> None:
    exposures, activity = world(5, pre=2)
    other = "control" if exposures[1][1] == "test" else "test"
    exposures += [(exposures[0][0], exposures[0][1], at(4)), (exposures[1][0], other, at(4)), (10**9, other, at(12))]
    files = write(tmp_path, exposures, activity)
    config = settings(pre_days=2)
    layout = lay(files, tmp_path / "layout", config)
    raw = read_out_files(*files, config).as_json()
    ours = ("activity rows", "outside the window", "unit not exposed", "before exposure", "pre-period after exposure")
    ours = (*ours, "rows used", "unit left out of the population")
    for more in ({}, {"partition_bits": 2}, {"threads": 3}, {"as_of": None}):
        dense = read_out_files(*layout, settings(pre_days=2, **more)).as_json()
        rows, expected = dense.pop("rows"), {k: n for k, n in raw["rows"].items() if k not in ours}
        assert {k: n for k, n in rows.items() if k not in ours} == expected
        assert expected["units in two arms"] == expected["duplicate rows of a unit in its arm"] == 1
        notes = dense.pop("warnings")
        assert [w for w in notes if "as_of" not in w] == raw["warnings"]
        assert dense == {k: v for k, v in raw.items() if k not in ("rows", "warnings")}


def test_units_in_two_arms_refuse_the_layout_and_the_readout_over_it(tmp_path: Path) -> None:
    exposures, activity = world(5, staggered=False)
    exposures += [(u, "control" if arm == "test" else "test", at(1)) for u, arm, _ in exposures[:60]]
    files = write(tmp_path, exposures, activity)
    with pytest.raises(InputError, match="60 units were seen in two arms"):
        lay(files, tmp_path / "layout", settings())
    assert not (tmp_path / "layout").exists()
    layout = lay(files, tmp_path / "layout", settings(max_crossed=0.5))
    found = read_out_files(*layout, settings())
    assert found.status == "refused"
    assert found.problems == read_out_files(*files, settings()).problems


def test_a_layout_is_read_with_its_own_units_only(tmp_path: Path) -> None:
    """The units of another log, however many, are not the ones that the numbers mean."""
    exposures, activity = world(5, staggered=False)
    files = write(tmp_path / "raw", exposures, activity)
    units, days = lay(files, tmp_path / "one", settings())
    with pytest.raises(InputError, match="not of one layout"):
        read_out_files(files[0], days, settings())
    later = write(tmp_path / "later", exposures, [(u, d, s + 1) for u, d, s in activity])
    other_units, other_days = lay(later, tmp_path / "two", settings())
    with pytest.raises(InputError, match="not of one layout"):
        read_out_files(other_units, days, settings())
    shutil.copy(tmp_path / "two" / f"activity-{day(3)}.parquet", tmp_path / "one")
    with pytest.raises(InputError, match="not of one layout"):
        read_out_files(units, days, settings())
    with pytest.raises(InputError, match="raw activity"):
        read_out_files(other_units, [other_days, files[1]], settings())
    with pytest.raises(InputError, match="twice"):
        read_out_files(other_units, [other_days, str(tmp_path / "two" / f"activity-{day(3)}.parquet")], settings())


def test_a_layout_holds_one_window(tmp_path: Path) -> None:
    layout = lay(write(tmp_path, *world(5, pre=3)), tmp_path / "layout", settings(pre_days=1))
    for other in ({"days": 5}, {"start": day(1)}, {"pre_days": 3}, {"time_zone": "Asia/Kolkata"}):
        with pytest.raises(InputError, match="the layout holds 7 days"):
            read_out_files(*layout, settings(**other))
    assert read_out_files(*layout, settings()).status == "closed"


def test_a_new_layout_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    files = write(tmp_path / "raw", *world(5))
    lay(files, tmp_path / "layout", settings(days=9))
    layout = lay(files, tmp_path / "layout", settings())
    assert len(find(layout[1], "")) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layout", "raw"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match=r"notes\.txt"):
        lay(files, tmp_path / "mine", settings())
    assert (tmp_path / "mine" / "notes.txt").exists()
