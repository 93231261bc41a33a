"""Configuration of online RL."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding.exported import RoundingConfig, ServingConfig
from flywheel_tasks.herding.guardrail import GuardrailConfig
from flywheel_tasks.herding.prompt_selection import SelectionConfig
from flywheel_tasks.herding.reward import RewardConfig, without_signals
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig
from flywheel_tasks.training.config import TrainingConfig
from flywheel_tasks.training.learn import LearnConfig
from flywheel_tasks.training.rl import LossConfig


class DriftConfig(StageConfig):
    """How engine and learner are compared after every hand-over of weights. bfloat16's rounding was seen to give up to
    0.3 at one token and 0.08 in the mean of so few. What is beyond the bounds is another model: a wrong merge, a layer
    that kept its weights for many updates. One update is far below them; that it arrived, a checksum says."""

    prompts: int = Field(4, ge=1, le=64, description="prompts of the comparison, the same after every step")
    tokens: int = Field(4, ge=1, description="tokens drawn and compared after each of them")
    most: float = Field(0.6, gt=0, description="largest difference of one token's logprob that is still rounding")
    mean: float = Field(0.15, gt=0, description="largest mean difference that is still rounding")


class RlConfig(LearnConfig):
    train: TrainingConfig = Field(
        TrainingConfig(steps=200, epochs=4, batch=64, learning_rate=2e-5, floor=1.0),
        description="a row of the batch is one prompt with its k responses; steps are optimiser steps",
    )
    loss: LossConfig = Field(LossConfig(), description="GRPO or online DPO, and π_ref")
    sampling: SamplingConfig = Field(
        SamplingConfig(k=8), description="responses per prompt, drawn from the policy itself"
    )
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    selection: SelectionConfig = Field(SelectionConfig(), description="which prompts are learnt from")
    guardrail: GuardrailConfig = Field(GuardrailConfig(), description="when the policy is good enough, or too good")
    drift: DriftConfig = Field(DriftConfig(), description="the logprob probe after every weight sync")
    exported: RoundingConfig = Field(
        RoundingConfig(), description="the output served once and held against its trainer",
        json_schema_extra=Operational,
    )  # fmt: skip
    language: LanguageConfig = Field(LanguageConfig(), description="how the language of a text is told")
    ahead: bool = Field(
        False, description="generate the next batch while learning on this one: one step off-policy, corrected"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs of each engine", json_schema_extra=Operational)
    rollout_gpus: float = Field(
        0, ge=0, json_schema_extra=Operational,
        description="GPUs of the rollouts' process: of its scoring models, and without replicas or a cluster of its "
        "engine too (0: it sees all of this machine's)",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _no_signal(cls, values: Any) -> Any:
        return without_signals(values)

    @field_validator("sampling")
    @classmethod
    def _a_group_of_the_policy(cls, sampling: SamplingConfig) -> SamplingConfig:
        if sampling.k < 2:
            raise ValueError("sampling.k is 1: a response is compared within its group, so draw 2 or more per prompt")
        if sampling.top_p < 1:
            raise ValueError("sampling.top_p below 1 draws from another policy than eq. 8 learns: set it to 1")
        return sampling

    @model_validator(mode="after")
    def _fits(self) -> RlConfig:
        if self.sampling.max_tokens >= self.max_tokens:
            raise ValueError(
                f"sampling.max_tokens {self.sampling.max_tokens} leaves no room for a prompt in max_tokens "
                f"{self.max_tokens}: lower it"
            )
        if self.train.publish_every not in (None, self.guardrail.every):
            raise ValueError(
                "train.publish_every: checkpoints are kept where they are measured: leave it out, or set "
                "guardrail.every"
            )
        if self.placement.gpus and not self.rollout_gpus:
            raise ValueError(
                f"rollout_gpus 0 puts scoring models and engine on the GPUs of the learners (placement.gpus "
                f"{self.placement.gpus}): set rollout_gpus to {self.tensor_parallel} on one machine, where the engine "
                "is in that process; to 1 on a cluster or with replicas, which get tensor_parallel GPUs each beside it"
            )
        if self.lora and self.lora.dropout:
            raise ValueError("lora.dropout: ratios compare the policy with what the engine served, so nothing may drop")
        odd = [
            name
            for name, every in (("guardrail.every", self.guardrail.every), ("placement.save_every", self.save_every))
            if every % self.loss.updates
        ]
        if odd:
            raise ValueError(f"{odd[0]} must be a multiple of loss.updates: a rollout is not cut in two")
        return self

    @property
    def save_every(self) -> int:
        return self.placement.save_every

    @property
    def serving(self) -> ServingConfig:
        """The output is served as its rollouts were, by one engine."""
        engine = self.engine.model_copy(update={"replicas": 1})
        return ServingConfig(engine=engine, tensor_parallel=self.tensor_parallel, **self.exported.model_dump())

    def training(self, prompts: int) -> TrainingConfig:
        """As the loop is told: so many passes over the prompts, at most `steps`, and a model at every measurement."""
        rollouts = -(-prompts // self.train.batch) * self.train.epochs
        steps = min(self.train.steps or rollouts * self.loss.updates, rollouts * self.loss.updates)
        whole = max(steps // self.loss.updates, 1) * self.loss.updates
        return self.train.model_copy(update={"steps": whole, "publish_every": self.guardrail.every})
