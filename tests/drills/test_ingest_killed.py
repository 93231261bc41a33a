"""The real command on a real log, killed at arbitrary moments: the last run gives what an undisturbed one gives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flywheel_tasks.core import ids
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.simulation.bulk import write_benchmark_log
from tests.conftest import ROOT, USER_KEY
from tests.drills.fixtures import content

pytestmark = pytest.mark.slow
CYCLE = "2026-W47"
KILLS = 8


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    for part in range(3):
        write_benchmark_log(folder / f"part-{part}.jsonl.zst", 40_000, part)
    return folder


def start(folder: Path, logs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flywheel_tasks.cli", "run", "ingest", "--cycle", CYCLE, "--profile", "test"]
    command += ["--set", f"store.uri={folder}/store", "--set", f"ingest.logs={logs}/part-*"]
    environment = os.environ | {ids.USER_KEY_VARIABLE: USER_KEY, "FLYWHEEL_HOME": str(folder / "home")}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finished(folder: Path, logs: Path) -> Artifact:
    process = start(folder, logs)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return Store(f"{folder}/store").by_uri(out.strip().splitlines()[-1])


def test_killed_at_arbitrary_moments(tmp_path: Path, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "warming up", logs)
    began = time.monotonic()
    reference = finished(tmp_path / "undisturbed", logs)
    took = time.monotonic() - began
    moments, died = random.Random(5), []
    for turn in range(KILLS):
        process = start(tmp_path / "killed", logs)
        try:
            process.communicate(timeout=took * moments.uniform(turn, turn + 1) / (KILLS + 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=60)
        died.append(process.returncode)
        for artifact in Store(f"{tmp_path}/killed/store").artifacts():
            artifact.verify()
    survivor = finished(tmp_path / "killed", logs)
    with capsys.disabled():
        print(f"\n  ingest killed {died.count(-9)} times in {took:.1f} s of work, then finished with the same bytes")
    assert died.count(-9) >= 3
    assert survivor.manifest.key == reference.manifest.key
    assert survivor.manifest.digest == reference.manifest.digest
    assert content(survivor) == content(reference)


def test_a_polite_stop_leaves_nothing_behind(tmp_path: Path, logs: Path) -> None:
    process = start(tmp_path, logs)
    attempts = tmp_path / "store" / "artifacts" / "ingest"
    while not list(attempts.glob("*/*/*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert [p for p in attempts.rglob("*") if p.is_file()] == []
    assert finished(tmp_path, logs).verify() > 0
