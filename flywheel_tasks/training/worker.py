"""The Ray Train side of a worker: checkpoints, reports, and the deadline on everything it does."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from flywheel_tasks.models.memory import keep_pages
from flywheel_tasks.training.loop import run_loop
from flywheel_tasks.training.step import World


class Lines(ray.train.UserCallback):
    """Runs beside the driver, on its machine: hands reports over through a file that the driver reads."""

    def __init__(self, path: str) -> None:
        self._path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with open(self._path, "a") as stream:
            stream.writelines(json.dumps(line) + "\n" for line in metrics[0].get("lines", ()))


class _RayLink:
    def __init__(self, run: str, deadline_s: float) -> None:
        self._run, self._deadline = run, deadline_s
        self._rank = ray.train.get_context().get_world_rank()

    @contextmanager
    def resume(self) -> Iterator[Path | None]:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def report(self, lines: Sequence[Mapping[str, Any]], checkpoint: Path | None = None, step: int = 0) -> None:
        metrics = {"lines": list(lines)} if self._rank == 0 else {}
        if checkpoint is None:
            ray.train.report(metrics)
            return
        kept = ray.train.Checkpoint.from_directory(checkpoint) if any(checkpoint.iterdir()) else None
        ray.train.report(metrics, checkpoint=kept, checkpoint_dir_name=f"step-{step:06d}-{self._run}")

    def alive(self) -> None:
        """A thread that does nothing for the deadline takes its process with it, whatever it hangs in: Ray sees the
        death, where it would wait for ever on a worker that answers but does not work."""
        faulthandler.dump_traceback_later(self._deadline, exit=True, file=2)


def worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    keep_pages()
    job = config["job"]
    context = ray.train.get_context()
    torch.set_num_threads(config["threads"])
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), job.placement.shard)
    try:
        run_loop(job, world, _RayLink(config["run"], job.placement.deadline_s))
    finally:
        faulthandler.cancel_dump_traceback_later()
