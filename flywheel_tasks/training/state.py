"""What a killed run resumes from, and the models it publishes: safetensors and JSON, each file with its digest.

Random numbers need no state of their own: every step seeds its generator from (seed, step, worker).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from flywheel_tasks.core.errors import CorruptArtifact
from flywheel_tasks.core.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

MODELS = "models"
_CHUNK = 1 << 22


def save(folder: Path, worker: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One worker's part of a checkpoint."""
    from safetensors.torch import save_file

    path = _tensors(folder, worker)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    record = {**about, "sha256": _sha256(path)}
    _about(folder, worker).write_text(json.dumps(record, allow_nan=False))


def load(folder: Path, worker: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote, or an error if a bit of it has changed."""
    from safetensors.torch import load_file

    path = _tensors(folder, worker)
    about: dict[str, Any] = json.loads(_about(folder, worker).read_bytes())
    if _sha256(path) != about["sha256"]:
        raise CorruptArtifact(
            f"checkpoint {folder.name}: {path.name} is damaged: delete the stage's folder under partial/ to start anew"
        )
    return load_file(path), about


@dataclass(frozen=True)
class Published:
    """A model that the run has finished: its step, the metrics of that step, and the sha256 of its files by name.

    Another attempt, or a step that is done again, publishes other weights under the same step. This record goes on
    naming its own, so that what was measured is what is fetched."""

    step: int
    metrics: Mapping[str, float]
    folder: str
    files: Mapping[str, str]


def publish(uri: str, step: int, folder: Path, metrics: Mapping[str, float]) -> None:
    """Store a model's files, and name them only when all are there."""
    storage, name = Storage(uri), f"{MODELS}/step-{step:06d}-{secrets.token_hex(4)}"
    files: dict[str, str] = {}
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = source.relative_to(folder).as_posix()
        with storage.create(f"{name}/{relative}") as stream, source.open("rb") as raw:
            shutil.copyfileobj(raw, stream, _CHUNK)
        files[relative] = stream.sha256
    record = {"step": step, "metrics": dict(metrics), "folder": name, "files": files}
    storage.put(f"{MODELS}/step-{step:06d}.json", json.dumps(record, allow_nan=False).encode())


def published(uri: str) -> list[Published]:
    """The models under `uri`, by step."""
    storage = Storage(uri)
    infos = [i for i in storage.list(MODELS) if i.type == pafs.FileType.File and i.base_name.endswith(".json")]
    records = [json.loads(storage.read(f"{MODELS}/{info.base_name}") or b"null") for info in infos]
    return sorted((Published(**record) for record in records if record), key=lambda one: one.step)


def fetch(uri: str, model: Published, folder: Path) -> None:
    """Copy a published model to a local folder, checking every byte."""
    storage = Storage(uri)
    for relative, sha256 in model.files.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with storage.open(f"{model.folder}/{relative}") as stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out, _CHUNK)
        if _sha256(target) != sha256:
            raise CorruptArtifact(f"model of step {model.step}: {relative} is damaged: run the stage again")


def _tensors(folder: Path, worker: int) -> Path:
    return folder / f"worker-{worker:05d}.safetensors"


def _about(folder: Path, worker: int) -> Path:
    return folder / f"worker-{worker:05d}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
