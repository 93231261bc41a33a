"""One of two learners that share a policy over gloo, without Ray: `python -m tests.herding.learners RANK PORT FOLDER
MODEL KIND`. KIND is `copies` or `shards`, then `lora` or `full`, then a dtype."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flywheel_tasks.herding.rl_hooks import Batches, Sync, _kl_to_start
from flywheel_tasks.herding.rollouts import Drawn
from flywheel_tasks.models.arrival import Checksum
from flywheel_tasks.models.checkpoint import merged_shapes, merged_weights
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.engine_wire import Completion, Request
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.probe import ProbeConfig
from flywheel_tasks.models.sync import Calls, source
from flywheel_tasks.training import rl
from flywheel_tasks.training.loop import run_loop
from flywheel_tasks.training.shard import is_spread
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import After, Stop, Values
from tests.training import bags

STEPS, UPDATES, K = 4, 2, 4
PROMPTS = [[7 + 3 * i + j for j in range(12 + i)] for i in range(3)]


class Served:
    """Rollouts whose engine is transformers' own model: it serves the weights it is given, and nothing else."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.weights: dict[str, Tensor] = {}

    def ask(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def begin(self, name: str, *arguments: Any) -> Callable[[], Any]:
        answer = self.ask(name, *arguments)
        return lambda: answer

    def serve(self, path: str) -> list[str]:
        from safetensors.torch import load_file

        checksum = Checksum()
        self.weights = dict(checksum.over(load_file(path).items()))
        self._model.load_state_dict(self.weights)
        return [checksum.value()]

    def gpus(self) -> list[str]:
        return []

    def replicas(self) -> int:
        return 1

    def told(self, step: int) -> dict[str, float]:
        return {"asked": float(step)}

    def draw(self, requests: Sequence[Request], sampling: Sampling, replica: int | None = None) -> list[Completion]:
        torch.manual_seed(0)
        found = []
        for request in requests:
            ids = torch.tensor([request.tokens])
            out = self._model.generate(ids, do_sample=True, max_new_tokens=sampling.max_tokens, top_k=0)[0]
            response = out[ids.shape[1] :].tolist()
            found.append(Completion(request.id, 0, response, self.score(request.tokens, response), finish="length"))
        return found

    def batch(self, step: int, cursor: int) -> tuple[pa.Table, int]:
        """Two groups of fixed responses, as likely as the served weights hold them."""
        rng, rows = np.random.default_rng(cursor), []
        for group in range(2):
            prompt = rng.integers(5, 500, 20).tolist()
            responses = [rng.integers(5, 500, n).tolist() for n in rng.integers(3, 9, K)]
            gen = [self.score(prompt, response) for response in responses]
            rows.append(rl.group(f"{cursor}-{group}", prompt, responses, gen, rng.normal(size=K), loss()))
        return pa.Table.from_pylist(rows, rl.ROWS), cursor + 2

    def score(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        with torch.no_grad():
            logits = self._model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].tolist()


class Look:
    """After the last step: what vLLM's sender would announce and send, and the KL to the start."""

    def __init__(self, served: Served | None, told: dict[str, Any]) -> None:
        self._served, self._told = served, told

    def start(self, module: nn.Module) -> None: ...

    def after_step(self, at: After) -> Stop | Values | None:
        if at.step + 1 != STEPS:
            return None
        drawn = None
        if self._served is None:
            deque(merged_weights(at.module), maxlen=0)  # type: ignore[arg-type]
        else:
            self._told |= announced(at.module, self._served.weights)
            said = self._served.draw([Request(str(i), prompt) for i, prompt in enumerate(PROMPTS)], SIX)
            table = pa.table({"tokens": [len(c.tokens) for c in said], "logprob": [sum(c.logprobs) for c in said]})
            drawn = Drawn(table, np.zeros(len(said)), PROMPTS, said)
        if drawn is not None or is_spread(at.module):
            self._told["kl"] = _kl_to_start(at.module, drawn, 1.0)
        return None

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None: ...


SIX = Sampling(max_tokens=6)


def announced(module: Any, served: dict[str, Tensor]) -> dict[str, Any]:
    """vLLM's own sender up to NCCL, its four calls and what it sends held against its own receiver's types."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerWeightTransferEngine,
        NCCLWeightTransferEngine,
    )

    sent: dict[str, Tensor] = {}
    calls: list[str] = []
    infos: list[Any] = []

    class Sender(NCCLTrainerWeightTransferEngine):
        def _broadcast(self, source: Any, meta: Any) -> None:
            sent.update(self._checked_iter(source, meta))

    def call(name: str, info: Any = None) -> None:
        calls.append(name)
        infos.append(info)

    weights = source(partial(merged_shapes, module), partial(merged_weights, module))
    Sender(client=Calls(call), source=weights).send_weights()
    receiver = object.__new__(NCCLWeightTransferEngine)
    parsed = receiver.parse_update_info(json.loads(json.dumps(infos[1])))
    same = {
        name: str(served[name].dtype) == f"torch.{dtype}" and list(served[name].shape) == shape
        for name, dtype, shape in zip(parsed.names, parsed.dtype_names, parsed.shapes, strict=True)
    }
    return {
        "calls": calls,
        "announced": sorted(same) == sorted(served) and all(same.values()),
        "sent": all(torch.equal(sent[name], served[name]) for name in served),
    }


def loss() -> rl.LossConfig:
    return rl.LossConfig(updates=UPDATES)


def settings(model: Path, kind: str, served: Served | None, told: dict[str, Any]) -> dict[str, Any]:
    _, tuned, dtype = kind.split("-")
    bounds = {"most": 0.3, "mean": 0.07} if dtype == "bfloat16" else {"most": 1e-4, "mean": 1e-4}
    return {
        "what": rl.task(model, loss(), lora=Lora(rank=4, alpha=8) if tuned == "lora" else None,
                        dtype=getattr(torch, dtype)),
        "source": lambda: Batches(served, STEPS, UPDATES, ahead=False),  # type: ignore[arg-type]
        "hooks": (
            *rl.hooks(loss()),
            lambda: Sync(served, PROMPTS, ProbeConfig(tokens=4, **bounds), UPDATES),  # type: ignore[arg-type]
            lambda: Look(served, told),
        ),
        "learning_rate": 3e-3, "save_every": UPDATES, "token_budget": 100, "warmup": 0.0,
    }  # fmt: skip


def learn(folder: Path, model: Path, kind: str, world: World) -> list[dict[str, Any]]:
    """Killed after the first rollout's updates and begun again: averages come back too."""
    folder.mkdir(parents=True)
    told: dict[str, Any] = {}
    served = Served(model) if world.rank == 0 else None
    placed = {"workers": world.size, "shard": world.sharded}
    job = replace(bags.job(folder, **settings(model, kind, served, told), **placed), rows=None)
    lines = list[dict[str, Any]]()
    for link in (bags.Here(folder, stop_after=UPDATES), bags.Here(folder)):
        with suppress(InterruptedError):
            run_loop(job, world, link)
        lines = link.lines
    (folder / "told.json").write_text(json.dumps(told))
    return lines


def main(rank: int, port: str, folder: Path, model: Path, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    world = World(rank, 2, torch.device("cpu"), kind.startswith("shards"))
    lines = learn(folder / f"learner-{rank}", model, kind, world)
    (folder / f"learner-{rank}" / "lines.json").write_text(json.dumps(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
