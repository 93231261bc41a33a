"""Upstream artifacts as the tests of preherding commit them, and a run of a stage with delivered files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.stage import Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store
from tests.curation.curation_runs import commit
from tests.preherding.conftest import characters, given, store

__all__ = ["characters", "given", "store"]


def source(folder: Path, lines: Sequence[Any], name: str = "delivered.jsonl") -> SourceRecord:
    """A delivered file; a line that is text is written as it is."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).write_text(text)
    raw = text.encode()
    return SourceRecord(
        name=name, uri=f"file://{folder / name}", bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()
    )


def run(
    stage: Stage,
    store: Store,
    config: StageConfig,
    artifacts: Mapping[str, tuple[Artifact, str] | None],
    files: Sequence[SourceRecord] = (),
    forgotten: frozenset[str] = frozenset(),
    key: str = "2" * 32,
) -> Artifact:
    inputs = Inputs(artifacts, {"data": tuple(files)}, forgotten)
    return commit(store, stage.name, stage.outputs, lambda out: stage.run(inputs, config, out), key)
