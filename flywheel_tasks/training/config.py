"""What a training run is told: what decides the result, and where it runs."""

from __future__ import annotations

from pydantic import Field, model_validator

from flywheel_tasks.core.config import StageConfig


class TrainingConfig(StageConfig):
    """What decides the trained weights, beside model, rows and seed."""

    epochs: int = Field(1, ge=1, le=1000, description="times every row is seen")
    steps: int | None = Field(None, ge=1, description="most optimiser steps, whatever the epochs would give")
    batch: int = Field(32, ge=1, description="rows of one optimiser step, over all workers and micro-batches")
    learning_rate: float = Field(1e-4, gt=0, lt=1, description="the highest rate, after warm-up")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps over which the rate rises")
    floor: float = Field(0.1, ge=0, le=1, description="share of the highest rate that the cosine ends on")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="AdamW's, on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    publish_every: int | None = Field(
        None, ge=1, description="optimiser steps between published checkpoints (empty: the last step alone)"
    )


class PlacementConfig(StageConfig):
    """Where and in what pieces it runs; the update is the same. Use it as an operational field of a stage."""

    workers: int = Field(1, ge=1, le=4096, description="training processes")
    cpus: float | None = Field(None, gt=0, description="cores per worker (empty: a fair share of this machine)")
    gpus: int = Field(0, ge=0, le=1, description="GPUs per worker")
    shard: bool = Field(False, description="spread weights and optimiser over the workers (FSDP2), for large models")
    checkpoint_layers: bool = Field(
        False, description="keep the inputs of layers alone and compute them twice: less memory, a third more time"
    )
    token_budget: int = Field(8192, ge=1, description="tokens of one forward and backward pass")
    save_every: int = Field(50, ge=1, description="optimiser steps between the states a killed run resumes from")
    deadline_s: float = Field(900, gt=0, description="most seconds for a step, a collective or a start before it fails")
    worker_failures: int = Field(0, ge=0, description="worker deaths survived inside an attempt; the scheduler retries")

    @model_validator(mode="after")
    def _shards_need_workers(self) -> PlacementConfig:
        if self.shard and self.workers < 2:
            raise ValueError("shard spreads a model over workers: set workers to 2 or more")
        return self
