"""Whether an engine loaded what the learner sent, to the last update (Sec. 2.4.3): a checksum at both ends.

The logprob probe tells weights that are wrong by far, whatever made them so. One update of a run moves logprobs by less
than bfloat16's rounding does, so that one got lost it can't see. The sum of the bits that went by can.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flywheel_tasks.core.errors import FlywheelError

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 8
_MODULUS = 1 << 64


class Checksum:
    """Of the weights that pass through `over`, in whatever order. Each tensor counts with a factor of its name."""

    def __init__(self) -> None:
        self._sums: list[tuple[str, Tensor]] = []

    def over(self, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for name, tensor in weights:
            self._sums.append((name, bits(tensor)))
            yield name, tensor

    def value(self) -> str:
        """The checksum of all that passed since the last one."""
        total = sum((2 * zlib.crc32(name.encode()) + 1) * int(found) for name, found in self._sums)
        self._sums.clear()
        return f"{total % _MODULUS:016x}"


def bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as whole numbers, on its device; the same wherever and however it is stored."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, _WORD: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    width = flat.element_size() if flat.nbytes % _WORD else _WORD
    if flat.storage_offset() * flat.element_size() % width:
        flat = flat.clone()  # words begin where the tensor does, not where the buffer does that it came in
    return flat.view(whole[width]).sum(dtype=torch.int64)


def check(sent: str, loaded: Sequence[str]) -> None:
    """An error unless every worker of every engine loaded what was sent."""
    if not loaded or {sent} != set(loaded):
        wrong = sum(one != sent for one in loaded)
        raise FlywheelError(
            f"the engines did not load the weights that the learner sent: {wrong} of {len(loaded)} workers have "
            "another checksum; the next attempt goes on from the last checkpoint"
        )
