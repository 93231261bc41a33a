"""Supervised fine-tuning (Sec. 2.4.2): the mean over trained tokens; the loss of every source is logged apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card, Template, card_of, refusal
from flywheel_tasks.training import policy, rows
from flywheel_tasks.training.task import Loss, Step, Task

if TYPE_CHECKING:
    from torch import nn

ROWS = rows.schema(rows.TRAINED, pa.field("source", pa.string(), nullable=False))
NOTHING_TRAINED = "nothing_trained"


def encode(examples: pa.Table, cards: Mapping[str, Card], template: Template, *, max_tokens: int) -> rows.Encoded:
    """Rows of schema `example`: only the turns marked as trained are targets, and only the assistant's can be."""
    out = rows.Collector()
    for i, one in enumerate(examples.to_pylist()):
        name, where, reason = one["example_id"], f"examples:{i}", None
        try:
            chat = template.chat(one["messages"], card=card_of(cards, one["character_id"]), max_tokens=max_tokens)
            reason = None if chat.trained.any() else NOTHING_TRAINED
        except InputError as error:
            reason = refusal(error)
        if reason is not None:
            out.reject(name, reason, where, one["user"])
            continue
        count = float(chat.trained.sum())
        out.kept.append(rows.row(name, [chat.ids], count, trained=[chat.trained], source=one["source"]))
        out.dropped_turns += chat.dropped_turns
    return out.finish(ROWS)


def task(base: Path, *, sources: Sequence[str] = (), lora: Any = None, **loading: Any) -> Task:
    """What the loop needs; `sources` are those whose loss is logged."""
    return Task(
        build=partial(policy.build, base, lora, loading),
        loss=partial(_loss, tuple(sources)),
        save=partial(policy.save, base),
        metrics=("entropy", *(f"loss/{source}" for source in sources)),
    )


def _loss(sources: Sequence[str], module: nn.Module, table: pa.Table, at: Step) -> Loss:
    from flywheel_tasks.training import losses

    packed, targets = policy.packed(table, at.device)
    found = module(packed, targets)
    values = losses.sft(found.logprob)
    per_row = losses.row_sums(values.detach(), found.row, table.num_rows).tolist()
    counts = table.column("count").to_pylist()
    sums = {"entropy": (float(found.entropy.sum()), float(len(values)))}
    for name, value, count in zip(table.column("source").to_pylist(), per_row, counts, strict=True):
        if name in sources:
            before = sums.get(f"loss/{name}", (0.0, 0.0))
            sums[f"loss/{name}"] = (before[0] + value, before[1] + count)
    return Loss(values.sum(), sums, computed=len(packed.ids))
