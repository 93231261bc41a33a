"""Configuration of rejection sampling."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from flywheel_tasks.core.config import ModelConfig, Operational, StageConfig, model_of
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig
from flywheel_tasks.style.monitor import StyleConfig

Signal = Literal["continue", "thumb_up"]
USABLE: tuple[Signal, ...] = ("continue", "thumb_up")


class ThresholdConfig(StageConfig):
    """τ of Algorithm 1: a reward, or the quantile of the best rewards that must be reached."""

    value: float | None = Field(None, description="absolute: a response of less reward is never kept")
    quantile: float | None = Field(
        0.5, ge=0, lt=1, description="the best response must be above this share of the best"
    )
    by: tuple[Literal["locale", "jtbd", "source"], ...] = Field(
        (), description="quantiles of each segment by itself instead of one for all"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> ThresholdConfig:
        if (self.value is None) == (self.quantile is None):
            raise ValueError("set threshold.value or threshold.quantile, and the other one to null")
        if self.value is not None and self.by:
            raise ValueError("an absolute threshold.value is the same in every segment: leave threshold.by empty")
        return self


class RejectionConfig(StageConfig):
    policy: ModelConfig = model_of("policy", "the policy in production")
    candidates: tuple[ModelConfig, ...] = model_of("candidates", "the rest of the pool, the larger sibling among them")
    least_policies: int = Field(
        2, ge=1, description="policies that the pool must have; 1 says that a single one is meant"
    )
    engine: EngineConfig = EngineConfig()
    sampling: SamplingConfig = SamplingConfig(k=8)
    threshold: ThresholdConfig = ThresholdConfig()
    signals: dict[str, float] = Field(
        {"continue": 0.25, "thumb_up": 0.25},
        description="weight of each user signal in the ranking, beside 1 for the reward, in standard deviations "
        "within a prompt",
    )
    style: StyleConfig = StyleConfig()
    keep_unfinished: bool = Field(
        False, description="also choose among responses that were cut at sampling.max_tokens (infinity loops)"
    )
    explore: float = Field(
        0.2, ge=0, le=1, description="share of prompts routed by chance, so that policies stay known"
    )
    segments: tuple[Literal["locale", "jtbd", "source"], ...] = Field(
        ("locale", "jtbd"), description="what the router tells prompts apart by"
    )
    older_versions: bool = Field(
        False,
        description="also use prompts that another model version than the champion answered (Sec. 3.5.2 advises not)",
    )
    most_prompts: int | None = Field(None, ge=1, description="prompts sampled at most, chosen by hash (empty: all)")
    chunk: int = Field(64, ge=1, description="prompts that are committed together", json_schema_extra=Operational)
    deadline_s: float | None = Field(
        None, gt=0, description="most seconds for all generation of one policy", json_schema_extra=Operational
    )

    @model_validator(mode="after")
    def _a_pool(self) -> RejectionConfig:
        pool = sorted({model.path for model in (self.policy, *self.candidates)})
        if len(pool) < self.least_policies:
            raise ValueError(
                f"the pool is {', '.join(pool)}, but Algorithm 1 chooses among {self.least_policies}: name the larger "
                "sibling in models.candidates, or set least_policies to 1"
            )
        return self

    @field_validator("signals")
    @classmethod
    def _only_reliable(cls, signals: dict[str, float]) -> dict[str, float]:
        for name, weight in signals.items():
            if name not in USABLE:
                raise ValueError(
                    f"signal '{name}' may not rank responses: only {' and '.join(USABLE)} proved reliable (Sec. 2.3.2)"
                )
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"the weight of signal '{name}' is {weight}: it is 0 or more")
        return signals
