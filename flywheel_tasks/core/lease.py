"""A sign of life: a small object that its owner renews, so that work under way can be told from what was left behind.

forget.lock              one purge at a time
attempts/<attempt>.json  an attempt under way, and of whom it knows that they were forgotten
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.storage import Storage

_RENEW_SECONDS = 60.0
_DEAD_AFTER = datetime.timedelta(hours=1)


class Lease:
    """One sign, which this process gives."""

    def __init__(self, storage: Storage, path: str, says: Mapping[str, Any]) -> None:
        self.path = path
        self._storage, self._token = storage, secrets.token_hex(8)
        self._says = {"token": self._token, **_here(), "pid": os.getpid(), "began": _now().isoformat(), **says}
        self._data = b""

    def take(self) -> None:
        """Give the sign, unless somebody who lives gives it; what a dead one left is taken over."""
        self._data = self._signed()
        if self._storage.put_new(self.path, self._data):
            return
        found = self._storage.read(self.path) or b""
        if found == self._data:
            return  # the answer to the put got lost on the way
        other = read(found)
        if other is None and self._storage.replace(self.path, found, self._data):
            return
        whose = f"a process on {other['host']} since {other['began']}" if other else "another process"
        raise FlywheelError(f"{self.path} is held by {whose}: wait for it to end, then run again")

    def check(self) -> None:
        """Refuse to go on where this process was taken for dead."""
        if _token(self._storage.read(self.path)) != self._token:
            raise FlywheelError(f"{self.path} is no longer this process's, which showed no life for long: run it again")

    def renew(self, over: threading.Event) -> None:
        """Give the sign anew until it is `over`, or somebody else's."""
        while not over.wait(_RENEW_SECONDS):
            try:
                fresh = self._signed()
                if not self._storage.replace(self.path, self._data, fresh):
                    return
                self._data = fresh
            except FlywheelError as error:
                print(f"warning: {self.path} could not be renewed: {error}", file=sys.stderr)

    def give_back(self) -> None:
        if _token(self._storage.read(self.path)) == self._token:
            with suppress(FileNotFoundError):
                self._storage.delete(self.path)

    def _signed(self) -> bytes:
        return json.dumps(self._says | {"at": _now().isoformat()}).encode()


@contextmanager
def held(storage: Storage, path: str, **says: Any) -> Iterator[Lease]:
    """Hold `path` inside the block and say `says` in it."""
    lease, over = Lease(storage, path, says), threading.Event()
    lease.take()
    renewing = threading.Thread(target=lease.renew, args=(over,), daemon=True)
    renewing.start()
    try:
        yield lease
    except BaseException as error:
        over.set()
        renewing.join()
        try:
            lease.give_back()
        except (FlywheelError, OSError) as second:
            error.add_note(f"and {path} could not be removed: {second}")
        raise
    over.set()
    renewing.join()
    lease.give_back()


def read(data: bytes | None) -> dict[str, Any] | None:
    """What a sign says; None where its owner is dead: it was not renewed, or its process is gone from this machine."""
    try:
        says = dict(json.loads(data or b""))
        age = _now() - datetime.datetime.fromisoformat(says["at"])
        gone = {name: says[name] for name in _here()} == _here() and not Path(f"/proc/{int(says['pid'])}").exists()
    except (ValueError, KeyError, TypeError):
        return None
    return None if gone or age > _DEAD_AFTER else says


def _token(data: bytes | None) -> str | None:
    try:
        return str(json.loads(data or b"")["token"])
    except (ValueError, KeyError, TypeError):
        return None


def _here() -> dict[str, str]:
    """Where a process id means something: containers of one machine may share its name, but not their processes."""
    return {"host": platform.node(), "processes": os.readlink("/proc/self/ns/pid")}


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
