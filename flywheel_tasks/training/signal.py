"""User-signal models (Sec. 2.3.2, Table 2): one shared trunk, a head per signal, eq. 6 on the labels that are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card, Template, card_of, refusal
from flywheel_tasks.training import encode as encoding
from flywheel_tasks.training import rows
from flywheel_tasks.training.task import Loss, Step, Task

if TYPE_CHECKING:
    import torch
    from torch import nn

ROWS = rows.schema(pa.field("labels", pa.list_(pa.float32()), nullable=False))
NO_LABEL = "no_label"


def encode(
    responses: pa.Table, names: Sequence[str], cards: Mapping[str, Card], template: Template, *, max_tokens: int
) -> rows.Encoded:
    """A table with row_id, user, character_id, turns, response and a nullable bool column per signal of `names`."""
    out = rows.Collector()
    for i, one in enumerate(responses.to_pylist()):
        labels = [math.nan if one[name] is None else float(one[name]) for name in names]
        reason = None if not all(map(math.isnan, labels)) else NO_LABEL
        reason = encoding.EMPTY if not one["response"].strip() else reason
        if reason is None:
            try:
                card = card_of(cards, one["character_id"])
                chat = template.chat(one["turns"], card=card, response=one["response"], max_tokens=max_tokens)
            except InputError as error:
                reason = refusal(error)
        if reason is not None:
            out.reject(one["row_id"], reason, f"responses:{i}", one["user"])
            continue
        known = len(labels) - sum(map(math.isnan, labels))
        out.kept.append(rows.row(one["row_id"], [chat.ids], float(known), labels=labels))
        out.dropped_turns += chat.dropped_turns
    return out.finish(ROWS)


def task(base: Path, *, names: Sequence[str], lora: Any = None, **loading: Any) -> Task:
    """What the loop needs; the loss is the mean over all known labels."""
    return Task(
        build=partial(_build, base, tuple(names), lora, loading),
        loss=partial(_loss, tuple(names)),
        save=partial(_save, base),
        metrics=tuple(f"loss/{name}" for name in names),
    )


def _loss(names: Sequence[str], module: nn.Module, table: pa.Table, at: Step) -> Loss:
    import torch

    from flywheel_tasks.models.packed import pack
    from flywheel_tasks.training import losses

    packed = pack(rows.sequences(table)[0], device=at.device)
    flat = table.column("labels").combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    labels = torch.from_numpy(flat).view(-1, len(names)).to(at.device)
    values, known = losses.signal(module(packed), labels)
    sums = values.detach().sum(0).tolist(), known.sum(0).tolist()
    return Loss(
        values.sum(),
        {f"loss/{name}": (total, float(n)) for name, total, n in zip(names, *sums, strict=True)},
        computed=len(packed.ids),
    )


def _build(
    base: Path, names: tuple[str, ...], lora: Any, loading: Mapping[str, Any], device: torch.device
) -> nn.Module:
    from flywheel_tasks.models.heads import load_scorer

    return load_scorer(base, kind="signals", names=names, lora=lora, device=device, **loading)


def _save(base: Path, module: nn.Module, folder: Path) -> None:
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer

    save_scorer(module, load_tokenizer(base), folder)
