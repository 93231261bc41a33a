"""What a stage is: a declaration and a plain function of (inputs, config, output writer).

A stage does not know where it runs, who schedules it, or which attempt it is. DAG, command line, docs and the
lineage graph come from the declaration alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flywheel_tasks.core.code_version import code_version
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Artifact
from flywheel_tasks.core.tables import TableReader

Phase = Literal["curation", "annotation", "preherding", "herding", "evaluation", "release"]
PHASES: tuple[Phase, ...] = ("curation", "annotation", "preherding", "herding", "evaluation", "release")


@dataclass(frozen=True)
class Resources:
    """What one task of the stage asks of the cluster."""

    cpus: float = 1
    gpus: int = 0
    memory_gib: float = 2
    nodes: int = 1


@dataclass(frozen=True)
class Input:
    """An output of another stage; `previous` means the newest one from an earlier cycle."""

    stage: str
    output: str
    optional: bool = False
    previous: bool = False


class Inputs:
    """The resolved inputs of one run."""

    def __init__(
        self,
        artifacts: Mapping[str, tuple[Artifact, str] | None],
        sources: Mapping[str, tuple[SourceRecord, ...]],
        forgotten: frozenset[str] = frozenset(),
    ) -> None:
        self._artifacts = artifacts
        self.sources = sources
        self.forgotten = forgotten
        """Pseudonyms of users who asked to be forgotten: their rows must be rejected."""

    def __getitem__(self, name: str) -> TableReader:
        artifact, output = self.artifact(name)
        return artifact.table(output)

    def get(self, name: str) -> TableReader | None:
        """The table, or None where an optional input is absent."""
        return self[name] if self._artifacts.get(name) else None

    def json(self, name: str) -> Any:
        """The JSON output, or None where an optional input is absent."""
        found = self.maybe(name)
        return found[0].json(found[1]) if found else None

    def maybe(self, name: str) -> tuple[Artifact, str] | None:
        """The artifact behind an input and the output that is meant, or None where an optional input is absent."""
        return self._artifacts.get(name)

    def artifact(self, name: str) -> tuple[Artifact, str]:
        """The artifact behind an input and the name of the output that is meant."""
        found = self._artifacts.get(name)
        if found is None:
            raise InputError(f"input '{name}' is not there")
        return found


Run = Callable[[Inputs, Any, Output], None]


@dataclass(frozen=True)
class Stage:
    name: str
    phase: Phase
    paper: str
    run: Run
    config: type[StageConfig]
    outputs: Mapping[str, str]
    """Output name → schema name, `checkpoint` (one model), `checkpoints` (folders step-000100/ …), `json`, `file`, or
    `derived` (files that a purge of the tables beside them drops)."""
    inputs: Mapping[str, Input] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    """Config fields that hold globs of files from outside the store."""
    may_be_empty: tuple[str, ...] = ()
    """Those of `sources` that may match nothing yet."""
    resources: Resources = Resources()
    schedule: Literal["weekly", "daily"] = "weekly"
    uses_user_key: bool = False
    uses_cycle: bool = False
    """The content depends on which week it is, so the same inputs give another artifact in another cycle."""
    state: tuple[str, ...] = ()
    """Folders of the store that the stage reads beside its inputs: what they list enters the key."""
    models: tuple[str, ...] = ()
    """Config fields (dotted) that name a model: a folder, a file or package:NAME, whose content enters the key."""
    data: tuple[str, ...] = ()
    """Package files and folders (rules, templates, weights) that decide the content beside the code."""

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.run) or ""

    @property
    def code_version(self) -> str:
        return code_version(self.run.__module__, self.data)

    def declaration(self) -> dict[str, Any]:
        """The stage as `flywheel stages --json` shows it."""
        return {
            "name": self.name,
            "phase": self.phase,
            "paper": self.paper,
            "doc": self.doc,
            "schedule": self.schedule,
            "inputs": {
                name: {"stage": i.stage, "output": i.output, "optional": i.optional, "previous": i.previous}
                for name, i in self.inputs.items()
            },
            "outputs": dict(self.outputs),
            "config": self.config.model_json_schema().get("properties", {}),
            "resources": vars(self.resources),
        }
