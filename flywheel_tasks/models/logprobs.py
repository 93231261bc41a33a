"""Log-probabilities of tokens without ever holding tokens × vocabulary.

The head is applied only where a token is asked for, block of the vocabulary by block, with a running maximum as in
online softmax: matrix products in the model's dtype, sums in fp32. When a gradient will be wanted, the same pass also
sums Σ_v p_v W_v, because ∂ log p(y)/∂h = W_y − Σ_v p_v W_v: a frozen head then costs two matrix products in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.packed import Packed, hidden_states

_LOG2E = math.log2(math.e)
_ROWS = 512
_WORDS = {"cpu": 2048, "cuda": 65536}
"""Block of the vocabulary: small enough for a CPU's cache to hold what is read several times."""


@dataclass(frozen=True)
class TokenLogprobs:
    """log p of M tokens in row order, the entropy of the distribution each was drawn from, and the row of each."""

    logprob: Tensor
    entropy: Tensor
    row: Tensor

    def sums(self, rows: int, weights: Tensor | None = None) -> Tensor:
        """The (weighted) sum of each row's log-probabilities."""
        values = self.logprob if weights is None else self.logprob * weights
        return values.new_zeros(rows).index_add(0, self.row, values)


def logprobs(
    model: nn.Module, packed: Packed, targets: ArrayLike | Tensor, *, temperature: float = 1.0
) -> TokenLogprobs:
    """log p(token | the tokens before it in its row) for every entry of `packed.index` where `targets` is true."""
    entries = target_entries(packed, targets)
    states = hidden_states(model, packed)[packed.index[entries - 1]]
    head = model.get_output_embeddings().weight
    logprob, entropy = token_logprobs(states, head, packed.target_ids[entries], temperature)
    return TokenLogprobs(logprob, entropy, packed.row_of[entries])


def target_entries(packed: Packed, targets: ArrayLike | Tensor) -> Tensor:
    """Where `targets` is true; nothing predicts a row's first token, so it can't be a target."""
    wanted = targets if isinstance(targets, Tensor) else torch.from_numpy(np.asarray(targets, dtype=bool))
    wanted = wanted.to(packed.index.device)
    if wanted.shape != packed.index.shape:
        raise InputError(
            f"{wanted.numel()} targets for {packed.index.numel()} tokens: give one for each token of a row"
        )
    if wanted[list(packed.offsets[:-1])].any():
        raise InputError("the first token of a row is a target, but nothing comes before it: give the row its prompt")
    return wanted.nonzero().squeeze(1)


def token_logprobs(states: Tensor, head: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities (differentiable) and entropies of softmax(states head' / temperature), for M states."""
    logprob, entropy = _TokenLogprobs.apply(states, head, tokens, temperature)
    return logprob, entropy


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, tokens: Tensor, temperature: float) -> Any:
        learn_states, learn_head = ctx.needs_input_grad[:2]
        chunks = [
            _chunk(rows, head, words, temperature, learn_states)
            for rows, words in zip(states.split(_ROWS), tokens.split(_ROWS), strict=True)
        ]
        logprob, lse, entropy, pull = (torch.cat(part) for part in zip(*chunks, strict=True))
        ctx.temperature = temperature
        ctx.save_for_backward(
            pull if learn_states else None, *((states, head, tokens, lse) if learn_head else (None,) * 4)
        )
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        pull, states, head, tokens, lse = ctx.saved_tensors
        grad = (grad / ctx.temperature)[:, None]
        dstates = None if pull is None else torch.mul(pull, grad, out=torch.empty_like(pull))
        dhead = None if states is None else _head_gradient(states, head, tokens, lse, grad, ctx.temperature)
        return dstates, dhead, None, None


def _chunk(states: Tensor, head: Tensor, tokens: Tensor, temperature: float, pulled: bool) -> tuple[Tensor, ...]:
    """log p, log-sum-exp, entropy, and W_y − Σ p W (empty unless `pulled`) of some rows, in one pass over the words."""
    n = states.shape[0]
    kind = states.device.type
    width = _WORDS.get(kind, 2048)
    fold = _compiled() if kind == "cuda" else _fold
    peak = states.new_full((n, 1), float("-inf"), dtype=torch.float32)
    total, weighted, chosen = (torch.zeros_like(peak) for _ in range(3))
    pull = torch.zeros_like(states, dtype=torch.float32) if pulled else None
    low = states.new_empty(n * width)
    wide = None if kind == "cuda" else states.new_empty(n * width, dtype=torch.float32)
    for begin in range(0, head.shape[0], width):
        block = head[begin : begin + width]
        m = block.shape[0]
        z = torch.mm(states, block.t(), out=low[: n * m].view(n, m))
        e = None if wide is None else wide[: n * m].view(n, m)
        p, shrink, peak, total, weighted, chosen = fold(
            z, e, tokens - begin, _LOG2E / temperature, pulled, peak, total, weighted, chosen
        )
        if pull is not None:
            pull.mul_(shrink).add_(p @ block)
    lse = peak / temperature + total.log()
    logprob = chosen / temperature - lse
    entropy = lse - weighted / total / temperature
    out = states.new_empty(0)
    if pull is not None:
        out = head[tokens].to(torch.float32).sub_(pull.div_(total)).to(states.dtype)
    return logprob[:, 0], lse[:, 0], entropy[:, 0], out


def _fold(
    z: Tensor, e: Tensor | None, places: Tensor, factor: float, pulled: bool,
    peak: Tensor, total: Tensor, weighted: Tensor, chosen: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One block of logits `z` into the running softmax: what the second product needs of it (empty unless `pulled`),
    the factor for what was summed before, and the new maximum, Σ exp, Σ exp · z and chosen logits. `places` are the
    tokens, counted from the block's first word; `e` is room for the exponentials, where the caller has some."""
    m = z.shape[1]
    inside = (places >= 0) & (places < m)
    chosen = chosen + z.gather(1, places.clamp(0, m - 1)[:, None]).float() * inside[:, None]
    higher = torch.maximum(peak, z.amax(1, keepdim=True).float())
    shrink = torch.exp2((peak - higher) * factor)
    e = z.to(torch.float32, copy=True) if e is None else e.copy_(z)
    e = torch.add(higher * -factor, e, alpha=factor, out=e).exp2_()
    total = total * shrink + e.sum(1, keepdim=True)
    p = e.to(z.dtype, copy=True) if pulled else z.new_empty(0)
    weighted = weighted * shrink + e.mul_(z).sum(1, keepdim=True)
    return p, shrink, higher, total, weighted, chosen


@cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    """`_fold` by Inductor, once for all shapes."""
    return torch.compile(_fold, dynamic=True, fullgraph=True)


def _head_gradient(
    states: Tensor, head: Tensor, tokens: Tensor, lse: Tensor, grad: Tensor, temperature: float
) -> Tensor:
    """Σ grad · (onehot(token) − p) h', block of words by block."""
    dhead = torch.zeros_like(head)
    width = _WORDS.get(states.device.type, 2048)
    for rows in torch.arange(len(tokens), device=tokens.device).split(_ROWS):
        h, g = states[rows], grad[rows]
        for begin in range(0, head.shape[0], width):
            block = slice(begin, begin + width)
            p = (h @ head[block].t()).float().div_(temperature).sub_(lse[rows, None]).exp_().mul_(g)
            dhead[block].addmm_(p.to(h.dtype).t(), h, alpha=-1)
    return dhead.index_add_(0, tokens, (states * grad).to(head.dtype))
