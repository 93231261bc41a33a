"""Every row is written once, to the bucket of its unit, and the buckets together are the whole."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flywheel_tasks.release import read, shuffle
from flywheel_tasks.release.parts import find
from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.release.units import hashed, id_words
from flywheel_tasks.release.window import Window, day_number
from tests.release.worlds import START, day, settings, strip, world, write

BITS = 3
WEEK = Window(day_number(START), 7, day_number(day(6)), 0, "calendar_window")


@pytest.mark.parametrize("text", [False, True], ids=["integers", "strings"])
def test_rows_go_to_their_bucket_once(tmp_path: Path, text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "PIECE_ROWS", 700)
    _, rows = world(4, text=text)
    _, activity = write(tmp_path, [], rows, files=3)
    store, width = f"file://{tmp_path}/buckets", 3 if text else 1
    work = shuffle.shares(
        find(activity, ""), "a", shuffle.ACTIVITY, store, bits=BITS, width=width, window=WEEK, bad_rows="refuse"
    )
    buckets, left_out = shuffle.gather([shuffle.split(share) for share in work], store, BITS)
    found: Counter[Any] = Counter()
    for number, parts in enumerate(buckets):
        for part in parts:
            table = part.open().read_row_group(part.only)
            assert (hashed(id_words(table["unit_id"], width)) >> np.uint64(64 - BITS) == number).all()
            found.update(tuple(row.values()) for row in table.to_pylist())
    inside = Counter(row for row in rows if day(0) <= row[1] <= day(6))
    assert found == inside
    assert left_out["activity rows"] == left_out["outside the window"] == len(rows) - inside.total()


def test_a_bucketed_readout_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(tmp_path, *world(4, pre=2), files=2)
    whole = read_out_files(*files, settings(pre_days=2))
    opened: Counter[str] = Counter()
    written: Counter[str] = Counter()
    folders: set[str] = set()
    once = shuffle.split

    def split(share: shuffle.Share) -> str:
        found = once(share)
        opened[share.part.path] += 1
        folders.add(share.store)
        for path, _ in json.loads(found)[0]:
            kind = path.partition("-")[0]
            written[kind] += pq.read_metadata(f"{share.store.removeprefix('file://')}/{path}").num_rows
        return found

    monkeypatch.setattr(read.shuffle, "split", split)
    parted = read_out_files(*files, settings(pre_days=2, partition_bits=5, scratch=f"file://{tmp_path}/scratch"))
    assert strip(parted) == strip(whole)
    assert set(opened.values()) == {1}
    assert len(opened) == 4
    assert written["activity"] == whole.rows["activity rows"] - whole.rows["outside the window"]

    scratch = tmp_path / "scratch"
    assert not list(scratch.iterdir()), "units by name do not stay behind"
    read_out_files(*files, settings(partition_bits=1, scratch=f"file://{scratch}"))
    assert len(folders) == 2, "each run has a folder of its own"
    assert all(Path(folder.removeprefix("file://")).parent == scratch for folder in folders)
    bad = write(tmp_path / "bad", *world(4, pre=2))
    monkeypatch.setattr(read, "read_bucket", lambda bucket: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_out_files(*bad, settings(partition_bits=1, scratch=f"file://{scratch}"))
    assert not list(scratch.iterdir())


def test_buckets_without_a_unit_or_without_activity(tmp_path: Path) -> None:
    """Six units in 256 buckets; strangers, who are in other buckets, are still counted."""
    exposures, activity = world(4, units=400, staggered=False)
    few = {e[0] for e in exposures[:6]}
    files = write(tmp_path, [e for e in exposures if e[0] in few], activity)
    loose = {"max_crossed": 1.0, "srm_p": 1e-9}
    for more in ({}, {"missing_days": [day(2)]}, {"estimand": "per_user_window"}, {"pre_days": 1}):
        alone, parted = (settings(partition_bits=bits, **loose, **more) for bits in (0, 8))
        assert strip(read_out_files(*files, parted)) == strip(read_out_files(*files, alone)), more
