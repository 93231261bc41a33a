"""The stages through the runner: keys, earlier cycles found by pointer, and a user forgotten everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_tasks import pipeline
from flywheel_tasks.annotation import annotate_export, annotate_import, publish
from flywheel_tasks.core.config import load
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.ids import pseudonym
from flywheel_tasks.core.runner import Result, run_stage
from flywheel_tasks.core.store import Store
from flywheel_tasks.simulation import annotators
from tests.annotation import worlds

STAGES = (annotate_export.STAGE, annotate_import.STAGE)


@pytest.fixture
def world(tmp_path: Path, user_key: bytes) -> worlds.World:
    return worlds.World(tmp_path)


def cycle(world: worlds.World, tmp_path: Path, name: str) -> list[Result]:
    """Export and import of one cycle, whose pairs and characters are pointed at already."""
    config = load(
        {stage.name: stage.config for stage in (*pipeline.STAGES, *STAGES)},
        "test",
        overrides=[
            f"store.uri={world.store.uri}",
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
            f"annotate-export.folder={world.outbox}",
            f"annotate-import.deliveries={world.inbox}/*.jsonl",
        ],
    )
    return [run_stage(stage, name, config, Store(world.store.uri)) for stage in STAGES]


def pairs_of(world: worlds.World, name: str, seed: int) -> None:
    table = worlds.pairs(12, seed)
    if seed == 1:
        users = ["0" * 32 if i else pseudonym("user-7", worlds_key()) for i in range(len(table))]
        table = table.set_column(table.schema.get_field_index("user"), table.schema.field("user"), [users])
    world.store.point(name, world.put("pairs", {"pairs": "pair"}, {"pairs": table}).manifest)
    world.store.point(name, world.characters.manifest)


def worlds_key() -> bytes:
    from flywheel_tasks.core import ids

    return ids.user_key()


def test_two_cycles_with_late_reviews_and_a_user_who_asks_to_be_forgotten(world: worlds.World, tmp_path: Path) -> None:
    pairs_of(world, "2026-W47", 1)
    exported, imported = cycle(world, tmp_path, "2026-W47")
    assert imported.artifact.table("annotations").rows == 0, "nothing is back yet, and nothing waits"
    assert [result.outcome for result in cycle(world, tmp_path, "2026-W47")] == ["cached", "cached"]
    name = exported.artifact.json("report")["export"]
    tasks = publish.tasks(publish.read(str(world.outbox), name)["tasks.jsonl"])
    team = annotators.team(4, 3)
    annotators.deliver(annotators.reviews(tasks, team, worlds.DAY, 3), world.inbox, worlds.DAY)
    pairs_of(world, "2026-W48", 2)
    second, collected = cycle(world, tmp_path, "2026-W48")
    assert second.artifact.json("report")["tasks_of_earlier_cycles"] == len(tasks)
    report = collected.artifact.json("report")
    assert report["deliveries"]["of_earlier_cycles"] == collected.artifact.table("annotations").rows == 3 * len(tasks)
    user = pseudonym("user-7", worlds_key())
    assert user in collected.artifact.table("annotations").read()["user"].to_pylist()

    proof = forget(world.store, "user-7", worlds_key())
    assert proof["clean"]
    pairs_of(world, "2026-W49", 3)
    _, after = cycle(world, tmp_path, "2026-W49")
    for artifact in world.store.artifacts():
        for output, record in artifact.manifest.outputs.items():
            if record.contract not in ("json", "file", "character"):
                assert user not in artifact.table(output).read()["user"].to_pylist(), (artifact.uri, output)
    assert after.artifact.table("annotations").rows == 3 * (len(tasks) - 1)
