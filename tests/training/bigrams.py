"""A policy small enough to write down: the next token depends on the one before it, and logits are the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from flywheel_tasks.models.logprobs import TokenLogprobs, target_entries
from flywheel_tasks.models.packed import Packed
from flywheel_tasks.training import rl
from flywheel_tasks.training.task import After, Stop, Task, Values


class Bigram(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, packed: Packed, targets: Any, temperature: float = 1.0) -> TokenLogprobs:
        entries = target_entries(packed, targets)
        before, token = packed.target_ids[entries - 1], packed.target_ids[entries]
        rows = torch.log_softmax(self.logits / temperature, 1)[before]
        entropy = -(rows.exp() * rows).sum(1)
        return TokenLogprobs(rows.gather(1, token[:, None])[:, 0], entropy.detach(), packed.row_of[entries])


def logits(states: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(states, states, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task(start: Tensor, config: rl.LossConfig) -> Task:
    """The task of online RL with this policy in the place of a language model."""
    real = rl.task(Path("none"), config)
    return Task(lambda device: Bigram(start), real.loss, save, real.metrics)


def save(module: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"logits": module.logits.detach().clone()}, folder / "model.safetensors")  # type: ignore[union-attr,operator]


class Arms:
    """Source and hook in one: a bandit whose arms are the tokens after a context, drawn from the policy as it is."""

    def __init__(
        self, rewards: Tensor, config: rl.LossConfig, *, k: int, steps: int, seed: int = 0, lag: int = 0
    ) -> None:
        self.rewards, self.config, self.k, self.steps = rewards, config, k, steps
        self._rng, self._lag = torch.Generator().manual_seed(seed), lag
        self._past: list[Tensor] = []
        self._module: Any = None
        self._table: pa.Table | None = None

    def start(self, module: nn.Module) -> None:
        self._module = module

    def batch(self, step: int) -> pa.Table | None:
        if step % self.config.updates and self._table is not None:
            return self._table
        self._past = [*self._past, self._module.logits.detach().clone()][-1 - self._lag :]
        gen = torch.log_softmax(self._past[0], 1)
        rows = []
        for context in range(len(self.rewards)):
            arms = torch.multinomial(gen[context].exp(), self.k, replacement=True, generator=self._rng).tolist()
            earned = self.rewards[context, arms].numpy()
            if np.ptp(earned) > 0:
                logp = [[float(gen[context, arm])] for arm in arms]
                rows.append(
                    rl.group(f"{step}-{context}", [context], [[arm] for arm in arms], logp, earned, self.config)
                )
        self._table = pa.Table.from_pylist(rows, rl.ROWS)
        return self._table

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None: ...

    def after_step(self, at: After) -> Stop | Values | None:
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {}


def same(thing: Any) -> Callable[[], Any]:
    return lambda: thing


def learn(folder: Path, start: Tensor, arms: Arms, learning_rate: float) -> tuple[Tensor, Sequence[dict[str, Any]]]:
    """The policy after a run of the real loop, and its lines."""
    from safetensors.torch import load_file

    from flywheel_tasks.training import state
    from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
    from flywheel_tasks.training.loop import Job, run_loop
    from flywheel_tasks.training.step import World
    from tests.training.bags import Here

    uri = f"file://{folder.absolute()}/run"
    settings = TrainingConfig(steps=arms.steps, learning_rate=learning_rate, warmup=0.0, floor=0.0, clip=100.0)
    job = Job(
        task(start, arms.config), settings, PlacementConfig(save_every=10_000), 0, uri,
        source=same(arms), hooks=(*rl.hooks(arms.config), same(arms)),
    )  # fmt: skip
    link = Here(folder)
    run_loop(job, World(), link)
    state.fetch(uri, state.published(uri)[-1], folder / "fetched")
    return load_file(folder / "fetched" / "model.safetensors")["logits"], link.lines
