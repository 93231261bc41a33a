"""Online RL on groups of responses (Sec. 2.4.3): eq. 8 and online DPO, two losses over the same rollouts.

A training row is what the policy said to one prompt: k responses that share it, what the engine held likely of every
token when it drew it (π_gen), and the reward of each. π_ref of eq. 8 is an average of checkpoints (ema.py) and π_old
the policy as the rollout met it, so a run holds one model: the weights are lent to the average, or to π_old, for the
pass that needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.training import policy, rows
from flywheel_tasks.training.task import Loss, Step, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from flywheel_tasks.models.logprobs import TokenLogprobs
    from flywheel_tasks.models.packed import Packed
    from flywheel_tasks.training.ema import Ema

ROWS = rows.schema(
    rows.TRAINED,
    pa.field("gen", pa.list_(pa.list_(pa.float32())), nullable=False),
    pa.field("reward", pa.list_(pa.float64()), nullable=False),
)
"""`gen` holds log π_gen of the trained tokens of every response, `reward` what each response earned."""


class GrpoConfig(StageConfig):
    """Eq. 8. Ratios are per token unless told: a product over a response has a variance that grows with its length,
    and clips whole responses. A geometric mean over the response (`sequence`) is steadier where a mixture-of-experts
    engine and learner route tokens apart; it needs a clip of a few thousandths, since it hardly moves."""

    clip: float = Field(0.2, gt=0, lt=1, description="ε of eq. 8")
    clip_high: float | None = Field(None, gt=0, description="ε above 1, where it differs (empty: the same)")
    cap: float = Field(2.0, ge=1, description="largest weight π_old/π_gen of a token")
    beta: float = Field(0.04, ge=0, description="weight of the KL to the reference (0: no reference is computed)")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k2",
        description="how the KL is estimated in the loss: on the policy's own tokens the gradient of k2 is that of "
        "D_KL(π_θ ‖ π_ref), which eq. 8 prints; that of k3 is the opposite divergence's, and that of k1 is zero",
    )
    level: Literal["token", "sequence"] = Field("token", description="ratios per token or per response")
    normalise: bool = Field(True, description="advantages over their group's spread, or only minus its mean")
    mean: Literal["token", "response"] = Field(
        "token", description="every token counts alike, or every response: the latter forgives long bad ones"
    )


class OnlineDpoConfig(StageConfig):
    """Online DPO: the best of k against the worst."""

    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
    smoothing: float = Field(0.0, ge=0, lt=0.5, description="chance that a reward ranks the two wrongly")
    mask_eot: bool = Field(True, description="leave the end-of-turn token out of the loss (Table 7: infinity loops)")


class ReferenceConfig(StageConfig):
    """π_ref: an exponential moving average of the initial and intermediate checkpoints."""

    decay: float = Field(0.99, ge=0, le=1, description="share of the average that stays (1: the first policy)")
    every: int = Field(1, ge=1, description="optimiser steps between the checkpoints that enter it")


class LossConfig(StageConfig):
    """Which loss, and what each is told: an A/B of the two (Sec. 3.5.3) is the one key `kind`."""

    kind: Literal["grpo", "online_dpo"] = "grpo"
    grpo: GrpoConfig = GrpoConfig()
    online_dpo: OnlineDpoConfig = OnlineDpoConfig()
    reference: ReferenceConfig = ReferenceConfig()
    updates: int = Field(1, ge=1, le=16, description="optimiser steps on each rollout; beyond 1 the clip is at work")

    @model_validator(mode="after")
    def _one_pair_one_update(self) -> LossConfig:
        if self.kind == "online_dpo" and self.updates > 1:
            raise ValueError("updates: online DPO has no ratio that would hold several updates back: leave it at 1")
        return self

    @property
    def has_reference(self) -> bool:
        return self.kind == "online_dpo" or self.grpo.beta > 0

    @property
    def mask_eot(self) -> bool:
        return self.kind == "online_dpo" and self.online_dpo.mask_eot


def group(
    row_id: str,
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    gen: Sequence[Sequence[float]],
    rewards: NDArray[np.float64],
    config: LossConfig,
    stop: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    """One training row. Online DPO learns from two of the k responses, so only these two reach the learner.

    `stop` are the tokens that end a turn: where the loss leaves them out they are read but no target."""
    taken = range(len(responses))
    if config.kind == "online_dpo":
        taken = (int(rewards.argmax()), int(rewards.argmin()))  # type: ignore[assignment]
    start = [False] * len(prompt)
    trained, kept = [], []
    for i in taken:
        ends = config.mask_eot and len(responses[i]) > 0 and responses[i][-1] in stop
        marks = [True] * (len(responses[i]) - ends) + [False] * ends
        trained.append(start + marks)
        kept.append([value for value, mark in zip(gen[i], marks, strict=True) if mark])
    ids = [np.array([*prompt, *responses[i]], np.int32) for i in taken]
    tokens = sum(map(len, kept))
    count = 1.0 if config.kind == "online_dpo" else tokens if config.grpo.mean == "token" else len(ids)
    return rows.row(row_id, ids, float(count), trained=trained, gen=kept, reward=[float(rewards[i]) for i in taken])


GRPO_METRICS = ("loss/policy", "loss/kl", "kl", "clipped", "entropy", "weight", "weight/capped", "gap")
DPO_METRICS = ("accuracy", "margin", "kl", "entropy", "gap")


def task(base: Path, config: LossConfig, *, temperature: float = 1.0, lora: Any = None, **loading: Any) -> Task:
    """What the loop needs; `hooks(config)` go with it. `temperature` is what the engine samples with: the policy of
    eq. 8 is the one that speaks."""
    build, save = partial(policy.build, base, lora, loading), partial(policy.save, base)
    if config.kind == "grpo":
        return Task(build, partial(grpo_loss, config.grpo, temperature), save, GRPO_METRICS)
    return Task(build, partial(dpo_loss, config.online_dpo, temperature), save, DPO_METRICS)


def hooks(config: LossConfig) -> list[Any]:
    """The averages that the loss borrows: π_ref, and π_old where a rollout is used more than once."""
    made = [partial(_reference, config.reference.decay, config.reference.every)] if config.has_reference else []
    return [*made, partial(_old, config.updates)] if config.updates > 1 else made


def grpo_loss(config: GrpoConfig, temperature: float, module: nn.Module, table: pa.Table, at: Step) -> Loss:
    """Eq. 8 on groups of responses, negated and summed."""
    import torch

    from flywheel_tasks.training import losses

    packed, wanted = policy.packed(table, at.device)
    reference = _under(_hook(at, "reference"), module, packed, wanted, temperature)
    again = _hook(at, "old")
    old = _under(again, module, packed, wanted, temperature) if again and at.step % again.every else None
    found: TokenLogprobs = module(packed, wanted, temperature)
    now, row = found.logprob, found.row
    old = now.detach() if old is None else old
    gen, rewards = _gen(table, at.device), _rewards(table, at.device)
    advantage = losses.advantages(rewards, normalise=config.normalise).flatten().to(now.dtype)[row]
    beta = config.beta if reference is not None else 0.0
    values = losses.grpo(
        now, old, gen, now.detach() if reference is None else reference, advantage, row,
        clip=config.clip, clip_high=config.clip_high, cap=config.cap, beta=beta, level=config.level,
        estimator=config.estimator,
    )  # fmt: skip
    total = values.sum() if config.mean == "token" else losses.row_means(values, row, rewards.numel()).sum()
    tokens = float(len(now))
    with torch.no_grad():
        weight = losses.ratios(old, gen, row, config.level)
        clipped = losses.clipped_share(
            now, old, advantage, row, clip=config.clip, clip_high=config.clip_high, level=config.level
        )
        sums = {
            "entropy": found.entropy.sum(),
            "clipped": clipped.sum(),
            "weight": weight.clamp(max=config.cap).sum(),
            "weight/capped": (weight > config.cap).sum(),
            "gap": (old - gen).abs().sum(),
            "loss/policy": values.sum(),
        }
        if reference is not None:
            sums["loss/kl"] = beta * losses.kl(now, reference, config.estimator).sum()
            sums["loss/policy"] = values.sum() - sums["loss/kl"]
            sums["kl"] = losses.kl(now, reference).sum()
    return Loss(total, {name: (float(value), tokens) for name, value in sums.items()}, computed=len(packed.ids))


def dpo_loss(config: OnlineDpoConfig, temperature: float, module: nn.Module, table: pa.Table, at: Step) -> Loss:
    """Online DPO on the best and the worst of each group, summed."""
    from flywheel_tasks.training import losses

    packed, wanted = policy.packed(table, at.device)
    reference = _under(_hook(at, "reference"), module, packed, wanted, temperature)
    found: TokenLogprobs = module(packed, wanted, temperature)
    if reference is None:
        raise ValueError("online DPO needs the average of checkpoints among the run's hooks")
    rewards = _rewards(table, at.device)
    now, then = (
        losses.row_sums(values, found.row, rewards.numel()).view(rewards.shape) for values in (found.logprob, reference)
    )
    values, informative = losses.online_dpo(now, then, rewards, beta=config.beta, smoothing=config.smoothing)
    gained = config.beta * (now - then).detach()
    margin = (gained.gather(1, losses.best_worst(rewards)[0][:, None])
              - gained.gather(1, losses.best_worst(rewards)[1][:, None])).squeeze(1)  # fmt: skip
    n, tokens = float(informative.sum()), float(len(found.logprob))
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    gap = (found.logprob.detach() - _gen(table, at.device)).abs()
    return Loss(
        values.sum(),
        {
            "accuracy": (float(right[informative].sum()), n),
            "margin": (float(margin[informative].sum()), n),
            "kl": (float(losses.kl(found.logprob.detach(), reference).sum()), tokens),
            "entropy": (float(found.entropy.sum()), tokens),
            "gap": (float(gap.sum()), tokens),
        },
        computed=len(packed.ids),
    )


def _gen(table: pa.Table, device: torch.device) -> Tensor:
    """log π_gen of every trained token, in the order of the policy's own log-probabilities."""
    import torch

    flat = table.column("gen").combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.astype(np.float32)).to(device)


def _rewards(table: pa.Table, device: torch.device) -> Tensor:
    """[groups, k]"""
    import torch

    flat = table.column("reward").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.astype(np.float64).reshape(table.num_rows, -1)).to(device)


def _under(average: Ema | None, module: nn.Module, packed: Packed, wanted: Tensor, temperature: float) -> Tensor | None:
    """log-probabilities under the weights that a hook keeps. Before the pass with a gradient: borrowing the module
    writes to its parameters, which that pass will have saved."""
    import torch

    if average is None:
        return None
    with torch.no_grad(), average.swapped(module):
        found: Tensor = module(packed, wanted, temperature).logprob
    return found


def _hook(at: Step, name: str) -> Ema | None:
    from flywheel_tasks.training.ema import Ema

    return next((hook for hook in at.hooks if isinstance(hook, Ema) and hook.name == name), None)


def _reference(decay: float, every: int) -> Ema:
    from flywheel_tasks.training.ema import Ema

    return Ema(decay, every, name="reference")


def _old(updates: int) -> Ema:
    """The weights at the beginning of a rollout: an average that keeps nothing."""
    from flywheel_tasks.training.ema import Ema

    return Ema(0.0, updates, name="old")
