"""Runs a drill stage in a process of its own that can be killed at any step the store takes.

Processes come from a fork server that has the imports done, so that hundreds of them are cheap.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import pyarrow as pa

from flywheel_tasks.core import forget, runner, storage
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.store import Store
from tests.drills import stages

# The first conversion of a Python list makes pyarrow look for pandas, which takes a second: do it once, in the server.
pa.array(["warm"])
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.drills.worker"])


class NoTracker:
    """Tracking has drills of its own; here it would only add seconds to each of hundreds of runs."""

    def __init__(self, uri: str, store: storage.Storage) -> None:
        self.watch = lambda record: nullcontext()


def run(stage: str, store_uri: str, **settings: int | str) -> runner.Result:
    declared = {"first": stages.FIRST, "second": stages.SECOND}[stage]
    config = stages.config_for(store_uri, **({"rows": 80} | settings))
    with mock.patch.object(runner, "Tracker", NoTracker):
        return runner.run_stage(declared, stages.CYCLE, config, Store(config.store.uri))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed_at(nth: int, steps: Any, stage: str, store_uri: str, settings: dict[str, int]) -> None:
    """Run, and die just before the n-th step (counted from 1); `steps` takes the name of each step as it is reached."""
    seen = 0

    def point(step: str) -> None:
        nonlocal seen
        seen += 1
        steps.send(step)
        if seen == nth:
            die()

    storage.fault_point = point
    run(stage, store_uri, **settings)


def forget_killed_at(nth: int, store_uri: str, user: str, secret: bytes) -> None:
    """Forget a user, and die just before the n-th step."""
    seen = 0

    def point(step: str) -> None:
        nonlocal seen
        seen += 1
        if seen == nth:
            die()

    storage.fault_point = point
    forget.forget(Store(store_uri), user, secret)


def torn_at(nth: int, stage: str, store_uri: str, settings: dict[str, int]) -> None:
    """Run, and die in the middle of the n-th write: half of its bytes reach the file."""
    whole, seen = storage.HashingFile.write, 0

    def write(self: storage.HashingFile, data: Any) -> int:
        nonlocal seen
        seen += 1
        if seen == nth:
            self._raw.write(memoryview(data)[: memoryview(data).nbytes // 2])
            self._raw.flush()
            die()
        return whole(self, data)

    storage.HashingFile.write = write  # type: ignore[method-assign]
    run(stage, store_uri, **settings)


def race(barrier: Any, gate: str, outcomes: Any, store_uri: str, settings: dict[str, int]) -> None:
    """Run, and wait at the first step that starts with `gate` until all contenders are there."""
    waited = False

    def point(step: str) -> None:
        nonlocal waited
        if step.startswith(gate) and not waited:
            waited = True
            barrier.wait(60)

    storage.fault_point = point
    result = run("first", store_uri, **settings)
    outcomes.put((os.getpid(), result.outcome, result.artifact.manifest.attempt, result.artifact.json("report")["who"]))


def read_forever(store_uri: str, stop: Any, findings: Any) -> None:
    """List and verify every artifact over and over; anything but whole artifacts is a finding."""
    store, reads, rounds = Store(store_uri), 0, 0
    problems: list[str] = []
    while not stop.is_set() and not problems:
        rounds += 1
        try:
            for artifact in store.artifacts():
                artifact.verify()
                rows = sum(batch.num_rows for batch in artifact.table("activity").batches())
                if rows != artifact.manifest.outputs["activity"].rows:
                    problems.append(f"{artifact.uri}: {rows} rows")
                reads += 1
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
    findings.put((reads, rounds, problems))


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    cloud = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    process = SPAWN.Process(target=_with_environment, args=(cloud, target, *args), daemon=True)
    process.start()
    return process


def _with_environment(variables: dict[str, str], target: Callable[..., None], *args: Any) -> None:
    """The fork server took its environment when it started; what a test set since then travels along."""
    os.environ.update(variables)
    target(*args)


def ended(process: BaseProcess, within: float = 60.0) -> int:
    """The exit code; a process that hangs is killed and fails the drill."""
    process.join(within)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a drill process did not end within {within:.0f} s")
    return process.exitcode


def reported(call: Callable[[], Any]) -> str:
    """The one-line error that a call gives to the user."""
    try:
        call()
    except FlywheelError as error:
        text = str(error)
        if "\n" in text:
            raise AssertionError(f"more than one line: {text}") from error
        return text
    raise AssertionError("no error was raised")
