"""One round of generation: what waits and what is finished, shared by the threads that feed the engines."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models.engine_wire import Completion, Draw, Request

SUSPECT = 2
"""A prompt that was in work when so many engines died runs alone from then on: one more death, and it is the cause."""
_UNREAD = 1024
"""Finished prompts that may wait for the reader; beyond, the engines wait."""


@dataclass
class Round:
    source: Iterable[Request]
    draw: Draw
    most_deaths: int
    feeders: int
    deaths: int = 0
    redone: int = 0
    given: int = 0
    returned: int = 0
    failure: BaseException | None = None
    exhausted: bool = False
    halted: threading.Event = field(default_factory=threading.Event)
    """The feeders stop."""
    closed: threading.Event = field(default_factory=threading.Event)
    """The reader is gone."""

    def __post_init__(self) -> None:
        self._source = iter(self.source)
        self._lock = threading.Lock()
        self._again: deque[Request] = deque()
        self._survived: Counter[str] = Counter()
        self._finished: queue.Queue[list[Completion]] = queue.Queue(_UNREAD)

        size = len(self.source) if isinstance(self.source, Sized) else sys.maxsize
        self.fair_share = max(1, -(-size // self.feeders)) * self.draw.k
        """Sequences of each engine if all get the same: a small round must not go to the first engine whole."""

    # -- the feeding threads

    def take(self, flying: dict[str, Request], room: int) -> list[Request]:
        """The next requests for an engine that has `flying` in work and `room` for so many sequences more."""
        taken: list[Request] = []
        with self._lock:
            if any(self._survived[name] >= SUSPECT for name in flying):
                return []
            while room > 0 and not self.halted.is_set():
                request = self._next(alone=not flying and not taken)
                if request is None:
                    break
                if request.id in flying or any(request.id == other.id for other in taken):
                    raise InputError(f"two prompts of one round have the id '{request.id}': give each its own")
                taken.append(request)
                room -= self.draw.k
                if self._survived[request.id] >= SUSPECT:
                    break
        return taken

    def _next(self, *, alone: bool) -> Request | None:
        if self._again:
            suspect = self._survived[self._again[0].id] >= SUSPECT
            return self._again.popleft() if alone or not suspect else None
        if self.exhausted:
            return None
        request = next(self._source, None)
        if request is None:
            self.exhausted = True
        else:
            self.given += 1
        return request

    def more_for(self, flying: dict[str, Request]) -> bool:
        """Something is left that an engine with `flying` in work could take."""
        with self._lock:
            if any(self._survived[name] >= SUSPECT for name in flying):
                return False
            return bool(self._again) or not self.exhausted

    @property
    def complete(self) -> bool:
        with self._lock:
            return self.exhausted and self.returned == self.given

    def finish(self, completions: list[Completion]) -> None:
        with self._lock:
            self.returned += 1
        self._put(completions)

    def leave(self) -> None:
        """A feeder is done; the reader hears of it when the last one is."""
        with self._lock:
            self.feeders -= 1
            last = self.feeders == 0
        if last:
            self._put([])

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.halted.set()

    def _put(self, completions: list[Completion]) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                self._finished.put(completions, timeout=0.5)
                break

    def lost(self, flying: dict[str, Request], why: Exception) -> list[Request]:
        """An engine died with these in work. They go back to the head of the queue; the ones to give up on return."""
        given_up = []
        with self._lock:
            self.deaths += 1
            self.redone += len(flying)
            if self.deaths > self.most_deaths:
                raise FlywheelError(
                    f"{self.deaths} engines were lost in one round, the last because {why}: see its log, or lower "
                    "engine.sequences if memory ran out"
                )
            for request in reversed(flying.values()):
                self._survived[request.id] += 1
                if self._survived[request.id] > SUSPECT:
                    given_up.append(request)
                    self.redone -= 1
                else:
                    self._again.appendleft(request)
        return given_up

    # -- the reader

    def read(self, seconds: float) -> list[Completion] | None:
        try:
            return self._finished.get(timeout=seconds)
        except queue.Empty:
            return None

    def stop(self) -> None:
        self.halted.set()
        self.closed.set()
