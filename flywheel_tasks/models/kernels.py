"""The parts of a Llama layer as few-operation autograd functions: norm, linears with LoRA, rotary embedding, SwiGLU.

They compute what transformers' modules and peft's adapters compute, with three differences that decide the speed of
bfloat16 on a CPU: no activation passes through fp32 in memory (norms reduce in fp32 and scale in bf16), LoRA's fp32
master weights are cast instead of the activations, and what is cheap to recompute (normalised inputs, SiLU products,
attention probabilities) is not kept for the backward pass. Frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Linear:
    """y = x W' + b + scale (x A') B'; without an adapter `a` and `b` are None."""

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b


_PER_LINEAR = 4


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def adapted(x: Tensor, linear: Linear) -> Tensor:
    """linear(x), for layers that are not on these kernels."""
    low = None if linear.a is None else x @ linear.a.to(x.dtype).t()
    return _adapted(x, low, linear.b, linear.scale, None, linear.weight, linear.bias)


def norm_linears(x: Tensor, weight: Tensor, eps: float, linears: tuple[Linear, ...]) -> tuple[Tensor, ...]:
    """Several linears of one normalised input (query, key, value; gate, up)."""
    flat = [tensor for linear in linears for tensor in linear.tensors]
    return _NormLinears.apply(x, weight, eps, tuple(linear.scale for linear in linears), *flat)


