"""Receipts: how whoever started a stage far away learns which manifest it committed.

A pod's log may be cut, rotated or gone with its node, and its phase may say failed after the work was done. So a
launcher names a receipt, the stage leaves its manifest's URI under that name, and the manifest decides.
"""

from __future__ import annotations

from flywheel_tasks.core import ids
from flywheel_tasks.core.store import Artifact, Store


def leave(store: Store, name: str, artifact: Artifact) -> None:
    """Say under `name` which artifact this run made or found."""
    store.storage.put(_path(name), artifact.uri.encode())


def take(store: Store, name: str) -> Artifact | None:
    """The artifact that was left under `name`, once; None where the run left nothing."""
    data = store.storage.read(_path(name))
    if data is None:
        return None
    artifact = store.by_uri(data.decode())
    store.storage.delete(_path(name))
    return artifact


def _path(name: str) -> str:
    return f"receipts/{ids.name(name, 'receipt')}"
