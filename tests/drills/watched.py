"""A cycle under watch: what its processes unpickle and where they listen, in every process that it starts."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.drills import small_cycle

AUDIT = """
import os, sys
_stdlib = os.path.dirname(os.__file__)
def _hook(event, arguments, _file=os.environ.get("FLYWHEEL_AUDIT")):
    if event != "pickle.find_class" or not _file:
        return
    frame, caller = sys._getframe(1), None
    while frame is not None:  # who called pickle: the first frame that is no part of the standard library
        name = frame.f_code.co_filename
        if not name.startswith("<") and not (name.startswith(_stdlib) and "site-packages" not in name):
            caller = name
            break
        frame = frame.f_back
    with open(_file, "a") as file:
        file.write(f"{caller}\\t{arguments[0]}.{arguments[1]}\\n")
sys.addaudithook(_hook)
"""


def audited(folder: Path) -> dict[str, str]:
    """The environment in which every Python process writes down who unpickles what; `unpickled` reads it."""
    hook = folder / "audit"
    hook.mkdir(parents=True, exist_ok=True)
    (hook / "sitecustomize.py").write_text(AUDIT)
    return {"FLYWHEEL_AUDIT": str(hook / "calls.txt"), "PYTHONPATH": f"{hook}:{ROOT}"}


def unpickled(folder: Path) -> list[str]:
    """Caller and class of everything that was unpickled."""
    calls = folder / "audit" / "calls.txt"
    return calls.read_text().splitlines() if calls.exists() else []


def ours(calls: list[str]) -> list[str]:
    """Those of the product's own files."""
    return [call for call in calls if call.startswith(str(ROOT / "flywheel_tasks"))]


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