def linear_add(residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
    """residual + linear(x)"""
    out: Tensor = _LinearAdd.apply(residual, x, None, linear.scale, *linear.tensors)
    return out


def swiglu_linear_add(residual: Tensor, gate: Tensor, up: Tensor, linear: Linear) -> Tensor:
    """residual + linear(silu(gate) · up)"""
    out: Tensor = _LinearAdd.apply(residual, gate, up, linear.scale, *linear.tensors)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [T, heads, d]; cos and sin are [T, d]."""
    out: Tensor = _Rotary.apply(x, cos[:, None, :], sin[:, None, :])
    return out


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normalise(x: Tensor, scale: Tensor) -> Tensor:
    return torch.mul(x, scale, out=torch.empty_like(x))


def _norm_backward(dy: Tensor, unit: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x for y = unit · weight, unit = x · scale; overwrites `dy`."""
    du = dy.mul_(weight)
    mean = torch.linalg.vecdot(du.float(), unit.float()).div_(du.shape[-1])[:, None]
    return torch.mul(du.sub_(unit * mean.to(du.dtype)), scale, out=du)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return _normalise(x, scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        unit = _normalise(x, scale)
        dw = (dy.float() * unit).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return _norm_backward(dy.clone(), unit, scale, weight), dw, None


def _forward(y: Tensor | None, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """(y +) x W' + bias; the sum is the matrix product's own, in fp32."""
    if y is None:
        return F.linear(x, w, bias)
    y = torch.addmm(y, x, w.t())
    return y if bias is None else y.add_(bias)


def _adapted(
    x: Tensor,
    low: Tensor | None,
    b: Tensor | None,
    scale: float,
    residual: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The same with what an adapter adds, `low` being x A'. It goes into the product before that is rounded: to a
    number that is rounded already, an adapter's first updates would add less than bfloat16 can show."""
    if low is None or b is None:
        return _forward(residual, x, w, bias)
    y = _forward(low @ (b * scale).to(x.dtype).t(), x, w, bias)
    return y if residual is None else y.add_(residual)


def _adapters(flat: Sequence[Tensor | None]) -> tuple[list[tuple[Tensor, Tensor] | None], list[slice]]:
    """The (A, B) of each linear that has one, and the columns that each takes where all A are side by side."""
    pairs: list[tuple[Tensor, Tensor] | None] = []
    columns, end = [], 0
    for a, b in zip(flat[2::_PER_LINEAR], flat[3::_PER_LINEAR], strict=True):
        pairs.append(None if a is None or b is None else (a, b))
        rank = 0 if a is None else a.shape[0]
        columns.append(slice(end, end + rank))
        end += rank
    return pairs, columns


def _stacked(pairs: Sequence[tuple[Tensor, Tensor] | None], dtype: torch.dtype) -> Tensor | None:
    parts = [pair[0] for pair in pairs if pair is not None]
    return torch.cat(parts).to(dtype) if parts else None


def _linears(x: Tensor, residual: Tensor | None, scales: Sequence[float], flat: Sequence[Tensor | None]) -> Any:
    """The outputs of several linears of x, and x A' of all their adapters in one product."""
    pairs, columns = _adapters(flat)
    stacked = _stacked(pairs, x.dtype)
    low = None if stacked is None else x @ stacked.t()
    outs = []
    for i, (pair, part, scale) in enumerate(zip(pairs, columns, scales, strict=True)):
        w, bias = flat[_PER_LINEAR * i : _PER_LINEAR * i + 2]
        if w is None:
            raise ValueError("a linear has a weight")
        b, mine = (None, None) if pair is None or low is None else (pair[1], low[:, part])
        outs.append(_adapted(x, mine, b, scale, residual, w, bias))
    return tuple(outs), low


def _backward(
    grads: Sequence[Tensor],
    x: Tensor,
    low: Tensor | None,
    scales: Sequence[float],
    flat: Sequence[Tensor | None],
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of x and those of (weight, bias, A, B) of every linear. `needs` runs along `flat`."""
    pairs, columns = _adapters(flat)
    stacked = _stacked(pairs, x.dtype)
    small = None if low is None else torch.empty_like(low)
    dx: Tensor | None = None
    out: list[Tensor | None] = []
    for i, (dy, pair, part, scale) in enumerate(zip(grads, pairs, columns, scales, strict=True)):
        w = flat[_PER_LINEAR * i]
        needs_w, needs_bias, _, needs_b = needs[_PER_LINEAR * i : _PER_LINEAR * (i + 1)]
        if needs_x and w is not None:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
        db = None
        if pair is not None and small is not None and low is not None:
            small[:, part] = dy @ (pair[1] * scale).to(dy.dtype)
            db = (dy.t() @ low[:, part]).to(pair[1].dtype).mul_(scale) if needs_b else None
        out += [dy.t() @ x if needs_w else None, dy.sum(0) if needs_bias else None, None, db]
    if small is not None and stacked is not None:
        if any(needs[2::_PER_LINEAR]):
            da = small.t() @ x
            for i, (pair, part) in enumerate(zip(pairs, columns, strict=True)):
                if pair is not None and needs[_PER_LINEAR * i + 2]:
                    out[_PER_LINEAR * i + 2] = da[part].to(pair[0].dtype)
        if dx is not None:
            dx.addmm_(small, stacked)
    return dx, out


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, scales: tuple[float, ...], *flat: Tensor | None
    ) -> Any:
        inverse = _inverse_rms(x, eps)
        outs, low = _linears(_normalise(x, inverse).mul_(weight), None, scales, flat)
        ctx.save_for_backward(x, weight, inverse, low, *flat)
        ctx.scales = scales
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, low, *flat = ctx.saved_tensors
        needs_x, needs_weight, _, _, *needs = ctx.needs_input_grad
        unit = _normalise(x, inverse)
        dn, out = _backward(grads, unit * weight, low, ctx.scales, flat, needs_x or needs_weight, needs)
        dw = (dn.float() * unit).sum(0).to(weight.dtype) if needs_weight and dn is not None else None
        dx = _norm_backward(dn, unit, inverse, weight) if needs_x and dn is not None else None
        return dx, dw, None, None, *out


class _LinearAdd(torch.autograd.Function):
    """residual + linear(x), or with `up`: residual + linear(silu(x) · up)."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, up: Tensor | None, scale: float, *flat: Tensor | None) -> Tensor:
        (out,), low = _linears(x if up is None else F.silu(x).mul_(up), residual, (scale,), flat)
        ctx.save_for_backward(x, up, low, *flat)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, low, *flat = ctx.saved_tensors
        _, needs_x, needs_up, _, *needs = ctx.needs_input_grad
        act = None if up is None else F.silu(x)
        h = x if act is None else act * up
        dh, out = _backward((dy,), h, low, (ctx.scale,), flat, needs_x or needs_up, needs)
        if act is None or dh is None:
            return dy, dh, None, None, *out
        dup = act.mul_(dh)
        return dy, torch.ops.aten.silu_backward(dh.mul_(up), x), dup, None, *out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, -1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, 1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """x · cos + sign · (second half, −first half) · sin: forward with −1, and its transpose with +1."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., half:] if sign > 0 else sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., :half] if sign > 0 else sin[..., half:], value=-sign)
    return out
