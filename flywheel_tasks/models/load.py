"""A causal language model as a policy: LoRA through peft or full tuning, safetensors only, on the packed path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models import attention
from flywheel_tasks.models.blocks import accelerate
from flywheel_tasks.models.logprobs import TokenLogprobs, logprobs
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.packed import Packed, trunk


class Policy(nn.Module):
    """A model that chats, as training sees it: log-probabilities of target tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, packed: Packed, targets: ArrayLike | Tensor, temperature: float = 1.0) -> TokenLogprobs:
        return logprobs(self.model, packed, targets, temperature=temperature)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers: what FSDP wraps."""
        return list(trunk(self.model).layers)

    def checkpoint_layers(self) -> None:
        checkpoint_layers(self.model)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The policy without its adapters: the model that training started from."""
        if not hasattr(self.model, "disable_adapter"):
            raise FlywheelError("full tuning keeps no reference: compute its log-probabilities before the first step")
        with self.model.disable_adapter():
            yield


def load_policy(
    folder: str | Path,
    *,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    trainable: bool = True,
    seed: int = 0,
) -> Policy:
    """The causal LM of a model folder. With `lora` fresh adapters alone are trained (fp32 masters; B starts at zero),
    else all weights."""
    from transformers import AutoModelForCausalLM

    model = read(AutoModelForCausalLM, folder, dtype, device)
    _refuse_odd_logits(model, folder)
    return Policy(prepare(model, lora, device, trainable, seed))


def read(loader: Any, folder: str | Path, dtype: torch.dtype, device: torch.device | str | None = None) -> Any:
    """A pretrained model of a local folder, set up for packed batches. On the `meta` device it is the same model
    without weights, and none are read."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    attention.register()
    # A trunk leaves the file's lm_head unread, and would say so; what matters is checked below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if _is_meta(device):
        return _skeleton(loader, folder, dtype)
    try:
        model, found = loader.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.NAME,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise InputError(f"model {folder} cannot be loaded: {reason}: check the folder, or fetch it again") from error
    if found["missing_keys"]:
        first, *more = sorted(found["missing_keys"])
        raise InputError(f"model {folder} lacks {first} and {len(more)} more weights: fetch the folder again")
    return model


def _refuse_odd_logits(model: Any, folder: str | Path) -> None:
    """Log-probabilities are of the head's product alone: what else a model does to its logits would be lost."""
    config = model.config.get_text_config()
    options = {name: getattr(config, name, None) for name in ("logits_scaling", "logit_scale")}
    odd = [f"{name}={value}" for name, value in options.items() if value not in (None, 1)]
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        odd.append(f"final_logit_softcapping={cap}")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        odd.append("a bias in its output embedding")
    if odd:
        raise InputError(f"model {folder} has {odd[0]}, which training does not compute: take another model")


def _is_meta(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _skeleton(loader: Any, folder: str | Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise InputError(f"model {folder} cannot be loaded: {reason}: check the folder, or fetch it again") from error
    with torch.device("meta"):
        return loader.from_config(
            config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=False
        ).eval()


def prepare(model: Any, lora: Lora | None, device: torch.device | str | None, trainable: bool, seed: int) -> Any:
    """Adapters, device, what is trained, and the kernels."""
    if lora is not None:
        model = _with_adapters(model, lora, seed)
    if not trainable:
        model.requires_grad_(False)
    return accelerate(model.to(device).train(trainable))


def checkpoint_layers(model: Any) -> None:
    """From now on a forward pass in training keeps each layer's input alone; the backward pass computes the rest again.
    The gradient is the same."""
    trunk(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _with_adapters(model: Any, lora: Lora, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
    )
    # Every worker must draw the same A, whatever its process drew before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with next(model.parameters()).device:
                return get_peft_model(model, config)
        except ValueError as error:
            known = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise InputError(
                f"lora.targets {', '.join(lora.targets)}: the model has no such linears: it has {', '.join(known)}"
            ) from error
