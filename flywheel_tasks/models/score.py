"""Scores of many responses (Sec. 2.3): rewards, win probabilities in both orders, user signals.

Rows that share a beginning go into the same batch, where it is computed once; a batch holds no padding at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card, Chat, Template, TooLong, load_tokenizer
from flywheel_tasks.models.heads import Kind, RewardModel, load_scorer
from flywheel_tasks.models.memory import keep_pages, refuse_too_large
from flywheel_tasks.models.packed import SHORTEST_SHARED, common_length, pack
from flywheel_tasks.models.resolve import local_folder

Floats = NDArray[np.float32]
T = TypeVar("T")
_LONGEST = 2048
"""For a head that does not say how it was trained."""
Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ScoreRow:
    """A response to a conversation."""

    turns: Turns
    response: str
    card: Card | None = None


@dataclass(frozen=True)
class PairRow:
    """Two responses to a conversation."""

    turns: Turns
    y0: str
    y1: str
    card: Card | None = None


class Scorer:
    """A trained scoring model, ready for rows: from a folder (or whatever names one), or a module in memory."""

    def __init__(
        self,
        source: str | Path | RewardModel,
        *,
        template: Template | None = None,
        max_tokens: int | None = None,
        budget: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        keep_pages()
        if isinstance(source, RewardModel):
            if template is None:
                raise InputError("a scoring model in memory needs the template of its tokenizer")
            self.model, self.template = source, template
        else:
            folder = local_folder(str(source))
            self.template = template or Template(load_tokenizer(folder))
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if place.type == "cuda":
                refuse_too_large(folder, dtype.itemsize, torch.cuda.mem_get_info(place)[0], str(place))
            self.model = load_scorer(folder, dtype=dtype, device=place, trainable=False)
        self.max_tokens, self.budget = max_tokens or self.model.max_tokens or _LONGEST, budget
        """As long as the model's rows were in training, unless told."""
        self.dropped_turns = self.too_long = self.tokens = self.computed = 0
        """Turns cut off the histories, rows that did not fit, tokens of all rows, and those that had to be computed."""

    @property
    def device(self) -> torch.device:
        return self.model.weight.device

    def pointwise(self, rows: Sequence[ScoreRow]) -> Floats:
        """r(x, y) of eq. 1; NaN where a row does not fit."""
        return self._rows("pointwise", rows)[:, 0]

    def signals(self, rows: Sequence[ScoreRow]) -> dict[str, Floats]:
        """The probability of each user signal of Table 2; NaN where a row does not fit."""
        logits = self._rows("signals", rows)
        return {name: _sigmoid(logits[:, i]) for i, name in enumerate(self.model.names)}

    def pairwise(self, rows: Sequence[PairRow]) -> Floats:
        """P(y0 wins), averaged over both orders of the two, so that it never depends on which came first."""
        self._expect("pairwise")
        dropped = self.dropped_turns
        both = [
            self._chat(self.template.pair, row.turns, a, b, card=row.card)
            for row in rows
            for a, b in ((row.y0, row.y1), (row.y1, row.y0))
        ]
        p = _sigmoid(self._logits(both)[:, 0])
        self.too_long -= int(np.isnan(p[::2]).sum())
        self.dropped_turns -= (self.dropped_turns - dropped) // 2  # one history, read in two orders
        return np.asarray((p[::2] + (1 - p[1::2])) / 2, np.float32)

    def _rows(self, kind: Kind, rows: Sequence[ScoreRow]) -> Floats:
        self._expect(kind)
        return self._logits(
            [self._chat(self.template.chat, row.turns, card=row.card, response=row.response) for row in rows]
        )

    def _expect(self, kind: Kind) -> None:
        if self.model.kind != kind:
            raise InputError(f"this model was trained as {self.model.kind}: it gives no {kind} scores")

    def _chat(self, make: Callable[..., Chat], *arguments: Any, **named: Any) -> NDArray[np.int32] | None:
        try:
            chat = make(*arguments, **named, max_tokens=self.max_tokens)
        except TooLong:
            self.too_long += 1
            return None
        self.dropped_turns += chat.dropped_turns
        return chat.ids

    def _logits(self, rows: Sequence[NDArray[np.int32] | None]) -> Floats:
        out = np.full((len(rows), len(self.model.names)), math.nan, np.float32)
        fit = np.array([i for i, row in enumerate(rows) if row is not None], np.int64)
        with torch.no_grad():
            for batch in batches([row for row in rows if row is not None], self.budget):
                packed = pack([row for _, row in batch], device=self.device)
                self.tokens += len(packed.index)
                self.computed += len(packed.ids)
                out[fit[[place for place, _ in batch]]] = self.model(packed).cpu().numpy()
        return out


def batches(rows: Sequence[NDArray[np.int32]], budget: int) -> Iterator[list[tuple[int, NDArray[np.int32]]]]:
    """(place, row) in batches of about `budget` computed tokens; rows that begin alike are neighbours."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i4").tobytes())
    batch: list[tuple[int, NDArray[np.int32]]] = []
    size = 0
    for place in order:
        row = rows[place]
        common = common_length(batch[-1][1], row) if batch else 0
        new = len(row) - (common if common >= SHORTEST_SHARED else 0)
        if batch and size + new > budget:
            yield batch
            batch, size, new = [], 0, len(row)
        batch.append((place, row))
        size += new
    if batch:
        yield batch


def _sigmoid(logits: Floats) -> Floats:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def while_or_after(made: Iterator[T], scorer: Scorer) -> Iterable[T]:
    """What an engine makes, to be scored: while it goes on where the scorer has a device of its own. On a CPU the two
    would fight for the same cores, each waiting for threads that the other keeps away: in turn they are faster."""
    return list(made) if scorer.device.type == "cpu" else made
