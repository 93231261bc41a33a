"""A small thing to train: which of two token sequences is better, judged by the mean of token embeddings.

It has dropout, so that an inexact resume would show, and it can be told to fail on given rows or at given steps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from flywheel_tasks.training import losses, rows
from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
from flywheel_tasks.training.loop import Job, run_loop
from flywheel_tasks.training.optim import BETAS
from flywheel_tasks.training.rows import RowFile
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Loss, Step, Task

VOCABULARY, WIDTH = 64, 16


class Bag(nn.Module):
    def __init__(self, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2)])
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, 1, dtype=dtype)

    def forward(self, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(self.drop(hidden)))
        row = torch.bucketize(torch.arange(len(ids)), starts, right=True) - 1
        mean = torch.zeros(len(starts), WIDTH, dtype=hidden.dtype).index_add(0, row, hidden)
        return self.head(mean).squeeze(-1).float()


def build(device: torch.device, dropout: float, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(11)
    return Bag(dropout, dtype).to(device)


def loss(module: nn.Module, table: pa.Table, at: Step, poison: str, hurt: Callable[[int], None] | None) -> Loss:
    if hurt:
        hurt(at.step)
    found, _ = rows.sequences(table)
    starts = torch.tensor(np.cumsum([0, *map(len, found)])[:-1])
    ids = torch.from_numpy(np.concatenate(found).astype(np.int64))
    chosen, rejected = module(ids, starts).view(-1, 2).unbind(1)
    values = losses.pointwise(chosen, rejected)
    if poison in table.column("row_id").to_pylist():
        values = values * float("nan")
    right = float((chosen > rejected).sum())
    return Loss(values.sum(), {"accuracy": (right, len(values))}, computed=len(ids))


def save(module: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, folder / "model.safetensors")


def task(
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    poison: str = "",
    hurt: Callable[[int], None] | None = None,
) -> Task:
    return Task(
        build=partial(build, dropout=dropout, dtype=dtype),
        loss=partial(loss, poison=poison, hurt=hurt),
        save=save,
        metrics=("accuracy",),
    )


def kill_once(step: int, at: int, flag: str) -> None:
    """SIGKILL this process at one step, the first time only."""
    if step == at and not os.path.exists(flag):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def hang(step: int, at: int, mark: str) -> None:
    if step == at:
        Path(mark).touch()
        time.sleep(3600)


def table(count: int = 48, seed: int = 0) -> pa.Table:
    """Pairs whose chosen side has more small token ids: something to learn."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        n = rng.integers(3, 40, 2)
        sides = [rng.integers(0, 40, n[0]), rng.integers(24, VOCABULARY, n[1])]
        made.append(rows.row(f"pair-{i:03d}", [s.astype(np.int32) for s in sides], 1.0))
    return pa.Table.from_pylist(made, rows.schema())


def job(folder: Path, what: Task | None = None, rows_table: pa.Table | None = None, **settings: Any) -> Job:
    """A job over a file of rows; settings go to TrainingConfig or PlacementConfig, wherever they are known."""
    known = {"learning_rate": 0.01, "batch": 8, "epochs": 2, "token_budget": 100_000} | settings
    uri = f"file://{folder.absolute()}"
    return Job(
        what or task(),
        TrainingConfig(**{k: v for k, v in known.items() if k in TrainingConfig.model_fields}),
        PlacementConfig(**{k: v for k, v in known.items() if k in PlacementConfig.model_fields}),
        seed=known.get("seed", 5),
        folder=f"{uri}/run",
        rows=RowFile.write(f"{uri}/rows.arrow", [table() if rows_table is None else rows_table]),
        hooks=known.get("hooks", ()),
        source=known.get("source"),
    )


class Here:
    """A link for a run in this process: keeps what was reported, and the last checkpoint in a folder."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder, self.lines, self.stop_after = folder, [], stop_after  # type: ignore[var-annotated]

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        done = sorted(self.folder.glob("step-*"))
        yield done[-1] if done else None

    def report(self, lines: Sequence[Mapping[str, Any]], checkpoint: Path | None = None, step: int = 0) -> None:
        self.lines += lines
        if checkpoint is not None:
            checkpoint.rename(self.folder / f"step-{step:06d}")
            if self.stop_after is not None and step >= self.stop_after:
                raise InterruptedError(f"stopped after step {step}")

    def alive(self) -> None:
        pass


def run(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train here, alone, and return the lines."""
    folder.mkdir(parents=True, exist_ok=True)
    link = Here(folder)
    run_loop(job(folder, **settings), World(), link)
    return link.lines


def losses_of(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    return [line["metrics"]["loss"] for line in lines]


def gradient(*folders: Path) -> dict[str, torch.Tensor]:
    """The whole batch's gradient of the first step, after clipping: Adam's first moment holds (1 - beta) times it.
    Shards of several workers are put together. Weights would not do: Adam turns a gradient that is rounding noise into
    a step of the whole learning rate."""
    from safetensors.torch import load_file

    files = sorted((f for folder in folders for f in folder.rglob("step-000001*/worker-*.safetensors")), key=_name)
    if not files:
        raise AssertionError(f"no state of the first step below {folders}")
    parts = [{k: v for k, v in load_file(file).items() if k.startswith("exp_avg/")} for file in files]
    return {name: torch.cat([part[name] for part in parts]) / (1 - BETAS[0]) for name in parts[0]}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two gradients, beside the largest entry of the first."""
    if one.keys() != other.keys():
        raise AssertionError(f"gradients of different weights: {sorted(one.keys() ^ other.keys())}")
    most = max(float(value.abs().max()) for value in one.values())
    return max(float((value - other[name]).abs().max()) for name, value in one.items()) / most


def _name(file: Path) -> str:
    return file.name


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from flywheel_tasks.training import state

    target = folder / f"fetched-{step}"
    uri = f"file://{folder.absolute()}/run"
    state.fetch(uri, next(model for model in state.published(uri) if model.step == step), target)
    return load_file(target / "model.safetensors")
