"""Lineage both ways: from an artifact to all it came from and all that came of it, and from a user to their words."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import CorruptArtifact
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.store import Artifact, Store

Address = tuple[str, str]
_IN_A_STORE = re.compile(r"/artifacts/([^/]+)/([0-9a-f]{32})(?:/|$)")


class Graph:
    """What every committed artifact was made from, read once."""

    def __init__(self, artifacts: Iterable[Artifact]) -> None:
        self.manifests: dict[Address, Manifest] = {address(a.manifest): a.manifest for a in artifacts}
        self._children: dict[Address, set[Address]] = defaultdict(set)
        for child, manifest in self.manifests.items():
            for parent in parents(manifest):
                self._children[parent].add(child)

    def upstream(self, start: Address) -> list[Address]:
        """Everything the artifact was made from, nearest first."""
        return _walk(start, lambda at: parents(self.manifests[at]), self.manifests)

    def downstream(self, start: Address) -> list[Address]:
        """Everything that was made from the artifact, nearest first."""
        return _walk(start, lambda at: sorted(self._children[at]), self.manifests)


def address(manifest: Manifest) -> Address:
    return manifest.stage, manifest.key


def parents(manifest: Manifest) -> list[Address]:
    """What the artifact was made from: its inputs, and the checkpoints of a store that its configuration names by path,
    as it names the reigning champion. A key is a digest, so another mount or a copy of the store is the same parent."""
    inputs = [(record.stage, record.key) for record in manifest.inputs.values()]
    named = [match.groups() for text in _texts(manifest.config) for match in _IN_A_STORE.finditer(text)]
    return list(dict.fromkeys([*inputs, *((stage, key) for stage, key in named)]))


def describe(store: Store, artifact: Artifact) -> dict[str, Any]:
    """The lineage of one artifact, for people and machines. Another artifact's damaged manifest is named, and what only
    it could tell is missing."""
    damaged: dict[str, str] = {}
    graph, start = Graph(_readable(store, damaged)), address(artifact.manifest)
    manifest = artifact.manifest
    return {
        "artifact": "/".join(start),
        "commit": manifest.commit,
        "code_version": manifest.code_version,
        "config": manifest.config,
        "sources": [source.model_dump() for source in manifest.sources],
        "upstream": [_entry(graph.manifests[at]) for at in graph.upstream(start)],
        "downstream": [_entry(graph.manifests[at]) for at in graph.downstream(start)],
        "damaged": damaged,
    }


def held_rows(artifact: Artifact, user: str) -> dict[str, int]:
    """How many rows of each of the artifact's tables are this user's."""
    counts = {
        name: sum(int(pc.sum(mask).as_py() or 0) for _, mask in _own(artifact, name, user))
        for name in _personal(artifact)
    }
    return {name: count for name, count in counts.items() if count}


def _readable(store: Store, damaged: dict[str, str]) -> Iterator[Artifact]:
    for stage, key in store.folders():
        try:
            artifact = store.find(stage, key)
        except CorruptArtifact as error:
            damaged[f"{stage}/{key}"] = str(error)
            continue
        if artifact is not None:
            yield artifact


def _texts(value: Any) -> Iterator[str]:
    """Every text of a configuration, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _personal(artifact: Artifact) -> Iterable[str]:
    return [name for name, output in artifact.manifest.outputs.items() if output.contract in schemas.USER_COLUMNS]


def _own(artifact: Artifact, output: str, user: str) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
    column = schemas.USER_COLUMNS[artifact.manifest.outputs[output].contract]
    for batch in artifact.table(output).batches([column], batch_size=1 << 17):
        yield batch, pc.fill_null(pc.equal(batch.column(0), user), False)


def _entry(manifest: Manifest) -> dict[str, Any]:
    return {
        "artifact": f"{manifest.stage}/{manifest.key}",
        "cycle": manifest.cycle,
        "commit": manifest.commit,
        "finished": manifest.finished.isoformat(timespec="seconds"),
        "retrain_needed": any(entry.retrain_needed for entry in manifest.forgotten),
    }


def _walk(start: Address, neighbours: Any, known: dict[Address, Manifest]) -> list[Address]:
    seen, queue = {start}, [start]
    for at in queue:
        for neighbour in neighbours(at) if at in known else []:
            if neighbour not in seen and neighbour in known:
                seen.add(neighbour)
                queue.append(neighbour)
    return queue[1:]
