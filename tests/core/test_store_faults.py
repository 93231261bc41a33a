"""A stage killed at every step at which the store writes: nobody sees half of it, and a re-run gives the same bytes."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import pytest

from flywheel_tasks.core.store import Store
from tests.drills import worker
from tests.drills.fixtures import content
from tests.drills.stages import CYCLE


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    uri = str(tmp_path_factory.mktemp("reference"))
    artifact = worker.run("first", uri).artifact
    return artifact.manifest.digest, content(artifact)


def steps_of(stage: str, store_uri: str, serial: int, die_at: int = 0) -> tuple[int, list[str]]:
    """Run the stage in a process of its own that dies before its n-th step; its exit code and the steps it reached."""
    receive, send = worker.SPAWN.Pipe(duplex=False)
    process = worker.start(worker.killed_at, die_at, send, stage, store_uri, {"serial": serial})
    send.close()
    steps: list[str] = []
    with contextlib.suppress(EOFError):
        while True:
            steps.append(receive.recv())
    return worker.ended(process), steps


def kill_everywhere(stage: str, store_uri: str, write_stride: int = 1) -> Counter[str]:
    """Learn the steps of a whole run, then kill one run at each of them and run it again.

    Of the many writes of a file's bytes only every `write_stride`-th may be tried; every other step always is.
    """
    if stage == "second":
        worker.run("first", store_uri, serial=0)
    code, steps = steps_of(stage, store_uri, serial=0)
    assert code == 0
    killed: Counter[str] = Counter()
    for nth, step in enumerate(steps, 1):
        if step.startswith("write") and nth % write_stride:
            continue
        if stage == "second":
            worker.run("first", store_uri, serial=nth)
        code, reached = steps_of(stage, store_uri, nth, die_at=nth)
        assert code == -9, f"the run died of {code}, not of the kill"
        assert len(reached) == nth
        killed[step.split()[0]] += 1
        worker.run(stage, store_uri, serial=nth)
    return killed


def test_killed_at_every_step_a_rerun_gives_the_same_bytes(
    tmp_path: Path, reference: tuple[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "store")
    stop, findings = worker.SPAWN.Event(), worker.SPAWN.Queue()
    reader = worker.start(worker.read_forever, uri, stop, findings)
    killed = kill_everywhere("first", uri)
    stop.set()
    reads, rounds, problems = findings.get(timeout=60)
    assert worker.ended(reader) == 0
    store, digest, expected = Store(uri), *reference
    artifacts = list(store.artifacts())
    orphans = 0
    for artifact in artifacts:
        assert artifact.manifest.digest == digest
        assert content(artifact) == expected
        folders = {info.base_name for info in store.storage.list(artifact.manifest.folder)}
        assert {"manifest.json", artifact.manifest.attempt} <= folders
        orphans += len(folders) - 2
    with capsys.disabled():
        print(
            f"\n  killed {killed.total()} runs, at every step once: {dict(killed)}"
            f"\n  {len(artifacts)} artifacts, all equal; {orphans} invisible leftovers"
            f"\n  a reader verified {reads} artifacts in {rounds} rounds, {len(problems)} torn"
        )
    assert not problems
    assert reads > 0
    assert killed.total() >= 20
    assert {"create", "write", "fsync", "commit", "link", "put", "rename"} <= set(killed)
    assert len(artifacts) == killed.total() + 1
    pointed = store.pointed(CYCLE, "drill-first")
    assert pointed is not None
    assert pointed.manifest.config["serial"] > 20


def test_a_killed_reader_of_an_artifact_leaves_it_whole(
    tmp_path: Path, reference: tuple[str, dict[str, bytes]]
) -> None:
    """The second stage, which reads the first: same kills, and the input is untouched by all of them."""
    uri = str(tmp_path / "store")
    killed = kill_everywhere("second", uri)
    assert killed.total() >= 8
    digests = Counter((a.manifest.stage, a.manifest.digest) for a in Store(uri).artifacts())
    assert digests["drill-first", reference[0]] == killed.total() + 1
    assert len(digests) == 2, "every re-run of the second stage gave the same content"


def test_killed_in_the_middle_of_every_write(tmp_path: Path, reference: tuple[str, dict[str, bytes]]) -> None:
    uri, killed = str(tmp_path / "store"), 0
    store = Store(uri)
    while True:
        settings = {"serial": killed}
        code = worker.ended(worker.start(worker.torn_at, killed + 1, "first", uri, settings))
        if code == 0:
            break
        assert code == -9
        assert len(list(store.artifacts())) == killed, "half a write must not become an artifact"
        artifact = worker.run("first", uri, **settings).artifact
        assert content(artifact) == reference[1]
        killed += 1
    assert killed >= 10


def test_the_pointer_survives_a_kill_between_commit_and_pointer(tmp_path: Path) -> None:
    """The artifact is there but the cycle does not name it yet: the re-run finds it and only points."""
    uri = str(tmp_path / "store")
    _, steps = steps_of("first", uri, serial=1)
    at = next(n for n, step in enumerate(steps, 1) if step.startswith(f"put cycles/{CYCLE}"))
    assert steps_of("first", uri, 2, die_at=at)[0] == -9
    store = Store(uri)
    before = store.pointed(CYCLE, "drill-first")
    assert before is not None
    assert before.manifest.config["serial"] == 1
    again = worker.run("first", uri, serial=2)
    assert again.outcome == "cached"
    after = store.pointed(CYCLE, "drill-first")
    assert after is not None
    assert after.manifest.attempt == again.artifact.manifest.attempt != before.manifest.attempt
