"""The rollouts' process as the learner sees it: calls with a deadline, and errors of one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.herding.rollouts import Rollouts, Setup
from flywheel_tasks.models.memory import ENVIRONMENT
from flywheel_tasks.training.config import PlacementConfig

_SPARE = 0.9
"""The share of a learner's deadline that it waits for rollouts: its own end says less than this error."""
_LATE = (
    "an engine or a model hangs; the next attempt goes on from the last checkpoint (rl.placement.deadline_s allows "
    "more)"
)


class Asked(Protocol):
    """Whoever answers for a `Rollouts`."""

    def begin(self, name: str, *arguments: Any) -> Callable[[], Any]:
        """Call a method of it; what comes back waits for the answer."""

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of it and wait."""


class Here:
    """Rollouts in this process: nothing overlaps."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    def begin(self, name: str, *arguments: Any) -> Callable[[], Any]:
        answer = getattr(self._rollouts, name)(*arguments)
        return lambda: answer

    def ask(self, name: str, *arguments: Any) -> Any:
        return self.begin(name, *arguments)()


class Far:
    """Rollouts in a Ray actor. Calls are answered in the order in which they were begun. `late` says why there may be
    no answer within the deadline, and which key allows more."""

    def __init__(self, actor: Any, deadline_s: float, late: str = _LATE) -> None:
        self._actor, self._deadline, self._late = actor, deadline_s, late

    def begin(self, name: str, *arguments: Any) -> Callable[[], Any]:
        return partial(self._wait, name, getattr(self._actor, name).remote(*arguments))

    def ask(self, name: str, *arguments: Any) -> Any:
        return self.begin(name, *arguments)()

    def _wait(self, name: str, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=self._deadline)
        except ray.exceptions.GetTimeoutError as error:
            raise FlywheelError(
                f"the rollouts gave no answer to '{name}' in {self._deadline:.0f} s: {self._late}"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FlywheelError):
                raise error.cause from None
            last = str(error.cause).strip().splitlines() or [type(error.cause).__name__]
            raise FlywheelError(
                f"the rollouts failed at '{name}': {type(error.cause).__name__}: {last[0][:300]}"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise FlywheelError(
                f"the process of the rollouts died at '{name}': see its log; the next attempt goes on from the last "
                "checkpoint"
            ) from error


@contextmanager
def rollouts(setup: Setup, *, gpus: float, deadline_s: float) -> Iterator[Far]:
    """A process for rollouts until the block ends. `gpus` are its own; with none it sees those of this machine. That it
    is on a cluster it is told: a cluster's own processes need not know the address, and its engines ask."""
    ray = session.ensure()
    threads = session.cpus()
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    environment |= {name: os.environ[name] for name in ("RAY_ADDRESS",) if os.environ.get(name)}
    actor = (
        ray.remote(_Process)
        .options(
            num_cpus=0,  # it works while the learner waits for it
            num_gpus=gpus,
            max_restarts=0,
            runtime_env={"env_vars": environment},
        )
        .remote(setup, threads)
    )
    try:
        place = f"rl.rollout_gpus ({gpus:g}) are not free, or " if gpus else ""
        late = f"{place}models and engine take longer to load (rl.engine.start_seconds allows more)"
        Far(actor, setup.engine.start_seconds, late).ask("ready")
        yield Far(actor, _SPARE * deadline_s)
    finally:
        ray.kill(actor, no_restart=True)


def reachable(far: Far, placement: PlacementConfig) -> None:
    """On a cluster, before anything is generated: that a process placed as the learners will be shares memory with the
    engines. One machine has nothing to ask, nor have learners and engines on GPUs: they need no common memory."""
    ray = session.ensure()
    if sum(node["Alive"] for node in ray.nodes()) > 1 and not (placement.gpus and far.ask("gpus")):
        ask_as_learner(far, placement)


def ask_as_learner(far: Far, placement: PlacementConfig) -> None:
    from flywheel_tasks.herding.rl_hooks import reach

    ray = session.ensure()
    learner = ray.remote(reach).options(num_cpus=placement.cpus or 1, num_gpus=placement.gpus, max_retries=0)
    try:
        ray.get(learner.remote(far), timeout=placement.deadline_s)
    except ray.exceptions.GetTimeoutError as error:
        raise FlywheelError(
            f"the cluster found no place for a learner in {placement.deadline_s:.0f} s: rl.placement asks for "
            f"{placement.gpus:g} GPUs and {placement.cpus or 1:g} cores each"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, FlywheelError) else error) from None


class _Process(Rollouts):
    """Ray gives a worker without cores one thread."""

    def __init__(self, setup: Setup, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        super().__init__(setup)
