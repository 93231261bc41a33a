"""Causal attention of a packed batch, registered with transformers as the attention function `packed`.

Each segment attends to the segments above it and causally to itself. On CPU this is a handful of batched matrix
products per segment with a handwritten backward, which recomputes the probabilities instead of keeping them; torch's
own CPU flash kernel was measured 2.5 times slower forward and 5 times slower backward at 400 tokens. On CUDA it is one
call of torch's variable-length flash kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models.packed import Packed

NAME = "packed"
_QUERIES = 256
"""Queries per block: later keys than a block's last query are never touched."""


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    """q [T, heads, d], k and v [T, key heads, d] → [T, heads, d]."""
    if q.is_cuda:
        return _varlen(q, k, v, packed, scale)
    out: Tensor = _Attention.apply(q, k, v, packed, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.packed, ctx.scale = packed, scale
        out = torch.empty_like(q)
        for rows, keys, causal, heads in _blocks(q, k, packed):
            probabilities = _probabilities(_by_key_head(q, rows, heads), _gather(k, keys), causal, scale)
            _scatter(out, rows, torch.bmm(probabilities, _gather(v, keys)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys, causal, heads in _blocks(q, k, ctx.packed):
            queries, seen, g = _by_key_head(q, rows, heads), _gather(k, keys), _by_key_head(grad, rows, heads)
            p = _probabilities(queries, seen, causal, ctx.scale)
            _add_back(dv, keys, torch.bmm(p.transpose(1, 2), g))
            ds = torch.bmm(g, _gather(v, keys).transpose(1, 2))
            ds = torch._softmax_backward_data(ds, p, -1, p.dtype).mul_(ctx.scale)
            _scatter(dq, rows, torch.bmm(ds, seen))
            _add_back(dk, keys, torch.bmm(ds.transpose(1, 2), queries))
        return dq, dk, dv, None, None


def _blocks(q: Tensor, k: Tensor, packed: Packed) -> Iterator[tuple[slice, tuple[slice, ...], Tensor, int]]:
    """Query rows, the slices of keys they may see, the mask over the last of these, and the number of key heads."""
    for own, above in packed.segments:
        for start in range(own.start, own.stop, _QUERIES):
            stop = min(start + _QUERIES, own.stop)
            mask = _causal(q.dtype)[: stop - start, : stop - start]
            yield slice(start, stop), (*above, slice(own.start, stop)), mask, k.shape[1]


@lru_cache(maxsize=4)
def _causal(dtype: torch.dtype) -> Tensor:
    """Minus infinity where a query would see a later key. The keys before a block's first query need no mask."""
    return torch.full((_QUERIES, _QUERIES), float("-inf"), dtype=dtype).triu_(1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(q k' scale + mask) for [key heads, group × queries, keys]."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    n, m = mask.shape
    scores.view(k.shape[0], -1, n, scores.shape[-1])[..., scores.shape[-1] - m :].add_(mask)
    return torch.softmax(scores, -1)


def _by_key_head(x: Tensor, rows: slice, heads: int) -> Tensor:
    """[T, heads, d] → [key heads, group × rows, d]: query heads that share a key head are one matrix product."""
    part = x[rows]
    return part.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).reshape(heads, -1, part.shape[-1])


def _scatter(out: Tensor, rows: slice, x: Tensor) -> None:
    part = out[rows]
    heads, n, d = x.shape[0], part.shape[0], x.shape[-1]
    part.view(n, heads, -1, d).copy_(x.view(heads, -1, n, d).permute(2, 0, 1, 3))


def _gather(x: Tensor, slices: tuple[slice, ...]) -> Tensor:
    parts = [x[s] for s in slices]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)


def _add_back(out: Tensor, slices: tuple[slice, ...], x: Tensor) -> None:
    begin = 0
    for s in slices:
        n = s.stop - s.start
        out[s].add_(x[:, begin : begin + n].transpose(0, 1))
        begin += n


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scale: float) -> Tensor:
    """Keys and values are laid out once per path through the tree; the kernel aligns its causal mask to the end."""
    from torch.nn.attention.varlen import varlen_attn

    path, starts_q, starts_k, longest_q, longest_k = _paths(packed, q.device)
    gqa = q.shape[1] != k.shape[1]
    out: Tensor = varlen_attn(
        q, k[path], v[path], starts_q, starts_k, longest_q, longest_k, scale=scale, window_size=(-1, 0), enable_gqa=gqa
    )
    return out


def _paths(packed: Packed, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    runs = [[torch.arange(s.start, s.stop) for s in (*above, own)] for own, above in packed.segments]
    keys = [sum(map(len, run)) for run in runs]
    queries = [own.stop - own.start for own, _ in packed.segments]
    starts = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in (queries, keys)]
    path = torch.cat([part for run in runs for part in run])
    return path.to(device), starts[0].to(device), starts[1].to(device), max(queries), max(keys)


def _interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, heads, T, d] in, [1, T, heads, d] out."""
    packed = kwargs.get("packed")
    if packed is None:
        raise FlywheelError("this model was loaded for packed batches: call hidden_states, or generate with the engine")
    check_plain(module, packed, kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, packed, kwargs.get("scaling") or query.shape[-1] ** -0.5)[None], None


def check_plain(module: Any, packed: Packed, options: Mapping[str, Any]) -> None:
    """Refuse what this attention would silently compute otherwise."""
    window = options.get("sliding_window")
    if window is not None and packed.longest > window:
        raise InputError(
            f"the model attends to the last {window} tokens only, and a row has {packed.longest}: set max_tokens to "
            f"{window} or less"
        )
    if odd := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:
        raise InputError(f"{type(module).__name__} needs '{odd[0]}', which packed batches lack: take another model")


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers. It has no mask function: no mask is ever built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _interface)
