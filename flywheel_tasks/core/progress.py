"""Progress on stderr: a bar in a terminal, a line now and then in a task log, nothing for quick work."""

from __future__ import annotations

import sys
import time
from typing import Any

_QUIET_SECONDS = 1.0
_LINE_SECONDS = 15.0


class Progress:
    def __init__(self, title: str) -> None:
        self._title = title
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        elapsed = now - self._started
        if elapsed < _QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw(done, total)
        elif now - self._last >= _LINE_SECONDS:
            self._last = now
            rate = done / elapsed
            left = (total - done) / rate if rate else 0.0
            print(
                f"{self._title}: {done:,.0f} of {total:,.0f} {unit} ({done / max(total, 1):.0%}), "
                f"{rate:,.0f} {unit}/s, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: float, total: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=total)
        self._bar.update(self._task, completed=done, total=total)
