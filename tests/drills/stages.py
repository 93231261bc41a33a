"""Two small stages that use every kind of output, so that a drill passes through every step the store takes."""

from __future__ import annotations

import datetime as dt
import os

import numpy as np
import pyarrow as pa
from pydantic import Field

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import FlywheelConfig, StageConfig, StoreConfig, TrackingConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Stage

CYCLE = "2026-W47"


class DrillConfig(StageConfig):
    rows: int = Field(300, ge=0, description="rows of activity")
    serial: int = Field(0, ge=0, description="changes the artifact's key and nothing else")
    user: str = Field("", description="a pseudonym that gets one row in each part")
    signed: bool = Field(False, description="write the process id into two outputs, so that a mixture would show")


class DrillStage(Stage):
    @property
    def code_version(self) -> str:
        return "drill"


def first(inputs: Inputs, config: DrillConfig, out: Output) -> None:
    """A table of two parts, quarantine, JSON, a loose file and a checkpoint folder, all of fixed content."""
    signature = f"process {os.getpid()}" if config.signed else "unsigned"
    rng = np.random.default_rng(1)
    day = dt.date(2026, 11, 16)
    for part in range(2):
        with out.table("activity") as writer:
            for start in range(0, config.rows, 100):
                count = min(100, config.rows - start)
                units = [f"{part}-{start + i:04d}" for i in range(count)]
                sends = rng.integers(1, 2**40, count)
                writer.write(pa.table({"unit_id": units, "day": [day] * count, "sends": sends}))
            if config.user:
                writer.write(pa.table({"unit_id": [config.user], "day": [day], "sends": [1]}))
    bad = {"row_id": ["r1", "r2"], "reason": ["too_odd", "too_even"], "where": ["f:1", "f:2"]}
    none = pa.nulls(2, pa.string())
    out.reject(pa.table({**bad, "user": none, "raw": none}, schema=schemas.QUARANTINE))
    out.json("report", {"rows": config.rows, "who": signature})
    out.file("plot", "plot.png").write_bytes(b"\x89PNG" + bytes(range(256)) * 20)
    weights = out.folder("model")
    (weights / "model.safetensors").write_bytes(bytes(5000) + signature.encode())
    (weights / "config.json").write_text("{}")
    out.metric("half", 0.5)
    kept = 2 * config.rows + (2 if config.user else 0)
    out.account("unit", rows_in=kept + 2, rows_out=kept)


def second(inputs: Inputs, config: DrillConfig, out: Output) -> None:
    """Reads the first stage's table and sums it."""
    table = inputs["activity"].read()
    out.json("report", {"sends": sum(table["sends"].to_pylist())})
    with out.table("activity") as writer:
        writer.write(table)
    out.account("unit", rows_in=table.num_rows, rows_out=table.num_rows)


FIRST = DrillStage(
    name="drill-first", phase="curation", paper="none", run=first, config=DrillConfig,
    outputs={"activity": "activity", "report": "json", "plot": "file", "model": "checkpoint"},
)  # fmt: skip
SECOND = DrillStage(
    name="drill-second", phase="curation", paper="none", run=second, config=DrillConfig,
    inputs={"activity": Input("drill-first", "activity")}, outputs={"activity": "activity", "report": "json"},
)  # fmt: skip


def config_for(store_uri: str, **settings: int | str) -> FlywheelConfig:
    stage_config = DrillConfig.model_validate(settings)
    return FlywheelConfig(
        profile="test",
        store=StoreConfig(uri=store_uri),
        tracking=TrackingConfig(uri="sqlite:////nonexistent"),
        stages={"drill-first": stage_config, "drill-second": stage_config},
    )
