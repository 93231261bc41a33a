"""On the path of every process of a test's Ray cluster: keeps all of its ports on loopback.

Ray takes 127.0.0.1 for the machine's own address, in each process that joins: a head that alone were told otherwise
would wait for ever for its own agent. Any other address, 127.0.0.2 too, makes Ray listen on every interface.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAME = "ray._private.services"


class _Loopback(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads that one module as ever, then lets 127.0.0.1 mean 127.0.0.1."""

    def __init__(self) -> None:
        self._real: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None:
            self._real, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        module.resolve_ip_for_localhost = lambda host: host  # type: ignore[attr-defined]


sys.meta_path.insert(0, _Loopback())
