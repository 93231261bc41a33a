"""Do engine and trainer run the same weights? A fixed-prompt comparison of logprobs (Sec. 2.4.3: π_gen against π_old).

The engine draws a few tokens after each probe prompt; the trainer says how likely it holds them. Drawing, not
scoring, is compared because that is how rollouts are made: it reads the prefix cache, so prompts that the engine has
seen under other weights show whether the cache was reset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.engine_wire import Request

TrainerLogprobs = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Sequence[Sequence[float]]]
"""(prompts, responses) → log p of each response token, at temperature 1."""


class ProbeConfig(BaseModel):
    """Bounds that separate bfloat16's rounding from wrong weights: equal weights were seen to differ by up to 0.2, and
    by 0.06 in the mean; a head that missed one large update by 3.8. A single update of a usual rate is within them:
    that it arrived, arrival.py says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(16, ge=1, description="tokens compared after each probe prompt")
    most: float = Field(0.3, gt=0, description="largest difference of one token's logprob that is still rounding")
    mean: float = Field(0.07, gt=0, description="largest mean difference that is still rounding")


@dataclass(frozen=True)
class Drift:
    """|log π_engine − log π_trainer| over the probe's tokens."""

    most: float
    mean: float
    tokens: int

    def metrics(self) -> dict[str, float]:
        return {"probe/drift_max": self.most, "probe/drift_mean": self.mean}


def drift(engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]]) -> Drift:
    """How far apart two sides hold the same tokens. NaN on either side is no agreement."""
    lengths = [(len(a), len(b)) for a, b in zip(engine, trainer, strict=True)]
    if any(a != b for a, b in lengths):
        raise FlywheelError(f"the trainer gave logprobs for other tokens than the engine drew: {lengths[:3]}")
    apart = np.abs(np.concatenate([np.subtract(a, b) for a, b in zip(engine, trainer, strict=True)]))
    if apart.size == 0:
        raise FlywheelError("the probe drew no tokens: give it prompts")
    apart = np.where(np.isnan(apart), np.inf, apart)
    return Drift(float(apart.max()), float(apart.mean()), int(apart.size))


def probe(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    trainer_logprobs: TrainerLogprobs,
    config: ProbeConfig | None = None,
    *,
    check: bool = True,
) -> Drift:
    """The drift between every replica of an engine and its trainer, or an error past the bounds.

    Use the same prompts each time, some longer than a cache block (32 tokens on CPU, 16 on a GPU)."""
    config = config or ProbeConfig()
    requests = [Request(f"probe-{number}", list(prompt)) for number, prompt in enumerate(prompts)]
    sampling = Sampling(max_tokens=config.tokens)
    drawn = [c for replica in range(engine.replicas) for c in engine.generate(requests, sampling, replica=replica)]
    failed = [completion for completion in drawn if completion.finish == "error"]
    if failed:
        raise FlywheelError(f"the engine refused {failed[0].id}: {failed[0].reason}: choose other probe prompts")
    responses = [completion.tokens for completion in drawn]
    found = drift(
        [completion.logprobs for completion in drawn], trainer_logprobs(list(prompts) * engine.replicas, responses)
    )
    if check and (found.most > config.most or found.mean > config.mean):
        raise FlywheelError(
            f"the engine does not run the trainer's weights: logprobs differ by up to {found.most:.3g} (bound "
            f"{config.most:g}), {found.mean:.3g} in the mean (bound {config.mean:g}): update the engine with the whole "
            "model before it generates"
        )
    return found
