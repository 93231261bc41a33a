"""Every loss of the paper as a pure function of scores or log-probabilities (eq. 1, 2, 6, 8; Sec. 2.4.2, 2.4.3).

All of them return one value per row or per token and never reduce: the caller sums, and the loop divides by the count
of the whole global batch, so that neither micro-batches nor workers change an update.

Tokens are flat: `row[i]` says to which sequence token i belongs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Level = Literal["token", "sequence"]
Estimator = Literal["k1", "k2", "k3"]


def pointwise(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 1: Bradley-Terry on the two scalar rewards of a pair."""
    return -F.logsigmoid(chosen - rejected)


def pairwise(logit: Tensor, y0_wins: Tensor) -> Tensor:
    """Eq. 2-4: `logit` is s(x, y0, y1); `y0_wins` is t."""
    return F.binary_cross_entropy_with_logits(logit, y0_wins.to(logit.dtype), reduction="none")


def signal(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6-7, one column per signal: the losses and which labels are known. A missing label (NaN) costs nothing."""
    known = ~labels.isnan()
    targets = torch.where(known, labels, 0.0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(known, losses, 0.0), known


def sft(logprob: Tensor) -> Tensor:
    """Negative log-likelihood of the trained tokens; the mask was applied when their log-probabilities were taken."""
    return -logprob


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sigmoid DPO on summed log-probabilities of the responses (Sec. 2.4.2).

    With `lengths` (tokens behind each sum) every side is averaged over its tokens, so a longer response has no larger
    say. `smoothing` is the assumed share of wrong labels. Whether the sums hold the end-of-turn token is the caller's
    mask: Table 7 leaves it out, because a rejected response would teach the policy not to stop.
    """
    up, down = chosen - ref_chosen, rejected - ref_rejected
    if lengths is not None:
        up, down = up / lengths[0].clamp(min=1), down / lengths[1].clamp(min=1)
    margin = beta * (up - down)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def online_dpo(
    logprob: Tensor, reference: Tensor, rewards: Tensor, *, beta: float, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Online DPO (Sec. 2.4.3) on [groups, k] summed log-probabilities: the best against the worst of each group.

    Returns the losses and which groups count: where all rewards are equal there is nothing to prefer.
    """
    best, worst = best_worst(rewards)
    pick = [t.gather(1, i[:, None]).squeeze(1) for t in (logprob, reference) for i in (best, worst)]
    losses = dpo(pick[0], pick[1], pick[2], pick[3], beta=beta, smoothing=smoothing)
    informative = rewards.amax(1) > rewards.amin(1)
    return torch.where(informative, losses, 0.0), informative


def best_worst(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the highest and of the lowest reward of each group; ties go to the first."""
    return rewards.argmax(1), rewards.argmin(1)


def advantages(rewards: Tensor, *, normalise: bool = True, epsilon: float = 1e-4) -> Tensor:
    """Group-relative advantages of [groups, k] rewards: each minus its group's mean, over its spread if `normalise`.

    A group whose rewards are all equal, and a group of one, has advantage zero: there is nothing to learn from it.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if not normalise or rewards.shape[1] < 2:
        return centred
    return centred / (rewards.std(1, keepdim=True) + epsilon)


def kl(logprob: Tensor, reference: Tensor, estimator: Estimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) on tokens of the policy; k3 is unbiased and never negative."""
    log_ratio = reference - logprob
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1


def grpo(
    logprob: Tensor,
    old: Tensor,
    gen: Tensor,
    reference: Tensor,
    advantage: Tensor,
    row: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    cap: float = 2.0,
    beta: float = 0.0,
    level: Level = "token",
    estimator: Estimator = "k3",
) -> Tensor:
    """Eq. 8, negated, one value per token: `advantage` is given per token (A_t, the same over a response).

    `old` is the learner's policy when the step began and `gen` the engine's that sampled; their ratio is a constant
    weight, truncated at `cap` so that a few tokens on which engine and learner disagree can't carry the step. Ratios
    are per token by default: a product over a response has a variance that grows with its length. `sequence` takes the
    geometric mean over the response for both ratios instead. Tokens of one response share `row`.
    """
    ratio = ratios(logprob, old, row, level)
    weight = ratios(old, gen, row, level).clamp(max=cap).detach()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    surrogate = weight * torch.minimum(ratio * advantage, clipped * advantage)
    return -surrogate + beta * kl(logprob, reference, estimator) if beta else -surrogate


def clipped_share(
    logprob: Tensor, old: Tensor, advantage: Tensor, row: Tensor, *, clip: float, clip_high: float | None, level: Level
) -> Tensor:
    """Per token: 1 where the clip of eq. 8 has cut the gradient off."""
    ratio = ratios(logprob, old, row, level)
    low, high = ratio < 1 - clip, ratio > 1 + (clip if clip_high is None else clip_high)
    return torch.where(advantage < 0, low, high).to(logprob.dtype)


def row_sums(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sum of the token values of each sequence."""
    return values.new_zeros(rows).index_add(0, row, values)


def row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of the token values of each sequence; 0 where it has no token."""
    return row_sums(values, row, rows) / row_sums(torch.ones_like(values), row, rows).clamp(min=1)


def ratios(above: Tensor, below: Tensor, row: Tensor, level: Level) -> Tensor:
    """exp of log above - log below, per token; or its geometric mean over the response, at each of its tokens."""
    log_ratio = above - below
    if level == "sequence":
        rows = int(row.max()) + 1 if row.numel() else 0
        log_ratio = row_means(log_ratio, row, rows)[row]
    return log_ratio.exp()
