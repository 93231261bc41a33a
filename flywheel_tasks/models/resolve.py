"""Where a model is: a folder, a package that ships one, or a checkpoint of the store; always a local folder in the end.

A model folder holds config.json, tokenizer.json and safetensors. What has to be converted or fetched is made once, in
FLYWHEEL_HOME/models/<digest>, and appears there whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from flywheel_tasks.core import ids
from flywheel_tasks.core.config import home
from flywheel_tasks.core.errors import CorruptArtifact, InputError
from flywheel_tasks.core.manifest import FileRecord
from flywheel_tasks.core.storage import medium_errors
from flywheel_tasks.core.store import Artifact, Store

_DIGITS = 32
_CONTRACTS = ("checkpoint", "checkpoints")
_CHUNK = 1 << 20
_FOLDER = "give a folder with config.json, tokenizer.json and safetensors, package:NAME, or a checkpoint of the store"


def local_folder(path: str) -> Path:
    """The folder on this machine that holds the model called `path`."""
    if path.startswith("package:"):
        return _packaged(path.removeprefix("package:"))
    if "://" in path and (not path.startswith("file://") or "/artifacts/" in path):
        return _stored(path)
    return checked(Path(path.removeprefix("file://")).expanduser().absolute(), path)


def artifact_folder(artifact: Artifact, output: str, subfolder: str = "") -> Path:
    """A checkpoint of the store as a folder; every byte has been compared with the manifest."""
    prefix = "/".join(part for part in (output, subfolder) if part) + "/"
    record = artifact.manifest.outputs.get(output)
    files = [f for f in record.files if f.path.partition("/")[2].startswith(prefix)] if record else []
    where = f"{artifact.uri}/{prefix.rstrip('/')}"
    if not files:
        raise InputError(f"{where}: there is no such checkpoint: {_checkpoints(artifact)}")
    if artifact.storage.local:
        for file in files:
            _fetch(artifact, file, None)
        attempt = files[0].path.partition("/")[0]
        return checked(Path(artifact.storage.full(f"{artifact.manifest.folder}/{attempt}/{prefix.rstrip('/')}")), where)

    def download(folder: Path) -> None:
        for file in files:
            _fetch(artifact, file, folder / file.path.partition("/")[2].removeprefix(prefix))

    return checked(_cached("\n".join(f"{file.path} {file.sha256}" for file in files), download), where)


def checked(folder: Path, name: str) -> Path:
    """`folder` if a model can be read from it without running anybody's code."""
    if not folder.is_dir():
        raise InputError(f"model '{name}': there is no such folder: {_FOLDER}")
    names = {path.name for path in folder.iterdir()}
    if not any(n.endswith(".safetensors") for n in names):
        unsafe = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        what = f"has {unsafe[0]}, which can run code when read: convert it to" if unsafe else "has no weights: it needs"
        raise InputError(f"model '{name}': {folder} {what} safetensors")
    missing = sorted({"config.json", "tokenizer.json"} - names)
    if missing:
        raise InputError(f"model '{name}': {folder} lacks {' and '.join(missing)}: {_FOLDER}")
    return folder


def _stored(uri: str) -> Path:
    """<store>/artifacts/STAGE/KEY[/manifest.json][/OUTPUT[/SUBFOLDER]]"""
    root, _, rest = uri.rstrip("/").partition("/artifacts/")
    parts = [part for part in rest.split("/") if part != "manifest.json"]
    if len(parts) < 2 or len(parts) > 4:
        raise InputError(
            f"model '{uri[:200]}' is not a checkpoint of a store: expected STORE/artifacts/STAGE/KEY/OUTPUT or a folder"
        )
    artifact = Store(root).get(ids.name(parts[0], "stage"), ids.key(parts[1]))
    output, subfolder = (*parts[2:], "", "")[:2]
    if not output:
        found = [n for n, record in artifact.manifest.outputs.items() if record.contract in _CONTRACTS]
        if len(found) != 1:
            raise InputError(f"{artifact.uri}: {_checkpoints(artifact)}: append /OUTPUT to the model's path")
        output = found[0]
    return artifact_folder(artifact, output, subfolder and ids.name(subfolder, "checkpoint"))


def _checkpoints(artifact: Artifact) -> str:
    folders = sorted(
        {
            "/".join(file.path.split("/")[1:-1])
            for record in artifact.manifest.outputs.values()
            if record.contract in _CONTRACTS
            for file in record.files
        }
    )
    return f"it has the checkpoints {', '.join(folders)}" if folders else "it holds no checkpoint"


def _fetch(artifact: Artifact, file: FileRecord, target: Path | None) -> None:
    """Read one file of the store, into `target` if given, and refuse bytes that its manifest does not know."""
    path = f"{artifact.manifest.folder}/{file.path}"
    digest = hashlib.sha256()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with artifact.storage.open(path) as stream, open(target or os.devnull, "wb") as sink:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path} is missing: run the stage again") from error
    if digest.hexdigest() != file.sha256:
        raise CorruptArtifact(f"{path} is damaged: its digest is not the manifest's: run the stage again")


def _packaged(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise InputError(f"model 'package:{name[:80]}': a package name has letters, digits and '_' only")
    spec = importlib.util.find_spec(name)
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    for root in roots:
        for config in sorted(root.rglob("config.json")):
            if list(config.parent.glob("*.safetensors")):
                return checked(config.parent, f"package:{name}")
    found = sorted(path for root in roots for path in root.rglob("*.gguf"))
    if len(found) != 1:
        problem = "is not installed" if spec is None else f"holds {len(found)} GGUF files and no safetensors"
        raise InputError(f"model 'package:{name}': the package {problem}: install one that ships a model, or {_FOLDER}")
    return from_gguf(found[0])


def from_gguf(path: Path) -> Path:
    """The same model as safetensors, converted once."""

    def convert(folder: Path) -> None:
        from flywheel_tasks.models.gguf import convert_gguf

        convert_gguf(path, folder)

    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return checked(_cached(f"gguf 1 {digest}", convert), path.name)


def _cached(identity: str, make: Callable[[Path], None]) -> Path:
    """The folder of that identity. Whoever finishes first publishes it by a rename; what others made is dropped."""
    models = home().absolute() / "models"
    final = models / hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]
    if final.is_dir():
        return final
    with medium_errors(f"model cache {models}"):
        models.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".partial", dir=models))
        try:
            make(partial)
            try:
                partial.rename(final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final
