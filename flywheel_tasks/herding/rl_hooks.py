"""What happens around every step of online RL (Sec. 2.4.3): batches come in, weights go out, guardrails watch.

All of them run in the learners. The first learner alone speaks to the rollouts; the others get its batch from it, and
of a sharded policy they take part in every pass and wherever weights are put together.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.herding import guardrail
from flywheel_tasks.herding.guardrail import GuardrailConfig
from flywheel_tasks.herding.rollouts import OTHER_MACHINE, Rollouts
from flywheel_tasks.models import arrival
from flywheel_tasks.models.arrival import Checksum
from flywheel_tasks.models.checkpoint import merged_shapes, merged_weights
from flywheel_tasks.models.probe import ProbeConfig, probe
from flywheel_tasks.models.sync import SharedWeights, Transfer, from_device, gpu
from flywheel_tasks.training.shard import is_spread
from flywheel_tasks.training.task import After, Stop, Values

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flywheel_tasks.herding.rl_remote import Asked
    from flywheel_tasks.herding.rollouts import Drawn
    from flywheel_tasks.models.engine import Completion, Engine, Request
    from flywheel_tasks.models.engine_config import Sampling

_CHUNK = 16
"""Sequences of one pass without gradient."""


class Batches:
    """The source of the run: one rollout for every `updates` steps.

    With `ahead` the next rollout is generated while the learner works on this one, by the policy before the update:
    one step off-policy, which eq. 8 weighs by π_old/π_gen. After a resume the first batch is the policy's own."""

    def __init__(self, rollouts: Asked, steps: int, updates: int, ahead: bool) -> None:
        self.steps = steps
        self._rollouts, self._updates, self._ahead = rollouts, updates, ahead
        self._cursor = 0
        self._table: pa.Table | None = None
        self._next: Callable[[], tuple[pa.Table, int]] | None = None

    def batch(self, step: int) -> pa.Table | None:
        if step % self._updates and self._table is not None:
            return self._table
        if _rank() == 0:
            wait = self._next or self._rollouts.begin("batch", step, self._cursor)
            self._table, self._cursor = wait()
            follows = step + self._updates
            more = self._ahead and follows < self.steps
            self._next = self._rollouts.begin("batch", follows, self._cursor) if more else None
        self._table, self._cursor = _shared(self._table, self._cursor)
        return self._table

    def state(self) -> dict[str, Any]:
        return {"cursor": self._cursor}

    def restore(self, state: dict[str, Any]) -> None:
        self._cursor = int(state["cursor"])


class Sync:
    """Hands the learner's weights to the engines after every rollout's updates, and proves it: that each worker loaded
    them, to the bit, and that what the engines draw is as likely to the learner as to them."""

    def __init__(
        self,
        rollouts: Asked,
        prompts: Sequence[Sequence[int]],
        config: ProbeConfig,
        updates: int,
    ) -> None:
        self._rollouts, self._prompts, self._config, self._updates = rollouts, prompts, config, updates
        self._shared = SharedWeights()
        self._transfer: Transfer | None = None
        self._module: nn.Module | None = None
        self._ended = time.monotonic()

    def start(self, module: nn.Module) -> None:
        if module is not self._module and _rank() == 0:
            self._transfer = self._opened(module)
        self._module = module
        self._hand_over(module)
        self._ended = time.monotonic()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The engines may serve anything: another attempt's weights, or those of steps that are done again."""
        if self._module is not None:
            self.start(self._module)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def after_step(self, at: After) -> Stop | Values | None:
        """`seconds/step` goes from the end of one hand-over to the end of the next."""
        told: dict[str, float] = {"seconds/learn": at.metrics["step_s"]}
        if (at.step + 1) % self._updates == 0:
            if at.rank == 0:  # only now: the answer waits for the rollout that is made beside these updates
                told |= self._rollouts.ask("told", at.step + 1 - self._updates)
            told |= self._hand_over(at.module)
        now = time.monotonic()
        told["seconds/step"], self._ended = now - self._ended, now
        return told

    def _hand_over(self, module: nn.Module) -> dict[str, float]:
        if _rank() != 0:
            if is_spread(module):
                deque(merged_weights(module), maxlen=0)  # type: ignore[arg-type]
                Logprobs(module).along()
            return {}
        began = time.monotonic()
        if self._transfer is not None:
            self._transfer.send()
        else:
            sent = Checksum()
            path = self._shared.write(sent.over(merged_weights(module)))  # type: ignore[arg-type]
            arrival.check(sent.value(), self._rollouts.ask("serve", path))
            self._shared.keep_only(path)
        drift = probe(cast("Engine", _Engine(self._rollouts)), self._prompts, Logprobs(module), self._config)
        return drift.metrics() | {"seconds/sync": time.monotonic() - began}

    def _opened(self, module: nn.Module) -> Transfer | None:
        """The way from device to device, where it is the way; the engines find this process at its node's address."""
        engine_gpus = self._rollouts.ask("gpus")
        if not from_device(engine_gpus, gpu(next(module.parameters()).device)):
            return None
        import ray

        return Transfer(
            partial(self._rollouts.ask, "transfer"), partial(merged_shapes, module), partial(merged_weights, module),
            engine_gpus=len(engine_gpus), address=ray.util.get_node_ip_address(),
        )  # fmt: skip


