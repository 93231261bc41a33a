"""What a LoRA adapter is, as a stage's configuration states it."""

from __future__ import annotations

from pydantic import Field, field_validator

from flywheel_tasks.core.config import StageConfig

_HEADS = ("lm_head", "embed_out")


class Lora(StageConfig):
    """Low-rank adapters on the linears of a model: W x + alpha / rank · B A x."""

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1, description="above 0, layers run on transformers' slower path")
    targets: tuple[str, ...] = Field((), description="names of linears, such as q_proj (empty: all but the head)")

    @field_validator("targets", mode="before")
    @classmethod
    def _all(cls, value: object) -> object:
        return () if value == "all-linear" else value

    @field_validator("targets")
    @classmethod
    def _not_the_head(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if heads := [name for name in targets if name.rsplit(".", 1)[-1] in _HEADS]:
            raise ValueError(f"lora.targets {heads[0]}: an adapter on the head is not trained: leave it out")
        return targets
