"""Run a generated program where it can do no harm: no network, nothing writable but a small memory disk, hard limits.

The child enters its own user, mount, network, IPC and process namespaces. Its root is the memory disk; of the machine's
files it sees only those that Python needs (`/usr`, `/lib`, the folder of the standard library), read-only, and so
nobody's socket, pipe or device. It sets limits on CPU, memory, files and processes, and only then runs the program.
Where the kernel refuses any of it, nothing runs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.evaluation import sandbox_child

Verdict = Literal["passed", "failed", "timed out"]
NO_SANDBOX = sandbox_child.NO_SANDBOX
_CHILD = Path(sandbox_child.__file__)
_CHUNK = 1 << 16


class Limits(NamedTuple):
    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_mib: int = 1024
    disk_mib: int = 16
    processes: int = 16
    said_bytes: int = 1 << 20
    """What a program may print, of all that it prints."""


DEFAULT = Limits()


def passes(program: str, limits: Limits = DEFAULT) -> Verdict:
    """Whether a program runs to its end: an early exit, however clean, is a failure, and so is a flood of words."""
    token = secrets.token_hex(16)
    whole = f"{program}\n\nprint({token!r})\n"
    with tempfile.TemporaryDirectory(prefix="flywheel-sandbox-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_CHILD), folder, *map(str, limits[1:5])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={"PATH": "/usr/bin:/bin"}, start_new_session=True,
        )  # fmt: skip
        try:
            said = _converse(process, whole.encode(), limits)
        except TimeoutError:
            return "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == NO_SANDBOX:
        raise FlywheelError(
            "the kernel gives no namespaces to this user, so generated code can't be shut in and is not run: allow "
            "unprivileged user namespaces, or leave benchmarks.run_code off"
        )
    ended = said is not None and said.rstrip().endswith(token.encode())
    return "passed" if process.returncode == 0 and ended else "failed"


def _converse(process: subprocess.Popen[bytes], program: bytes, limits: Limits) -> bytes | None:
    """Hand the program over and take in what it prints; None where that is more than it may print."""
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process has no pipes")
    until, left, said = time.monotonic() + limits.seconds, memoryview(program), bytearray()
    with process.stdin as hand, process.stdout as ear, selectors.DefaultSelector() as ready:
        os.set_blocking(hand.fileno(), False)
        ready.register(hand, selectors.EVENT_WRITE)
        ready.register(ear, selectors.EVENT_READ)
        while ready.get_map():
            events = ready.select(until - time.monotonic()) if time.monotonic() < until else []
            if not events:
                raise TimeoutError
            for key, _ in events:
                if key.fileobj is hand:
                    try:
                        left = left[os.write(hand.fileno(), left[:_CHUNK]) :]
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        ready.unregister(hand)
                        hand.close()
                else:
                    heard = os.read(ear.fileno(), _CHUNK)
                    said += heard
                    if len(said) > limits.said_bytes:
                        return None
                    if not heard:
                        ready.unregister(ear)
    try:
        process.wait(max(until - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    return bytes(said)
