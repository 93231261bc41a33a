"""What is asked of a cluster, for tests that may not start one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from flywheel_tasks.compute import session


class Noted:
    """A Ray that notes what its actors ask for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(session.cpus())}

    def remote(self, _: type) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, **named: Any) -> Any:
        self.asked.append(named)
        return SimpleNamespace(remote=lambda *_: SimpleNamespace(ready=SimpleNamespace(remote=lambda: None)))

    def kill(self, *_: Any, **__: Any) -> None: ...
