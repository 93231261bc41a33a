"""What the loop needs to know of a thing that is trained: four functions, and nothing about how it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, device, nn

Values = Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """Where the run is; the same on every worker."""

    step: int
    seed: int
    device: device
    hooks: tuple[Hook, ...] = ()
    """For a loss that needs their state: the averaged reference of eq. 8."""


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, summed over its rows; the loop divides by the `count` of the whole global batch."""

    total: Tensor
    sums: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric → (sum, weight): reported as sum over weight of the whole global batch."""
    computed: int = 0
    """Token positions that went through the model."""


@dataclass(frozen=True)
class Task:
    """Functions that any worker can import; use functools.partial to give them what they need."""

    build: Callable[[device], nn.Module]
    """The module on that device; what requires a gradient is trained."""
    loss: Callable[[nn.Module, pa.Table, Step], Loss]
    save: Callable[[nn.Module, Path], None]
    """Write the module as a checkpoint folder."""
    metrics: tuple[str, ...] = ()
    """Every name that `Loss.sums` may hold: they are added over the workers in one vector."""
    prepare: Callable[[nn.Module, pa.Table], list[NDArray[np.float32]]] | None = None
    """Values of each row under the model before the first step, computed once; the loss finds them as `prepared`."""


class Source(Protocol):
    """Global batches that are made while training (rollouts). Every worker has one; all must give the same batch."""

    steps: int

    def batch(self, step: int) -> pa.Table | None:
        """Training rows of optimiser step `step`, or None when there are no more."""

    def state(self) -> dict[str, Any]:
        """What must be known to go on after this step, as JSON."""

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Stop:
    """A hook's wish to end the run; the state at this step is saved and published."""

    reason: str


@dataclass(frozen=True)
class After:
    """What a hook sees after the optimiser step, the same on every worker but for `rank`."""

    step: int
    module: nn.Module
    metrics: Values
    rank: int


class Hook(Protocol):
    """Runs on every worker after every optimiser step: weight sync, reference average, guardrails."""

    def start(self, module: nn.Module) -> None:
        """Before the first step, with the module as it was built."""

    def after_step(self, at: After) -> Stop | Values | None:
        """Extra metrics of this step (the first worker's count), or the wish to stop (any worker's counts)."""

    def tensors(self) -> dict[str, Tensor]:
        """State to be saved with every checkpoint."""

    def restore(self, tensors: dict[str, Tensor]) -> None: ...