class Watch:
    """Every so many steps: the policy against the one it started as, on held-out prompts."""

    def __init__(
        self,
        rollouts: Asked,
        prompts: pa.Table,
        start: Drawn,
        config: GuardrailConfig,
        *,
        steps: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._rollouts, self._prompts, self._start = rollouts, prompts, start
        self._config, self._steps, self._temperature, self._seed = config, steps, temperature, seed

    def start(self, module: nn.Module) -> None:
        """The responses of the first policy were drawn before the run."""

    def after_step(self, at: After) -> Stop | Values | None:
        done = at.step + 1
        if done % self._config.every and done != self._steps:
            return None
        if at.rank != 0:
            if is_spread(at.module):
                _kl_to_start(at.module, None, self._temperature)
            return None
        began = time.monotonic()
        drawn: Drawn = self._rollouts.ask("respond", self._prompts, 1, f"step-{done}")
        guard = guardrail.measure(
            done, drawn.completions, self._start.completions,
            pointwise=(drawn.raw, self._start.raw),
            pairwise=self._rollouts.ask("compare", drawn.completions, self._start.completions),
            kl=_kl_to_start(at.module, drawn, self._temperature),
            entropy=at.metrics.get("entropy"),
            config=self._config,
            seed=self._seed,
        )  # fmt: skip
        return guard.metrics() | {"seconds/guard": time.monotonic() - began}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Every measurement stands by itself."""


class Halt:
    """Ends the run when the policy is good enough, or too good (V12). After `Watch`, so that what it saw is logged."""

    def __init__(self, config: GuardrailConfig) -> None:
        self._config = config

    def start(self, module: nn.Module) -> None: ...

    def after_step(self, at: After) -> Stop | Values | None:
        level = guardrail.of_metrics(at.step + 1, at.metrics)
        found = guardrail.verdict(level, self._config) if level else None
        return Stop(found.reason) if found and found.level != "go" else None

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


def reach(rollouts: Asked) -> None:
    """Whether the engines can read what this process puts into shared memory: a few bytes as weights will go."""
    nonce = torch.from_numpy(np.frombuffer(secrets.token_bytes(32), np.uint8).copy())
    shared = SharedWeights()
    path = shared.write({"nonce": nonce})
    try:
        if rollouts.ask("digest", path) != Rollouts.digest(path):
            raise FlywheelError(OTHER_MACHINE)
    finally:
        shared.close()


class Logprobs:
    """log π_θ of given responses, token by token, without gradient."""

    def __init__(self, module: nn.Module, temperature: float = 1.0) -> None:
        self._module, self._temperature = module, temperature

    def along(self) -> None:
        """The passes that the first learner asks for: a sharded policy takes all of them."""
        self._passes(*_asked(None))

    def __call__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        if is_spread(self._module):
            _asked([list(map(list, prompts)), list(map(list, responses))])
        return self._passes(prompts, responses)

    def _passes(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        from flywheel_tasks.models.packed import pack

        device = next(self._module.parameters()).device
        found: list[list[float]] = []
        with torch.no_grad():
            for first in range(0, len(prompts), _CHUNK):
                both = list(zip(prompts[first : first + _CHUNK], responses[first : first + _CHUNK], strict=True))
                packed = pack([[*prompt, *response] for prompt, response in both], device=device)
                wanted = np.concatenate([[False] * len(p) + [True] * len(r) for p, r in both])
                values = self._module(packed, wanted, self._temperature).logprob.float().cpu().numpy()
                ends = np.cumsum([len(response) for _, response in both])[:-1]
                found += [part.tolist() for part in np.split(values, ends)]
        return found


class _Engine:
    """As much of an engine as the probe asks for."""

    def __init__(self, rollouts: Asked) -> None:
        self._rollouts = rollouts
        self.replicas: int = rollouts.ask("replicas")

    def generate(self, requests: Sequence[Request], sampling: Sampling, replica: int) -> list[Completion]:
        drawn: list[Completion] = self._rollouts.ask("draw", requests, sampling, replica)
        return drawn


def _kl_to_start(module: nn.Module, drawn: Drawn | None, temperature: float) -> float | None:
    """Mean KL per token to the policy that the run began with, which adapters leave in place; fully tuned weights do
    not, and π_ref's KL is logged every step in either case. Without `drawn` this is another learner that goes along."""
    from flywheel_tasks.models.load import Policy

    if not isinstance(module, Policy) or not hasattr(module.model, "disable_adapter"):
        return None
    if drawn is None:
        with module.reference():
            Logprobs(module, temperature).along()
        return None
    k = len(drawn.responses) // len(drawn.prompts)
    prompts = [prompt for prompt in drawn.prompts for _ in range(k)]
    known = [i for i, response in enumerate(drawn.responses) if response.tokens]
    sums: NDArray[np.float64] = np.full(len(prompts), np.nan)
    with module.reference():
        found = Logprobs(module, temperature)([prompts[i] for i in known], [drawn.responses[i].tokens for i in known])
    sums[known] = [float(np.sum(values)) for values in found]
    return guardrail.mean_kl(drawn.completions, sums) if known else None


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _shared(table: pa.Table | None, cursor: int) -> tuple[pa.Table, int]:
    """The first worker's batch at every worker, as Arrow's own bytes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return table, cursor
    raw = b""
    if table is not None and dist.get_rank() == 0:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        raw = sink.getvalue().to_pybytes()
    raw, cursor = _from_first(raw, cursor)
    return pa.ipc.open_stream(raw).read_all(), cursor


def _asked(lists: list[Any] | None) -> Any:
    """The first worker's lists of token ids at every worker, as JSON."""
    return json.loads(_from_first(b"" if lists is None else json.dumps(lists).encode(), 0)[0])


def _from_first(raw: bytes, number: int) -> tuple[bytes, int]:
    """Bytes and a number of the first worker, at every worker."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    head = torch.tensor([len(raw), number], dtype=torch.int64, device=device)
    dist.broadcast(head, 0)
    body = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(device) if raw else None
    body = torch.empty(int(head[0]), dtype=torch.uint8, device=device) if body is None else body
    dist.broadcast(body, 0)
    return body.cpu().numpy().tobytes(), int(head[1])
