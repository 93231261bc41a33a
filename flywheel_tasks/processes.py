"""Child processes that never outlive their parent: shared by the services and by the local launcher."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str],
    stdout: int | IO[Any],
    stderr: int | IO[Any],
    cwd: str | None = None,
) -> subprocess.Popen[bytes]:
    """Start argv (no shell) at the head of its own process group; it gets SIGTERM when this process dies."""
    return subprocess.Popen(
        list(argv),
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent if _libc else None,
    )


def adopt_orphans() -> None:
    """Make this process the parent of its orphaned descendants, so that `descendants` misses none of them."""
    if _libc:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(awaited: Iterable[int] = ()) -> None:
    """Take leave of adopted orphans that have ended: nobody else does. Of `awaited` children somebody asks the end."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.pid not in awaited and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)


def descendants(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Every living process below the roots, the roots left out."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            found |= {process.pid: process for process in root.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signal the process group of `leader`; a group that has ended is no error."""
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return


def stop(processes: Iterable[psutil.Process], grace: float) -> None:
    """SIGTERM, then SIGKILL to whatever is left after `grace` seconds."""
    processes = list(processes)
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=1)


def stop_everything_below(grace: float) -> None:
    """Stop all descendants of this process, and those that they leave behind while they go."""
    for seconds in (grace, 0.5, 0.5):
        stop([process for process in descendants([psutil.Process()]) if _alive(process)], seconds)
    reap_orphans()


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log file."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _die_with_parent() -> None:
    if _libc:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
