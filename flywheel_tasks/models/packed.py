"""Batches without padding, and without computing a common beginning twice.

Rows that begin alike (chosen and rejected, k samples of a prompt, turns under the same card) form a tree: a segment
holds the tokens that its rows share, its children the ways they go on. A token attends to its own segment up to itself
and to all segments above, at the position it has in its row, so every row gets exactly what it would get alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from flywheel_tasks.core.errors import InputError

SHORTEST_SHARED = 16
"""Fewer common tokens are not worth a segment of their own."""


@dataclass(frozen=True, eq=False)
class Packed:
    """`ids` and `positions` of T packed tokens; segment s holds [starts[s], starts[s + 1]) below segment parents[s].
    Token t of row i is packed token `index[offsets[i] + t]`."""

    ids: Tensor
    positions: Tensor
    starts: tuple[int, ...]
    parents: tuple[int, ...]
    index: Tensor
    offsets: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(b - a for a, b in pairwise(self.offsets))

    @cached_property
    def last(self) -> Tensor:
        """Where each row's last token is."""
        return self.index[torch.tensor([end - 1 for end in self.offsets[1:]], device=self.index.device)]

    @cached_property
    def row_of(self) -> Tensor:
        """The row of every entry of `index`."""
        lengths = torch.tensor([b - a for a, b in pairwise(self.offsets)], device=self.index.device)
        return torch.repeat_interleave(torch.arange(self.rows, device=self.index.device), lengths)

    @cached_property
    def segments(self) -> tuple[tuple[slice, tuple[slice, ...]], ...]:
        """Each segment's tokens and, from the root down, the segments above it."""
        own = [slice(a, b) for a, b in pairwise(self.starts)]
        above: list[tuple[slice, ...]] = []
        for parent in self.parents:
            above.append((*above[parent], own[parent]) if parent >= 0 else ())
        return tuple(zip(own, above, strict=True))

    @cached_property
    def target_ids(self) -> Tensor:
        """The token at every entry of `index`."""
        return self.ids[self.index]

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "positions", "index")}
        return replace(self, **moved)


def pack(rows: Sequence[ArrayLike], *, share: bool = True, device: torch.device | str | None = None) -> Packed:
    """The rows as one padding-free batch; with `share`, common beginnings are computed once."""
    arrays = _arrays(rows)
    ids, positions, starts, parents = [], [], [0], []
    paths: list[list[slice]] = [[] for _ in arrays]
    for row, start, end, parent, members in _tree(arrays, share):
        ids.append(arrays[row][start:end])
        positions.append(np.arange(start, end))
        parents.append(parent)
        starts.append(starts[-1] + end - start)
        for member in members:
            paths[member].append(slice(starts[-2], starts[-1]))
    index = np.concatenate([np.arange(s.start, s.stop) for path in paths for s in path])
    return Packed(
        ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        starts=tuple(starts),
        parents=tuple(parents),
        index=torch.from_numpy(index).to(device),
        offsets=(0, *np.cumsum([len(row) for row in arrays]).tolist()),
    )


def hidden_states(model: nn.Module, packed: Packed) -> Tensor:
    """The model's states [T, d] after its final norm; `model` is a causal LM, its trunk, or either under peft."""
    output = trunk(model)(
        input_ids=packed.ids[None], position_ids=packed.positions[None], use_cache=False, packed=packed
    )
    return output.last_hidden_state[0]


def trunk(model: nn.Module) -> nn.Module:
    """The decoder without its language-model head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, base.base_model_prefix, base)


def _arrays(rows: Sequence[ArrayLike]) -> list[NDArray[np.int64]]:
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    empty = next((i for i, row in enumerate(arrays) if row.size == 0), None)
    if not arrays or empty is not None:
        what = f"row {empty} of the batch has no tokens" if arrays else "the batch has no rows"
        raise InputError(f"{what}: reject it before packing")
    return arrays


def _tree(rows: list[NDArray[np.int64]], share: bool) -> Iterator[tuple[int, int, int, int, list[int]]]:
    """Segments, parents first: (a row that has it, start, end, parent segment, all rows that have it)."""
    if not share or len(rows) == 1:
        yield from ((i, 0, len(row), -1, [i]) for i, row in enumerate(rows))
        return
    order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
    common = [common_length(rows[a], rows[b]) for a, b in pairwise(order)]
    # Groups in the order of their first rows, so that batches come out the same however sorting treats tokens.
    pending = [(0, len(order), 0, -1)]
    made = 0
    while pending:
        first, last, depth, parent = pending.pop()
        begin = first
        children = []
        for place in range(first, last):
            ends = place + 1 == last or common[place] < depth + SHORTEST_SHARED
            if not ends:
                continue
            members = order[begin : place + 1]
            end = min(common[begin:place], default=len(rows[members[0]]))
            if end > depth:
                yield members[0], depth, end, parent, members
                if place > begin:
                    children.append((begin, place + 1, end, made))
                made += 1
            begin = place + 1
        pending += reversed(children)


def common_length(a: NDArray[Any], b: NDArray[Any]) -> int:
    """How many tokens two rows have in common from the start."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
