"""Eight processes commit the same artifact at the same instant: one wins, the others say so and use the winner's."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.store import Store
from tests.drills import worker

WRITERS = 8


def race(store_uri: str, gate: str, serial: int) -> Counter[str]:
    barrier, outcomes = worker.SPAWN.Barrier(WRITERS), worker.SPAWN.Queue()
    settings = {"serial": serial, "signed": 1}
    contenders = [worker.start(worker.race, barrier, gate, outcomes, store_uri, settings) for _ in range(WRITERS)]
    results = [outcomes.get(timeout=120) for _ in contenders]
    assert [worker.ended(process) for process in contenders] == [0] * WRITERS
    winners = [pid for pid, outcome, _, _ in results if outcome == "made"]
    assert len(winners) == 1, results
    assert {(attempt, who) for _, _, attempt, who in results} == {(results[0][2], f"process {winners[0]}")}
    store = Store(store_uri)
    artifact = store.get(
        "drill-first", next(a.manifest.key for a in store.artifacts() if a.manifest.config["serial"] == serial)
    )
    assert artifact.verify() == 7
    assert artifact.file("model", "model.safetensors").endswith(f"process {winners[0]}".encode()), "no mixture"
    left = {info.base_name for info in store.storage.list(artifact.manifest.folder)}
    assert left == {"manifest.json", artifact.manifest.attempt}, "losers remove their own files"
    return Counter(outcome for _, outcome, _, _ in results)


@pytest.mark.parametrize("gate", ["commit artifacts", "link manifest"])
def test_eight_writers_one_winner(tmp_path: Path, gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    total: Counter[str] = Counter()
    for serial in range(4):
        total += race(str(tmp_path / "store"), gate, serial)
    with capsys.disabled():
        print(f"\n  {WRITERS} writers at '{gate}', 4 rounds: {dict(total)}")
    assert total == {"made": 4, "lost": 4 * (WRITERS - 1)}


def test_of_many_replacements_of_the_same_bytes_one_succeeds(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("count", b"0")
    for number in range(5):
        with ThreadPoolExecutor(WRITERS) as pool:
            old, new = str(number).encode(), str(number + 1).encode()
            done = list(pool.map(lambda _, o=old, n=new: storage.replace("count", o, n), range(WRITERS)))
        assert sum(done) == 1
        assert storage.read("count") == new
    assert not storage.replace("absent", b"", b"x")
    assert storage.read("absent") is None
