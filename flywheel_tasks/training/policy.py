"""What SFT, DPO and RL share: a policy that gives the log-probabilities of target tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flywheel_tasks.training import rows

if TYPE_CHECKING:
    import torch
    from torch import nn

    from flywheel_tasks.models.load import Policy
    from flywheel_tasks.models.packed import Packed


def build(base: Path, lora: Any, loading: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The policy of a model folder, with fresh adapters if `lora` is given."""
    from flywheel_tasks.models.load import load_policy

    return load_policy(base, lora=lora, device=device, **loading)


def save(base: Path, module: Policy, folder: Path) -> None:
    """A folder that vLLM serves, with what this module says of fixed sentences beside it."""
    from flywheel_tasks.models import witness
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_policy

    tokenizer = load_tokenizer(base)
    save_policy(module, tokenizer, folder)
    witness.record(module, tokenizer, folder)


def packed(table: pa.Table, device: torch.device) -> tuple[Packed, torch.Tensor]:
    """The sequences of training rows as one packed batch, and which of their tokens are targets."""
    import torch

    from flywheel_tasks.models.packed import pack

    sequences, _ = rows.sequences(table)
    targets = torch.from_numpy(rows.flat_targets(table).copy()).to(device)
    return pack(sequences, device=device), targets
