"""Preference models (Sec. 2.3.1): pointwise by eq. 1, pairwise by eq. 2.

The pairwise model sees both responses in one sequence. Its rows hold both orders; training draws one of them for each
row and step from the seed, and evaluation (models.score) averages the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card, Template, card_of, refusal
from flywheel_tasks.training import encode as encoding
from flywheel_tasks.training import rows
from flywheel_tasks.training.task import Loss, Step, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["pointwise", "pairwise"]
ROWS = rows.schema()


def encode(
    preferences: pa.Table, cards: Mapping[str, Card], template: Template, *, kind: Kind, max_tokens: int
) -> rows.Encoded:
    """Rows of schema `preference` as token sequences: (chosen, rejected), or both orders of the joint sequence."""
    out = rows.Collector()
    for i, one in enumerate(preferences.to_pylist()):
        name, where = one["preference_id"], f"preferences:{i}"
        if reason := encoding.useless(one["chosen"], one["rejected"]):
            out.reject(name, reason, where, one["user"])
            continue
        try:
            ids, dropped = _sequences(one, card_of(cards, one["character_id"]), template, kind, max_tokens)
        except InputError as error:
            out.reject(name, refusal(error), where, one["user"])
            continue
        made = rows.row(name, ids, 1.0)
        if kind == "pairwise":
            made |= dict.fromkeys(("tokens", "cost"), max(map(len, ids)))  # a step reads one of the two orders
        out.kept.append(made)
        out.dropped_turns += dropped
    return out.finish(ROWS)


def task(base: Path, *, kind: Kind, lora: Any = None, **loading: Any) -> Task:
    """What the loop needs; `base` is a local model folder, `loading` goes to models.load.load_scorer."""
    return Task(
        build=partial(_build, base, kind, lora, loading),
        loss=_pointwise if kind == "pointwise" else _pairwise,
        save=partial(_save, base),
        metrics=("accuracy", "margin"),
    )


def _sequences(
    one: Mapping[str, Any], card: Card | None, template: Template, kind: Kind, max_tokens: int
) -> tuple[list[Any], int]:
    sides = one["chosen"], one["rejected"]
    if kind == "pointwise":
        chats = encoding.responses(template, one["turns"], sides, card, max_tokens)
    else:
        orders = (sides, sides[::-1])
        chats = [template.pair(one["turns"], a, b, card=card, max_tokens=max_tokens) for a, b in orders]
    return [chat.ids for chat in chats], chats[0].dropped_turns


def _pointwise(module: nn.Module, table: pa.Table, at: Step) -> Loss:
    from flywheel_tasks.models.packed import pack
    from flywheel_tasks.training import losses

    packed = pack(rows.sequences(table)[0], device=at.device)
    chosen, rejected = module(packed)[:, 0].view(-1, 2).unbind(1)
    values = losses.pointwise(chosen, rejected)
    margin = (chosen - rejected).detach()
    sums = {"accuracy": (_right(margin), len(values)), "margin": (float(margin.sum()), len(values))}
    return Loss(values.sum(), sums, computed=len(packed.ids))


def _pairwise(module: nn.Module, table: pa.Table, at: Step) -> Loss:
    import torch

    from flywheel_tasks.models.packed import pack
    from flywheel_tasks.training import losses

    both = rows.sequences(table)[0]
    chosen_first = [first(name, at) for name in table.column("row_id").to_pylist()]
    packed = pack([both[2 * i + (not front)] for i, front in enumerate(chosen_first)], device=at.device)
    logit = module(packed)[:, 0]
    y0_wins = torch.tensor(chosen_first, device=at.device)
    values = losses.pairwise(logit, y0_wins)
    margin = torch.where(y0_wins, logit, -logit).detach()
    sums = {"accuracy": (_right(margin), len(values)), "margin": (float(margin.sum()), len(values))}
    return Loss(values.sum(), sums, computed=len(packed.ids))


def first(row_id: str, at: Step) -> bool:
    """Whether the chosen response of this row comes first at this step: a fair coin of (seed, step, row) alone."""
    return bool(hashlib.blake2b(f"{at.seed}/{at.step}/{row_id}".encode(), digest_size=1).digest()[0] & 1)


def _right(margin: torch.Tensor) -> float:
    """Pairs ordered as people ordered them; a tie is half right."""
    return float((margin > 0).sum()) + 0.5 * float((margin == 0).sum())


def _build(base: Path, kind: Kind, lora: Any, loading: Mapping[str, Any], device: torch.device) -> nn.Module:
    from flywheel_tasks.models.heads import load_scorer

    return load_scorer(base, kind=kind, lora=lora, device=device, **loading)


def _save(base: Path, module: nn.Module, folder: Path) -> None:
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer

    save_scorer(module, load_tokenizer(base), folder)
