"""What a checkpoint learned from, by its lineage: tables and delivered files of every model on the way (Sec. 2.5.1).

A cycle's pointers may have moved on since the checkpoint was made, or it may come from another cycle: its manifest, and
those of the models it was made with, say what was read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.lineage import parents
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.store import Artifact, Store

_LEARNT = ("prompt", "preference", "example", "completion")
_HELD_OUT = ("prompt", "preference")
"""Of these a model learns the training rows only; of the others every row, whatever it says of itself."""
_COLUMNS = ("prompt_id", "conversation_id", "turns", "messages", "split")

Output = tuple[Artifact, str]


class TrainedOn(NamedTuple):
    """Tables by STAGE/KEY/OUTPUT, and files from outside the store."""

    tables: dict[str, Output]
    files: list[SourceRecord]

    def read(self) -> Iterator[pa.Table]:
        """The rows that were learnt, as far as ids and words go, a table at a time."""
        for artifact, output in self.tables.values():
            contract = artifact.manifest.outputs[output].contract
            names = schemas.get(contract).names
            table = artifact.table(output).read([name for name in _COLUMNS if name in names])
            yield table.filter(pc.equal(table["split"], "train")) if contract in _HELD_OUT else table


def trained_on(checkpoints: Iterable[Artifact]) -> TrainedOn:
    """What these models, the policies they started from and the reward models that led them were trained on. Where
    nothing is named there is nothing to compare with, which proves nothing."""
    models = {model.uri: model for model in checkpoints}
    queue = list(models.values())
    tables: dict[str, Output] = {}
    files: dict[tuple[str, str], SourceRecord] = {}
    for model in queue:
        files |= {(file.uri, file.sha256): file for file in model.manifest.sources}
        for artifact, output in _read(model):
            contract = artifact.manifest.outputs[output].contract
            if contract in _LEARNT:
                tables[f"{artifact.manifest.stage}/{artifact.manifest.key}/{output}"] = artifact, output
            elif contract in schemas.CHECKPOINTS and artifact.uri not in models:
                models[artifact.uri] = artifact
                queue.append(artifact)
    if not tables:
        names = ", ".join(f"{model.manifest.stage}/{model.manifest.key}" for model in queue)
        raise InputError(f"{names}: the manifest names no training data: train it as a stage of this store")
    return TrainedOn(tables, list(files.values()))


def _read(model: Artifact) -> Iterator[Output]:
    """What a model was made from. A start from outside its store says nothing of itself."""
    store, inputs = Store(model.storage.uri), model.manifest.inputs.values()
    for record in inputs:
        artifact = store.get(record.stage, record.key)
        yield artifact, record.output
        # An example has no prompt id; the completions beside it have.
        yield from _outputs(artifact, ("completion",))
    for stage, key in set(parents(model.manifest)) - {(record.stage, record.key) for record in inputs}:
        if named := store.find(stage, key):
            yield from _outputs(named, schemas.CHECKPOINTS)


def _outputs(artifact: Artifact, contracts: Sequence[str]) -> list[Output]:
    return [(artifact, name) for name, output in artifact.manifest.outputs.items() if output.contract in contracts]
