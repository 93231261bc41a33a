"""Runs a stage as a process on the machine of the Airflow worker."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import MANIFEST_URI, StageOperator, failure, printable, slots

from flywheel_tasks import processes
from flywheel_tasks.core.ids import USER_KEY_VARIABLE
from flywheel_tasks.core.stage import Stage

KILL_AFTER_SECONDS = 3.0
"""Less than the five seconds after which Airflow kills the task's own process, and with it this one's last chance."""


class Launcher(StageOperator):
    custom_operator_name = "flywheel run (local)"
    command: Sequence[str] = (str(Path(sys.executable).with_name("flywheel")),)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def placement(stage: Stage) -> dict[str, Any]:
        return {**StageOperator.placement(stage), "pool_slots": slots(stage)}

    def launch(self, arguments: Sequence[str], context: Mapping[str, Any]) -> str:
        with tempfile.TemporaryFile() as stdout:
            self._process = processes.spawn(
                [*self.command, *arguments], env=self.environment(), stdout=stdout, stderr=subprocess.PIPE
            )
            try:
                for line in lines(self._process):
                    self.log.info("%s", line)
                code = self._process.wait()
            except BaseException:
                processes.signal_group(self._process.pid, signal.SIGKILL)
                raise
            stdout.seek(0)
            printed = stdout.read().decode(errors="replace").splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        uri = next((line for line in reversed(printed) if MANIFEST_URI.fullmatch(line)), None)
        if code and uri is None:
            raise failure(self.stage_name, code, how)
        if code:
            self.log.warning("%s after its artifact was committed: the work is done", how)
        return uri or (printed[-1] if printed else "")

    def environment(self) -> dict[str, str]:
        """The worker's environment without Airflow's own secrets, and the user key only where it is used."""
        hidden = () if self.uses_user_key else (USER_KEY_VARIABLE,)
        return {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW__", "_AIRFLOW")) and k not in hidden}

    def on_kill(self) -> None:
        """Stop the stage and what it started; Airflow calls this in a signal handler, so it may not wait."""
        if self._process is None:
            return
        group = self._process.pid
        processes.signal_group(group, signal.SIGTERM)
        killer = threading.Timer(KILL_AFTER_SECONDS, processes.signal_group, (group, signal.SIGKILL))
        killer.daemon = True
        killer.start()


def lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """The process's stderr, line by line, until it ends, even where a child of it still holds the pipe open."""
    if process.stderr is None:
        return
    pipe, rest = process.stderr.fileno(), b""
    while True:
        ended = process.poll() is not None
        readable, _, _ = select.select([pipe], [], [], 0 if ended else 0.5)
        chunk = os.read(pipe, 65_536) if readable else b""
        *whole, rest = (rest + chunk).split(b"\n")
        yield from map(printable, whole)
        if (ended or readable) and not chunk:
            break
    process.stderr.close()
    if rest:
        yield printable(rest)
