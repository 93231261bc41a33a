"""From encoded rows to a stage's checkpoint: what every trained stage does between its data and its report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.rows import RowFile
from flywheel_tasks.training.run import Trained, train, untimed
from flywheel_tasks.training.task import Task

MODEL, STEPS = "model", "steps"


class LearnConfig(StageConfig):
    """What every trained stage is told."""

    train: TrainingConfig = TrainingConfig()
    placement: PlacementConfig = Field(PlacementConfig(), json_schema_extra=Operational)
    lora: Lora | None = Field(Lora(), description="low-rank adapters, merged at the end (null: train all weights)")
    max_tokens: int = Field(2048, ge=16, description="history is cut from the left to fit; the response never is")


def learn(task: Task, tables: Iterable[pa.Table], config: LearnConfig, out: Output) -> dict[str, Any]:
    """Train on the tables' rows, log every step, and write the last model to `model` and earlier ones to `steps`."""
    rows, trained = fit(task, tables, config, out, "train")
    keep(trained, out)
    return {"rows": rows, "steps": trained.steps, "last": untimed(trained.metrics)}


def fit(task: Task, tables: Iterable[pa.Table], config: LearnConfig, out: Output, name: str) -> tuple[int, Trained]:
    """Train on the tables' rows and log every step under `name`. Its folder lets the next attempt go on from there."""
    rows = RowFile.write(f"{out.partial.uri}/{name}/rows.arrow", tables)
    folder = f"{out.partial.uri}/{name}/run"
    log = _logger(out, name)
    return rows.rows, train(task, rows, config.train, config.placement, seed=out.seed, folder=folder, on_metrics=log)


def keep(trained: Trained, out: Output, step: int | None = None, steps: Collection[int] | None = None) -> None:
    """Hand the model of `step` (the last one unless told) to the stage's output, and the others as its steps, or those
    of them that `steps` names."""
    chosen = trained.published[-1].step if step is None else step
    for model in trained.published:
        if model.step == chosen:
            trained.fetch(out.folder(MODEL), model)
        elif steps is None or model.step in steps:
            trained.fetch(_made(out.folder(STEPS) / f"step-{model.step:06d}"), model)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _logger(out: Output, prefix: str) -> Any:
    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            out.metric(f"{prefix}/{name}", value, step=step)

    return log
