"""Decoder layers of the Llama family run on the kernels. Any other layer runs as transformers wrote it, except for what
its adapters add: that is rounded once, with the product to which it is added."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models import kernels
from flywheel_tasks.models.attention import packed_attention
from flywheel_tasks.models.kernels import Linear
from flywheel_tasks.models.packed import Packed, trunk

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""Layers that are: norm, attention with rotary embedding and optional biases, norm, SwiGLU."""


def accelerate(model: nn.Module) -> nn.Module:
    """Swap the forward of the layers and of the final norm where the kernels compute the same. Parameters, names and
    hooks stay, so peft, DDP, FSDP and saving see the model they know."""
    core = trunk(model)
    if not hasattr(core, "layers"):
        raise InputError(f"{type(core).__name__} has no 'layers', which packed batches need: take another model")
    for layer in core.layers:
        if type(layer).__name__ in _LAYERS and getattr(core.config, "hidden_act", "") == "silu":
            layer.forward = partial(_layer, layer, layer.forward)
    for module in core.modules():
        if hasattr(module, "lora_A"):
            module.forward = partial(_adapter, module, module.forward)
    norm: Any = getattr(core, "norm", None)
    if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
        norm.forward = partial(_norm, norm)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    return kernels.rms_norm(x.flatten(0, -2), module.weight, module.variance_epsilon).view_as(x)


def _adapter(module: Any, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A linear with an adapter, where its layer is not on the kernels."""
    linear = _linear(module)
    if linear is None or linear.a is None or linear.weight.dtype != x.dtype or args or kwargs:
        out: Tensor = plain(x, *args, **kwargs)
        return out
    return kernels.adapted(x.flatten(0, -2), linear).unflatten(0, x.shape[:-1])


def _layer(
    layer: Any,
    plain: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
               mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # fmt: skip
    linears = [_linear(module) for module in modules]
    if packed is None or position_embeddings is None or None in linears or packed.longest > _window(attention):
        same = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, "packed": packed}
        return plain(hidden_states, **same, **kwargs)
    q, k, v, o, gate, up, down = (linear for linear in linears if linear is not None)
    x = hidden_states[0]
    norm = layer.input_layernorm
    heads = (-1, attention.head_dim)
    states = kernels.norm_linears(x, norm.weight, norm.variance_epsilon, (q, k, v))
    query, key, value = (state.unflatten(-1, heads) for state in states)
    cos, sin = (part[0] for part in position_embeddings)
    mixed = packed_attention(
        kernels.rotary(query, cos, sin), kernels.rotary(key, cos, sin), value, packed, attention.scaling
    )
    x = kernels.linear_add(x, mixed.flatten(1), o)
    norm = layer.post_attention_layernorm
    opened, raised = kernels.norm_linears(x, norm.weight, norm.variance_epsilon, (gate, up))
    return kernels.swiglu_linear_add(x, opened, raised, down)[None]


def _window(attention: Any) -> float:
    """How far back a token sees: of this layer, or as Mistral has it, of all."""
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(holder, "sliding_window", None) or math.inf


def _linear(module: Any) -> Linear | None:
    """The tensors of a linear, with or without a LoRA adapter; None if it does more than the kernels know."""
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    if type(module).__name__ != "Linear" or not hasattr(module, "lora_A"):
        return None
    base = module.get_base_layer()
    if type(base) is not nn.Linear:
        return None
    adapters = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged:
        return None if module.disable_adapters else Linear(base.weight, base.bias)
    if module.disable_adapters or not adapters:
        return Linear(base.weight, base.bias)
    name, *more = adapters
    dropout = module.lora_dropout[name]
    dropped = module.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    if more or dropped or name in module.lora_variant or module.lora_B[name].bias is not None:
        return None
    return Linear(base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
