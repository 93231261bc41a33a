"""A cycle under watch: what its processes unpickle and where they listen, in every process that it starts."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.conftest import ROOT
from tests.drills import small_cycle
from tests.drills.hooking import hooked

PRODUCT = ROOT / "flywheel_tasks"
ENTRANCES = {
    "/ray/_private/serialization.py": "results that a worker of this cycle's own Ray sends back to it",
}
"""Through these files of a library the product may unpickle, and why."""


class Call(NamedTuple):
    """One unpickling: the function of the product that led to it (or none), of what, and the files in between."""

    by: str
    what: str
    through: str


def audited(folder: Path, product: Path = PRODUCT) -> dict[str, str]:
    """The environment in which every Python process writes down who unpickles what; `unpickled` reads it."""
    return hooked(folder, "audit", DRILL_AUDIT=str(folder / "calls.txt"), DRILL_AUDIT_OF=str(product))


def unpickled(folder: Path) -> list[Call]:
    """Every kind of unpickling that any of the processes did."""
    calls = folder / "calls.txt"
    return [Call(*line.split("\t")) for line in calls.read_text().splitlines()] if calls.exists() else []


def ours(calls: Sequence[Call]) -> list[Call]:
    """Those that the product led to, other than through an entrance."""
    return [call for call in calls if call.by and not entrance(call)]


def entrance(call: Call) -> str | None:
    """The entrance that the call went through."""
    return next((known for known in ENTRANCES if known in call.through), None)


def summary(calls: Sequence[Call]) -> str:
    """The counts, for people."""
    through = {known: sum(bool(call.by) and entrance(call) == known for call in calls) for known in ENTRANCES}
    listed = ", ".join(f"{number} through {known}" for known, number in through.items())
    return (
        f"{len(calls):,} kinds of unpickling: {len(ours(calls))} by product code, {listed}, the rest by libraries alone"
    )


def run(folder: Path, logs: str, stages: tuple[str, ...], more: tuple[str, ...] = (), **variables: str) -> set[str]:
    """Run the stages to a good end; the addresses on which any of their processes was seen to listen."""
    process = small_cycle.start(folder, logs, stages, more, **audited(folder), **variables)
    over, seen = threading.Event(), set[str]()
    watcher = threading.Thread(target=_watch, args=(process.pid, over, seen), daemon=True)
    watcher.start()
    try:
        small_cycle.finished(process)
    finally:
        over.set()
        watcher.join(30)
    return seen


def _watch(pid: int, over: threading.Event, seen: set[str]) -> None:
    while not over.wait(0.25):
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    found = process.net_connections("inet")
                    seen |= {c.laddr.ip.removeprefix("::ffff:") for c in found if c.status == psutil.CONN_LISTEN}
