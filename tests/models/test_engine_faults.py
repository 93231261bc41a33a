"""Engines that die, hang or are left behind. Each test starts engines of its own or kills the shared one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.engine import Completion, Engine, Request
from flywheel_tasks.models.engine_config import Sampling
from tests.models.engines import SMALL, prompt, requests, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DRAW = Sampling(k=2, max_tokens=30, seed=7)
EXACT = SMALL.model_copy(update={"dtype": "float32"})
"""Redone prompts meet other companions in a batch: in bfloat16 one response in a hundred then turns another way."""


def tokens(completions: Iterable[Completion]) -> dict[tuple[str, int], list[int]]:
    return {(c.id, c.sample): c.tokens for c in completions}


@pytest.fixture(scope="module")
def mortal(tiny_model: Path) -> Iterator[Engine]:
    """An engine that these tests kill; it replaces itself."""
    with started(tiny_model, EXACT) as engine:
        yield engine


def test_a_killed_engine_is_replaced_and_only_unfinished_prompts_are_redone(mortal: Engine) -> None:
    asked = requests(48)
    undisturbed = tokens(mortal.generate(asked, DRAW))
    [victim] = mortal.pids
    before = mortal.stats()
    seen: dict[str, int] = {}
    found = {}
    for completions in mortal.stream(asked, DRAW):
        found[completions[0].id] = completions
        seen[completions[0].id] = seen.get(completions[0].id, 0) + 1
        if len(found) == 5 and mortal.pids == [victim]:
            os.kill(victim, signal.SIGKILL)
    after = mortal.stats()
    assert after["deaths"] - before["deaths"] == 1
    assert set(seen.values()) == {1}
    assert 0 < after["redone"] - before["redone"] <= 43
    assert after["prompts"] - before["prompts"] == 48
    assert tokens(c for drawn in found.values() for c in drawn) == undisturbed
    assert mortal.pids != [victim]


def test_a_hung_engine_is_replaced_within_its_deadline(tiny_model: Path) -> None:
    asked = requests(60)
    with started(tiny_model, EXACT.model_copy(update={"stall_seconds": 15.0})) as engine:
        undisturbed = tokens(engine.generate(asked, DRAW))
        [victim] = engine.pids
        before = engine.stats()["deaths"]
        os.kill(victim, signal.SIGSTOP)
        assert tokens(engine.generate(asked, DRAW)) == undisturbed
        assert engine.stats()["deaths"] > before
        assert not psutil.pid_exists(victim)


def test_a_round_past_its_deadline_fails_in_time_and_the_next_one_works(mortal: Engine) -> None:
    [victim] = mortal.pids
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(FlywheelError, match="generation passed its deadline: 0 prompts were finished"):
        mortal.generate(requests(3), DRAW, deadline=2)
    assert time.monotonic() - began < 6
    assert not psutil.pid_exists(victim)
    assert len(mortal.generate(requests(3), DRAW)) == 6


def test_an_engine_that_is_lost_too_often_is_an_error(tiny_model: Path) -> None:
    with started(tiny_model, SMALL.model_copy(update={"restarts": 0})) as engine:
        stream = engine.stream(requests(200), DRAW)
        next(stream)
        os.kill(engine.pids[0], signal.SIGKILL)
        with pytest.raises(FlywheelError, match=r"1 engines were lost in one round, the last because .*signal 9"):
            list(stream)


def test_an_engine_does_not_outlive_its_parent(tiny_model: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.models.engines import started\n"
        "engine = started(Path(sys.argv[1]))\n"
        "print(engine.pids[0], flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_model)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the engine lives on"
        time.sleep(0.1)


def test_a_killed_stage_resumes_from_the_chunks_it_committed(tiny_model: Path, tmp_path: Path) -> None:
    def attempt() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.models.generation_attempt", str(tiny_model), f"file://{tmp_path}/store"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    first = attempt()
    assert first.stdout is not None
    made = [json.loads(first.stdout.readline()) for _ in range(3)]
    first.kill()
    first.wait()
    assert not any(chunk["resumed"] for chunk in made)
    out, _ = attempt().communicate()
    chunks = {chunk["name"]: chunk for chunk in map(json.loads, out.splitlines())}
    assert len(chunks) == 20
    for chunk in made:
        assert chunks[chunk["name"]] == chunk | {"resumed": True}
    assert sum(chunk["resumed"] for chunk in chunks.values()) < 20


def test_replicas_on_ray_share_a_round_and_survive_a_death(tiny_model: Path) -> None:
    asked = [Request(f"p{number}", prompt(number)) for number in range(100)]
    try:
        with started(tiny_model, EXACT.model_copy(update={"replicas": 2})) as engine:
            assert len(set(engine.pids)) == 2
            whole = tokens(engine.generate(asked, DRAW))
            assert len(whole) == 200
            victim = engine.pids[0]
            found = {}
            for completions in engine.stream(asked, DRAW):
                found[completions[0].id] = completions
                if len(found) == 10 and victim in engine.pids:
                    os.kill(victim, signal.SIGKILL)
            assert tokens(c for drawn in found.values() for c in drawn) == whole
            assert engine.stats()["deaths"] == 1
            for number in range(2):
                alone = tokens(engine.generate(asked[:4], DRAW, replica=number))
                assert alone == {name: whole[name] for name in alone}
    finally:
        session.ensure().shutdown()
