"""A full disk: one clear line, nothing half-committed, and the same artifact once there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.store import Store
from tests.conftest import ROOT
from tests.drills import worker
from tests.drills.fixtures import content

KIB = 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A 2 MiB file system of its own; needs root, or a user namespace to be root in."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small tmpfs can only be mounted by root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,nr_inodes=500", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def leave(folder: Path, bytes_: int) -> None:
    """Fill the disk until only `bytes_` are free."""
    (folder / "filler").unlink(missing_ok=True)
    (folder / "filler").write_bytes(bytes(max(0, free(folder) - bytes_)))


def test_full_at_every_size_of_the_rest(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(small_disk / "store"))
    before = worker.run("first", store.uri, serial=0).artifact
    expected = content(before)
    need = sum(len(data) for data in expected.values())
    errors: dict[str, int] = {}
    serial, room = 1, 0
    while True:
        leave(small_disk, room)
        committed = {a.manifest.key for a in store.artifacts()}
        try:
            worker.run("first", store.uri, serial=serial)
            break
        except FlywheelError as error:
            text = str(error)
        assert "\n" not in text
        assert "no space left" in text
        assert "free some" in text
        errors[text.split(":")[1].strip().split("/")[0]] = errors.get(text.split(":")[1].strip().split("/")[0], 0) + 1
        now = {a.manifest.key: a for a in store.artifacts()}
        assert set(now) - committed <= {store_key(store, serial)}
        assert all(artifact.verify() == 7 for artifact in now.values())
        room += 4 * KIB
        assert room < 20 * need
    (small_disk / "filler").unlink()
    for again in range(serial + 1):
        assert content(worker.run("first", store.uri, serial=again).artifact) == expected
    with capsys.disabled():
        print(f"\n  full with {room // 4 // KIB} amounts of room (0 to {room // KIB} KiB): one clear line each time")
    assert room >= 8 * KIB


def store_key(store: Store, serial: int) -> str:
    """The key of an artifact that was committed although a later, smaller write (the pointer) found no room."""
    return next((a.manifest.key for a in store.artifacts() if a.manifest.config["serial"] == serial), "")


def test_out_of_inodes(small_disk: Path) -> None:
    store = Store(str(small_disk / "store"))
    worker.run("first", store.uri, serial=0)
    junk = small_disk / "junk"
    junk.mkdir()
    made = 0
    try:
        while True:
            (junk / str(made)).touch()
            made += 1
    except OSError:
        pass  # the state wanted: no inode is left
    with pytest.raises(FlywheelError, match="no space left"):
        worker.run("first", store.uri, serial=1)
    assert [a.verify() for a in store.artifacts()] == [7]


LIMITED = """
import resource, signal, sys
from tests.drills import worker
from flywheel_tasks.core.errors import FlywheelError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    worker.run("first", sys.argv[1], serial=1)
except FlywheelError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("limit", [100, 900, 1500])
def test_a_file_size_limit_is_one_clear_line(tmp_path: Path, limit: int) -> None:
    """Works without root: the kernel refuses the write that passes the limit."""
    store = Store(str(tmp_path / "store"))
    expected = content(worker.run("first", store.uri, serial=0).artifact)
    command = [sys.executable, "-c", LIMITED, store.uri, str(limit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout.count("\n") == 1
    assert "larger than this system allows" in ended.stdout
    assert [a.verify() for a in store.artifacts()] == [7]
    folders = store.storage.list("artifacts/drill-first")
    assert sum(len(store.storage.list(store.storage.relative(folder))) for folder in folders) == 2, (
        "nothing is left over"
    )
    assert content(worker.run("first", store.uri, serial=1).artifact) == expected


def test_scratch_over_the_limit_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "store"), "3000"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout.count("\n") == 1
