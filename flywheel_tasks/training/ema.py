"""The reference policy of eq. 8 (Sec. 2.4.3): an exponential moving average of the initial and later checkpoints.

Only what is trained is averaged, so with LoRA the reference costs a second set of adapters and no second model. The
average is in fp32; it moves after every optimiser step, or every few as a checkpoint would. Of a sharded model every
worker averages its own part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flywheel_tasks.training.optim import local
from flywheel_tasks.training.task import After, Stop, Values


class Ema:
    """A hook of the loop; `swapped` puts the average in the module's place for as long as a reference is computed."""

    def __init__(self, decay: float, every: int = 1, name: str = "reference") -> None:
        if not 0 <= decay <= 1 or every < 1:
            raise ValueError(f"an average needs a decay in [0, 1] and a positive interval, not {decay} and {every}")
        self.decay, self.every, self.name = decay, every, name
        self.average: dict[str, Tensor] = {}

    def start(self, module: nn.Module) -> None:
        self.average = {name: p.float().clone() for name, p in _trained(module)}

    @torch.no_grad()
    def after_step(self, at: After) -> Stop | Values | None:
        if (at.step + 1) % self.every == 0:
            for name, parameter in _trained(at.module):
                self.average[name].lerp_(parameter.float(), 1 - self.decay)
        return None

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """The module as the reference; its own weights come back to the last bit."""
        kept = {name: p.clone() for name, p in _trained(module)}
        self._put(module, self.average)
        try:
            yield
        finally:
            self._put(module, kept)

    def tensors(self) -> dict[str, Tensor]:
        return self.average

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.average = {name: tensor.to(self.average[name].device) for name, tensor in tensors.items()}

    @staticmethod
    @torch.no_grad()
    def _put(module: nn.Module, values: dict[str, Tensor]) -> None:
        for name, parameter in _trained(module):
            parameter.copy_(values[name])


def _trained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, local(p.detach())) for name, p in module.named_parameters() if p.requires_grad)
