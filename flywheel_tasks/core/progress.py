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
        self._first: tuple[float, float] | None = None
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if self._first is None and done:
            self._first = done, now
        if now - self._started < _QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw(done, total)
        elif now - self._last >= _LINE_SECONDS:
            self._last = now
            rate = self._rate(done, now)
            print(f"{self._title}: {line(done, total, unit, rate)}", file=sys.stderr, flush=True)

    def _rate(self, done: float, now: float) -> float:
        """Since the first step was done, which also waited for models to load."""
        before, since = self._first or (0.0, self._started)
        if done <= before:
            before, since = 0.0, self._started
        return (done - before) / (now - since)

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


def line(done: float, total: float, unit: str, rate: float) -> str:
    """How far it is, how fast, and how long it still takes."""
    how_far = f"{done:,.0f} of {total:,.0f} {unit} ({done / max(total, 1):.0%})"
    if not rate:
        return how_far
    pace = f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.0f} s each"
    seconds = (total - done) / rate
    left = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{how_far}, {pace}, {left} left"
