"""Scoring heads (Sec. 2.3): a trunk, the state of each row's last token, and fp32 logits.

pointwise: r(x, y) of eq. 1; pairwise: s(x, y0, y1) of eq. 2 on a joint row; signals: one logit for each user signal of
Table 2 on one shared trunk (eq. 6). A head is saved beside its trunk as head.safetensors and head.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.load import checkpoint_layers, prepare, read
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.packed import Packed, hidden_states, trunk

Kind = Literal["pointwise", "pairwise", "signals"]
WEIGHTS, ABOUT = "head.safetensors", "head.json"
_NAMES: dict[str, tuple[str, ...]] = {"pointwise": ("reward",), "pairwise": ("y0_wins",)}
_SPREAD = 0.02


class RewardModel(nn.Module):
    """A trunk and its head."""

    def __init__(
        self, model: nn.Module, kind: Kind, names: Sequence[str], seed: int = 0, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.kind: Kind = kind
        self.names = tuple(names)
        self.max_tokens = max_tokens
        """How long a row was in training at most: scores of longer ones are extrapolations."""
        weight = torch.empty(len(self.names), trunk(model).config.hidden_size)
        self.weight = nn.Parameter(weight.normal_(0.0, _SPREAD, generator=torch.Generator().manual_seed(seed)))
        self.bias = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, packed: Packed) -> Tensor:
        """Logits [rows, heads]. Which token is a row's last follows from the row's length, never from a token's id."""
        last = hidden_states(self.model, packed)[packed.last]
        return nn.functional.linear(last.float(), self.weight.float(), self.bias.float())

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers: what FSDP wraps."""
        return list(trunk(self.model).layers)

    def checkpoint_layers(self) -> None:
        checkpoint_layers(self.model)


def load_scorer(
    folder: str | Path,
    *,
    kind: Kind | None = None,
    names: Sequence[str] = (),
    lora: Lora | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    trainable: bool = True,
    seed: int = 0,
    max_tokens: int | None = None,
) -> RewardModel:
    """The scoring model of a folder. A folder without a head gets a fresh one of this `kind`; a folder with one must
    have been trained as that kind, with those names. `max_tokens` is what it is trained with now, saved with it."""
    from transformers import AutoModel

    saved = _about(Path(folder))
    kind, names = _agreed(Path(folder), saved, kind, tuple(names))
    model = prepare(read(AutoModel, folder, dtype, device), lora, device, trainable, seed)
    known = saved.get("max_tokens") if saved else None
    scorer = RewardModel(model, kind, names, seed, max_tokens or known).to(device)
    if saved is not None:
        _read_head(scorer, Path(folder) / WEIGHTS)
    return scorer if trainable else scorer.requires_grad_(False)


def save_head(scorer: RewardModel, folder: Path) -> None:
    """Write head.safetensors and head.json."""
    from safetensors.torch import save_file

    tensors = {name: getattr(scorer, name).detach().float().cpu().contiguous() for name in ("weight", "bias")}
    save_file(tensors, folder / WEIGHTS)
    about = {"kind": scorer.kind, "names": list(scorer.names), "max_tokens": scorer.max_tokens}
    (folder / ABOUT).write_text(json.dumps(about, indent=1))


def _about(folder: Path) -> dict[str, Any] | None:
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text())
        named = all(isinstance(name, str) for name in about["names"])
        longest = about.get("max_tokens")
        if longest is not None and not (isinstance(longest, int) and longest > 0):
            raise ValueError(f"max_tokens is {longest}")
        if about["kind"] in get_args(Kind) and named:
            return dict(about)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}: fetch the checkpoint again") from error
    raise InputError(f"{path} has kind '{about['kind']}': legal kinds are {', '.join(get_args(Kind))}")


def _agreed(
    folder: Path, saved: dict[str, Any] | None, kind: Kind | None, names: tuple[str, ...]
) -> tuple[Kind, tuple[str, ...]]:
    names = names or (_NAMES.get(kind, ()) if kind else ())
    if saved is None:
        if kind is None or not names:
            what = "signal models need the names of their signals" if kind else "say which kind of head it shall get"
            raise InputError(f"model {folder} has no scoring head: {what}")
        return kind, names
    if kind not in (None, saved["kind"]) or names not in ((), tuple(saved["names"])):
        raise InputError(
            f"model {folder} was trained as {saved['kind']} ({', '.join(saved['names'])}), "
            f"not as {kind} ({', '.join(names)}): give another checkpoint"
        )
    return saved["kind"], tuple(saved["names"])


def _read_head(scorer: RewardModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}: fetch the checkpoint again") from error
    for name in ("weight", "bias"):
        parameter: nn.Parameter = getattr(scorer, name)
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise InputError(f"{path} does not fit {ABOUT} and the trunk: its '{name}' has another shape")
        with torch.no_grad():
            parameter.copy_(tensors[name])
