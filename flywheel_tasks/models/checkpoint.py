"""Models as folders: merged weights that vLLM and transformers read.

A few updates change a weight by less than bfloat16 can show: rounded to the nearest, a first LoRA update all but
vanishes, and engines would answer for the policy before it. So a merged weight is rounded up or down by chance, each
with the probability that makes the served change the learned one in the mean. The chances belong to the weight's name
and place: the same weights give the same bytes, in a file, in an engine and on any device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flywheel_tasks.models.heads import RewardModel, save_head
from flywheel_tasks.models.load import Policy

_SHARD = "5GB"
_LOST_BITS = 16
"""Of fp32's 32, those that bfloat16 leaves out."""
_CHANCES = 1_000_003
"""A prime, so that no row or column of a matrix meets the same chances at the same places again."""


def save_policy(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """Merged safetensors, configuration, tokenizer and chat template: a folder that vLLM serves as it is."""
    _save_model(policy, tokenizer, folder)


def save_scorer(scorer: RewardModel, tokenizer: Any, folder: Path) -> None:
    """The merged trunk, its tokenizer and its head."""
    _save_model(scorer, tokenizer, folder)
    save_head(scorer, folder)


def merged_weights(policy: Policy | RewardModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its transformers name, adapters merged in fp32 and rounded once, by chance where the base is
    bfloat16. The module stays as it is.

    A sharded policy's weights are put together one by one, so all its workers must go through them; they come in the
    dtype that it computes in."""
    base = _base(policy.model)
    adapters = {name: module for name, module in base.named_modules() if getattr(module, "lora_A", None)}
    with torch.no_grad():
        for name, owner, parameter in _merged_names(base):
            weight = _whole(parameter.detach())
            merged = _merged(name, weight, adapters[owner]) if owner else weight
            yield name, merged.to(_dtype(base, parameter))


def merged_shapes(policy: Policy | RewardModel) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What `merged_weights` will give, without a tensor of it."""
    base = _base(policy.model)
    for name, _, parameter in _merged_names(base):
        yield name, _dtype(base, parameter), tuple(parameter.shape)


def _merged_names(base: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(name without adapters, the module whose adapter is merged into it or empty, parameter)"""
    for name, parameter in base.named_parameters():
        if ".lora_" not in name:
            owner, _, leaf = name.rpartition(".base_layer.")
            yield (f"{owner}.{leaf}" if owner else name), owner * (leaf == "weight"), parameter


def _whole(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _dtype(base: Any, parameter: Tensor) -> torch.dtype:
    """Shards of what is trained are fp32, and computed in what the model was loaded in."""
    dtype: torch.dtype = base.config.dtype if hasattr(parameter, "full_tensor") else parameter.dtype
    return dtype


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _merged(name: str, weight: Tensor, module: Any) -> Tensor:
    if module.merged or module.disable_adapters:
        return weight
    delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            delta += _whole(module.get_delta_weight(adapter)).float()
    exact = delta.add_(weight)
    return _rounded(exact, name) if weight.dtype == torch.bfloat16 else exact.to(weight.dtype)


def _rounded(exact: Tensor, name: str) -> Tensor:
    """To bfloat16, up with the probability of how far it is above the number below. The bits that bfloat16 leaves out
    are that probability: a random number of as many bits added to them carries, or is cut off with them."""
    bits = exact.view(torch.int32).flatten()
    chances = _chances().roll(zlib.crc32(name.encode()) % _CHANCES).to(bits.device)
    whole = bits.numel() - bits.numel() % _CHANCES
    bits[:whole].view(-1, _CHANCES).add_(chances)
    bits[whole:].add_(chances[: bits.numel() - whole])
    return bits.bitwise_right_shift_(_LOST_BITS).to(torch.int16).view(torch.bfloat16).view(exact.shape)


@cache
def _chances() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 1 << _LOST_BITS, _CHANCES, dtype=np.int32))


def _save_model(policy: Policy | RewardModel, tokenizer: Any, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    base = _base(policy.model)
    weights = {name: tensor.cpu().contiguous() for name, tensor in merged_weights(policy)}
    save_torch_state_dict(weights, folder, max_shard_size=_SHARD, metadata={"format": "pt"})
    config = base.config.__class__.from_dict(base.config.to_dict())
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None and base.can_generate():
        base.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
