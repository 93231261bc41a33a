"""SIGKILL for one process of a running tree, drawn at random, and what a drill counts of it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from dataclasses import dataclass

import psutil


@dataclass
class Count:
    kills: int = 0
    of_children: int = 0
    cut_short: int = 0
    resumed: int = 0


def disturb(process: subprocess.Popen[str], after: float, draw: random.Random, count: Count, patience: float) -> bool:
    """Kill one of its processes `after` so many seconds, if it is still there, and wait for whatever stands or falls.
    One that still runs after `patience` hangs: an AssertionError. Returns whether there was anything to kill."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=after)
    tree = kill_one(process, draw, count) if process.poll() is None else []
    try:
        # What its death took down with it is gone within moments; what did not notice goes on as a scheduler's would.
        process.communicate(timeout=patience)
    except subprocess.TimeoutExpired as error:
        raise AssertionError("it hangs after a process was killed") from error
    finally:
        kill_all(process)
        for left in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    count.cut_short += bool(tree) and process.returncode != 0
    return bool(tree)


def kill_one(process: subprocess.Popen[str], draw: random.Random, count: Count) -> list[psutil.Process]:
    """The tree as it was when one of it was killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
        victim = tree[draw.randrange(len(tree))]
        victim.kill()
        count.kills += 1
        count.of_children += victim.pid != process.pid
        if victim.pid == process.pid:
            kill_all(process)  # a machine that loses its scheduler loses the rest of the session too
        return tree
    return []


def kill_all(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
