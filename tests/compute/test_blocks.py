"""One function over many blocks gives the same results, in the same order, wherever it runs."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from flywheel_tasks.compute import session
from flywheel_tasks.compute.blocks import map_blocks
from flywheel_tasks.core.errors import FlywheelError, InputError


def work(block: int) -> tuple[int, int]:
    time.sleep(0.05 * (block % 3))
    return block * block, os.getpid()


def test_one_block_and_one_core_stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(map_blocks(work, [3])) == [(9, os.getpid())]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session, "cpus", lambda: 1)
    assert [pid for _, pid in map_blocks(work, range(4))] == [os.getpid()] * 4
    assert list(map_blocks(work, [])) == []
    monkeypatch.setattr(session, "cpus", lambda: 2)
    assert [pid for _, pid in map_blocks(work, range(4), share=False)] == [os.getpid()] * 4


@pytest.mark.slow
@pytest.mark.parametrize("actors", [0, 2])
def test_through_ray_results_come_in_block_order(actors: int) -> None:
    results = list(map_blocks(work, list(range(12)), actors=actors))
    assert [square for square, _ in results] == [n * n for n in range(12)]
    assert os.getpid() not in {pid for _, pid in results}
    if actors:
        assert len({pid for _, pid in results}) <= actors


@pytest.mark.slow
def test_a_local_ray_listens_on_loopback_alone_and_asks_for_a_token() -> None:
    list(map_blocks(work, [1, 2]))
    assert os.environ["RAY_AUTH_MODE"] == "token"
    own = {psutil.Process().pid, *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [c for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.pid in own]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} <= {"127.0.0.1", "::1"}


def picky(block: int) -> int:
    if block == 3:
        raise InputError("log 3 is cut short: copy it again")
    return block


def dies(block: int) -> int:
    if block == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return block


@pytest.mark.slow
def test_what_a_worker_raised_for_people_reaches_them_unchanged() -> None:
    with pytest.raises(InputError, match=r"^log 3 is cut short: copy it again$"):
        list(map_blocks(picky, list(range(6))))


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_is_not_tried_again() -> None:
    with pytest.raises(FlywheelError, match="a worker failed") as failure:
        list(map_blocks(dies, list(range(6))))
    assert "\n" not in str(failure.value)
