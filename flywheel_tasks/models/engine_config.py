"""How a policy is run and sampled (Sec. 2.4.1, 2.4.3): what a stage's config says about the generation engine."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from flywheel_tasks.core.config import Operational, Section


class EngineConfig(Section):
    """One engine, or several replicas of it. Only the first two fields change what comes out."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("bfloat16", description="type of the weights")
    context: int | None = Field(None, ge=16, description="most tokens of a prompt and its response; none: the model's")
    replicas: int = Field(1, ge=1, le=4096, description="engines side by side", json_schema_extra=Operational)
    sequences: int = Field(
        128, ge=1, le=4096, description="sequences generated at the same time", json_schema_extra=Operational
    )
    cache_gib: float = Field(
        2.0, gt=0, description="memory of the prefix cache on a CPU engine, GiB", json_schema_extra=Operational
    )
    gpu_memory: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="share that an engine takes of the GPU memory which is free when it starts",
        json_schema_extra=Operational,
    )
    start_seconds: float = Field(
        900, gt=0, description="an engine that is not ready by then has failed", json_schema_extra=Operational
    )
    stall_seconds: float = Field(
        180,
        gt=0,
        description="an engine that is silent this long is killed and replaced",
        json_schema_extra=Operational,
    )
    restarts: int = Field(
        5, ge=0, description="engines lost in one round of generation before it fails", json_schema_extra=Operational
    )


class SamplingConfig(Section):
    """How responses are drawn. The defaults sample from the policy itself: no temperature, no truncation."""

    k: int = Field(1, ge=1, le=1024, description="responses per prompt")
    temperature: float = Field(1.0, ge=0, le=10, description="0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="share of the probability that is sampled from")
    max_tokens: int = Field(256, ge=1, description="a response is cut here: what ends a policy that loops for ever")

    @model_validator(mode="after")
    def _greedy_is_one(self) -> Self:
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"temperature 0 gives the same response {self.k} times: set k to 1, or a temperature")
        return self

    def seeded(self, seed: int) -> Sampling:
        """The same with the seed of a run: a stage's configuration has none of its own."""
        return Sampling(**{**self.model_dump(), "seed": seed % 2**62})


class Sampling(SamplingConfig):
    """A draw: what is asked for, and the seed."""

    seed: int = Field(0, ge=0, lt=2**62, description="a response depends on this, the prompt's id and its number")
