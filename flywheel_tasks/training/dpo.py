"""Direct preference optimisation as a small patch (Sec. 2.4.2): sigmoid loss, reference computed once, EOT masked.

The reference is the model that training starts from, so its log-probabilities are taken before the first step and
kept per token; no second model is ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card, Chat, Template, card_of, refusal
from flywheel_tasks.training import encode as encoding
from flywheel_tasks.training import policy, rows
from flywheel_tasks.training.task import Loss, Step, Task

if TYPE_CHECKING:
    from torch import nn

ROWS = rows.schema(rows.TRAINED)


def encode(
    preferences: pa.Table, cards: Mapping[str, Card], template: Template, *, max_tokens: int, mask_eot: bool = True
) -> rows.Encoded:
    """Rows of schema `preference` as (chosen, rejected). `mask_eot` (Table 7) leaves the end-of-turn token out of both
    sums: in a rejected response it would teach the policy not to stop."""
    out = rows.Collector()
    for i, one in enumerate(preferences.to_pylist()):
        name, where = one["preference_id"], f"preferences:{i}"
        if reason := encoding.useless(one["chosen"], one["rejected"]):
            out.reject(name, reason, where, one["user"])
            continue
        sides = one["chosen"], one["rejected"]
        try:
            card = card_of(cards, one["character_id"])
            chats = encoding.responses(template, one["turns"], sides, card, max_tokens)
        except InputError as error:
            out.reject(name, refusal(error), where, one["user"])
            continue
        trained = [targets(chat, mask_eot) for chat in chats]
        out.kept.append(rows.row(name, [chat.ids for chat in chats], 1.0, trained=trained))
        out.dropped_turns += chats[0].dropped_turns
    return out.finish(ROWS)


def targets(chat: Chat, mask_eot: bool) -> Any:
    """The tokens whose log-probabilities are summed."""
    return chat.trained & ~chat.eot if mask_eot else chat.trained


def task(
    base: Path,
    *,
    beta: float = 0.1,
    smoothing: float = 0.0,
    length_normalised: bool = False,
    lora: Any = None,
    **loading: Any,
) -> Task:
    """What the loop needs. `k3_on_pairs` is how far the policy moved on the pairs' own tokens: k3's formula, but no KL,
    since the policy did not draw them."""
    return Task(
        build=partial(policy.build, base, lora, loading),
        loss=partial(_loss, beta, smoothing, length_normalised),
        save=partial(policy.save, base),
        metrics=("accuracy", "margin", "reward/chosen", "reward/rejected", "k3_on_pairs", "entropy"),
        prepare=reference,
    )


def reference(module: nn.Module, table: pa.Table) -> list[NDArray[np.float32]]:
    """Log-probability of every target token of each row, under the module as it is now."""
    device = next(module.parameters()).device
    packed, wanted = policy.packed(table, device)
    found = module(packed, wanted).logprob.float().cpu().numpy()
    per_row = [sum(map(sum, marks)) for marks in table.column("trained").to_pylist()]
    return np.split(found, np.cumsum(per_row)[:-1])


def _loss(beta: float, smoothing: float, length_normalised: bool, module: nn.Module, table: pa.Table, at: Step) -> Loss:
    import torch

    from flywheel_tasks.training import losses

    packed, wanted = policy.packed(table, at.device)
    found = module(packed, wanted)
    before = table.column("prepared").combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    reference = torch.from_numpy(before).to(at.device)
    sequences = 2 * table.num_rows

    def sides(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = losses.row_sums(values, found.row, sequences).view(-1, 2).unbind(1)
        return chosen, rejected

    now, then = sides(found.logprob), sides(reference)
    lengths = sides(torch.ones_like(reference)) if length_normalised else None
    values = losses.dpo(*now, *then, beta=beta, smoothing=smoothing, lengths=lengths)
    rewards = [beta * (a - b).detach() for a, b in zip(now, then, strict=True)]
    margin, n = rewards[0] - rewards[1], float(len(values))
    tokens = float(len(found.logprob))
    return Loss(
        values.sum(),
        {
            "accuracy": (float((margin > 0).sum()) + 0.5 * float((margin == 0).sum()), n),
            "margin": (float(margin.sum()), n),
            "reward/chosen": (float(rewards[0].sum()), n),
            "reward/rejected": (float(rewards[1].sum()), n),
            "k3_on_pairs": (float(losses.kl(found.logprob.detach(), reference).sum()), tokens),
            "entropy": (float(found.entropy.sum()), tokens),
        },
        computed=len(packed.ids),
    )
