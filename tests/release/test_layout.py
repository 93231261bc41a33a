"""A layout is faster and nothing else: the same checks, the same bits, and never a mix of two."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
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


ROWS_OF_ACTIVITY = ("activity rows", "outside the window", "unit not exposed", "before exposure", "rows used")
ROWS_OF_ACTIVITY += ("pre-period after exposure", "unit left out of the population", "after the unit's own window")
ROWS_OF_ACTIVITY += ("on a day declared missing",)
WINDOWS: tuple[dict[str, Any], ...] = (
    {}, {"pre_days": 2}, {"days": 5}, {"start": day(1)}, {"time_zone": "Asia/Kolkata"}, {"segments": ["locale"]},
    {"estimand": "days_since_exposure"}, {"estimand": "per_user_window"}, {"as_of": None, "start": None},
    {"pre_days": 3, "segments": ["locale", "returning"], "partition_bits": 2}, {"missing_days": [day(2)], "threads": 3},
)  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Files]:
    """Raw files with a duplicate, a crossed, a late and two tied units, and their layout in blocks of 64 units."""
    folder = tmp_path_factory.mktemp("both")
    exposures, activity = world(5, pre=4)
    other = "control" if exposures[1][1] == "test" else "test"
    exposures += [(exposures[0][0], exposures[0][1], at(4)), (exposures[1][0], other, at(4)), (10**9, other, at(12))]
    extra = {"locale": ["de" if e[0] % 3 else "pt" for e in exposures]}
    extra["email"] = [f"{e[0]}@example.org" for e in exposures]
    for at_once in (2, 3):
        # The same instant in three places: each comes first in one order of the files.
        exposures += [exposures[at_once]] * 2
        extra["locale"] += ["ar", None]
        extra["email"] += ["a@example.org", None]
    files = write(folder, exposures, activity, files=3, extra=extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flywheel_tasks.release.layout.UNIT_BLOCK", 64)
        return files, lay(files, folder / "layout", settings(segments=["locale"]))


@pytest.mark.parametrize("more", WINDOWS, ids=str)
def test_one_layout_gives_the_same_bits_for_every_window(
    both: tuple[Files, Files], more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, layout = both
    monkeypatch.setattr("flywheel_tasks.release.sums.UNIT_BLOCK", 64)
    raw, dense = (read_out_files(*f, settings(**more)).as_json() for f in (files, layout))
    assert raw["status"] == dense["status"] == "closed"
    rows, expected = ({k: n for k, n in r.pop("rows").items() if k not in ROWS_OF_ACTIVITY} for r in (dense, raw))
    assert rows == expected
    assert (rows["units in two arms"], rows["duplicate rows of a unit in its arm"]) == (1, 5)
    assert dense == raw


def test_a_layout_names_nobody(both: tuple[Files, Files]) -> None:
    units, days = both[1]
    assert set(pq.read_schema(units).names) == {"experiment", "arm", "exposed_at", "locale"}, "an e-mail least of all"
    groups = [pq.ParquetFile(p.path).metadata for p in find(days, "")]
    assert all(g.num_row_groups == -(-pq.read_metadata(units).num_rows // 64) for g in groups)


def test_tied_exposures_are_in_one_segment_whatever_comes_first(tmp_path: Path) -> None:
    """One instant, two locales and two countries: each column for itself takes the first by name, so that a split by
    one says the same with and without the other."""
    exposures, activity = world(5, staggered=False)
    twice = [*exposures, *exposures[:40]]
    extra = {"locale": ["pt"] * 400 + ["de"] * 40, "country": ["AT"] * 400 + ["BR"] * 40}
    found = []
    for turn in (1, -1):
        folder = tmp_path / f"turn{turn}"
        files = write(folder, twice[::turn], activity, 2, {name: cells[::turn] for name, cells in extra.items()})
        layout = lay(files, folder / "layout", settings(segments=["country", "locale"]))
        for given in (files, layout):
            for more in ({}, {"partition_bits": 2}):
                result = read_out_files(*given, settings(segments=["locale"], **more)).as_json()
                found.append({name: part for name, part in result.items() if name != "rows"})
    assert all(each == found[0] for each in found)
    sizes = {c["segment"]: c["test"]["n"] + c["control"]["n"] for c in found[0]["segments"] if c["metric"] == "breadth"}
    assert sizes == {"locale=de": 40, "locale=pt": 360}
    assert any("first value by name" in rule for rule in found[0]["rules"])


def test_a_layout_without_the_column_says_so(both: tuple[Files, Files]) -> None:
    with pytest.raises(InputError, match="no column email"):
        read_out_files(*both[1], settings(segments=["email"]))


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


def test_a_new_layout_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    files = write(tmp_path / "raw", *world(5))
    lay(write(tmp_path / "longer", *world(5, pre=2)), tmp_path / "layout", settings())
    layout = lay(files, tmp_path / "layout", settings())
    assert len(find(layout[1], "")) == 14
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layout", "longer", "raw"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(InputError, match=r"notes\.txt"):
        lay(files, tmp_path / "mine", settings())
    assert (tmp_path / "mine" / "notes.txt").exists()
