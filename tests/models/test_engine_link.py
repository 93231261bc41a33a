"""The way to an engine: a deadline over the whole exchange, and no core that the learners ask for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flywheel_tasks.compute import session
from flywheel_tasks.models import engine_link
from flywheel_tasks.models import engine_wire as wire
from flywheel_tasks.models.engine_link import EngineLost, ProcessLink
from tests.models.noted_ray import Noted

DRAW = wire.Draw(1, 1.0, 1.0, 256, 0)
SMALL = wire.Abort()
LARGE = wire.Advance([wire.Request(f"p{i}", [100_000] * 2000) for i in range(128)], DRAW, more=True)
"""More than a socket holds: what a full engine's worth of long prompts comes to."""
HALF_AN_ANSWER = "import os, sys, time; os.write(int(sys.argv[1]), b'\\0\\0\\1\\0half'); time.sleep(60)"


@contextmanager
def link() -> Iterator[ProcessLink]:
    made = ProcessLink()
    try:
        yield made
    finally:
        made.kill()


@pytest.mark.parametrize("order", [SMALL, LARGE], ids=["small", "large"])
def test_an_engine_that_stops_reading_is_lost_at_its_deadline(order: wire.Order) -> None:
    with link() as stuck:
        os.kill(stuck._process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EngineLost, match="silent for 1 s"):
            stuck.call(order, 1.0)
        assert time.monotonic() - began < 4
        assert stuck._process.wait(5) == -signal.SIGKILL


def test_an_engine_that_stops_in_the_middle_of_its_answer_is_lost_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(
        engine_link.subprocess, "Popen",
        lambda command, **named: real([sys.executable, "-c", HALF_AN_ANSWER, command[-1]], **named),
    )  # fmt: skip
    with link() as stuck:
        began = time.monotonic()
        with pytest.raises(EngineLost, match="silent for 2 s"):
            stuck.call(SMALL, 2.0)
        assert time.monotonic() - began < 5


def test_an_answer_in_time_leaves_the_engine_alone() -> None:
    with link() as alive:
        first = alive.call(SMALL, 60.0)
        assert isinstance(first, wire.Failed)  # nothing is loaded, which it says
        assert alive.call(SMALL, 1.5) == first
        time.sleep(1.6)
        assert alive.call(SMALL, 60.0) == first


@pytest.mark.parametrize(("address", "cores"), [(None, 0), ("ray://head:10001", 2)])
def test_engines_of_one_machine_leave_its_cores_to_the_learners(
    monkeypatch: pytest.MonkeyPatch, address: str | None, cores: int
) -> None:
    """On a cluster an engine is placed like anything else; on one machine the learners ask for all there is."""
    ray = Noted()
    monkeypatch.setattr(session, "ensure", lambda: ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    for _ in range(2):
        engine_link.connect(tensor_parallel=1, replicas=2)
    assert sum(one["num_cpus"] for one in ray.asked) == cores
