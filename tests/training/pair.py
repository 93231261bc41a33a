"""One of two workers that train together over gloo, without Ray: `python -m tests.training.pair RANK PORT FOLDER MODEL
KIND`. KIND is `copies` or `shards`, then `lora` or `full`, a dtype, what is trained, and `again` where layers are
computed twice: shards-lora-float32-sft."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn

from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.training import dpo, preference, sft
from flywheel_tasks.training.loop import run_loop
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Task
from tests.training import bags, chats

SAID = ("The tide is high.", "Gulls.", "A long story of salt and rope and rain.", "Aye.")


def settings(model: Path, kind: str) -> dict[str, Any]:
    """13 examples in batches of 4: the last batch has one row for two workers."""
    _, tuned, dtype, what, *again = kind.split("-")
    loading = {"lora": Lora(rank=4, alpha=8) if tuned == "lora" else None, "dtype": getattr(torch, dtype)}
    task, rows = TASKS[what](model, loading)
    return {
        "what": task, "rows_table": rows, "batch": 4, "epochs": 1, "token_budget": 150, "learning_rate": 1e-3,
        "save_every": 1, "checkpoint_layers": bool(again),
    }  # fmt: skip


def _sft(model: Path, loading: dict[str, Any]) -> tuple[Task, pa.Table]:
    return sft.task(model, **loading), examples(model)


def _dpo(model: Path, loading: dict[str, Any]) -> tuple[Task, pa.Table]:
    """The reference's log-probabilities are computed by the module itself, before the first step."""
    template = Template(load_tokenizer(model))
    rows = dpo.encode(preferences(), chats.CARDS, template, max_tokens=512, mask_eot=False).table
    return dpo.task(model, **loading), rows


def _pointwise(model: Path, loading: dict[str, Any]) -> tuple[Task, pa.Table]:
    """A scoring head, which no file holds."""
    template = Template(load_tokenizer(model))
    rows = preference.encode(preferences(), chats.CARDS, template, kind="pointwise", max_tokens=512).table
    return preference.task(model, kind="pointwise", **loading), rows


TASKS = {"sft": _sft, "dpo": _dpo, "pointwise": _pointwise}


def preferences() -> pa.Table:
    return chats.preferences(
        [chats.preference(f"p{i}", chats.turns(f"Word {i}."), SAID[i % 4], f"No {i}.") for i in range(13)]
    )


def examples(model: Path) -> pa.Table:
    talks = [
        [{"role": "user", "content": f"Word {i}."}, {"role": "assistant", "content": SAID[i % 4]}] for i in range(13)
    ]
    table = chats.examples([chats.example(f"e{i}", talk) for i, talk in enumerate(talks)])
    return sft.encode(table, chats.CARDS, Template(load_tokenizer(model)), max_tokens=512).table


def _told_of(build: Callable[[torch.device], nn.Module], path: Path, device: torch.device) -> nn.Module:
    """Writes down where weights were put whenever the module was built."""
    module = build(device)
    with path.open("a") as stream:
        stream.write(" ".join(sorted({p.device.type for p in (*module.parameters(), *module.buffers())})) + "\n")
    return module


def main(rank: int, port: str, folder: Path, model: Path, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    mine = folder / f"worker-{rank}"
    mine.mkdir(parents=True)
    link = bags.Here(mine)
    sharded = kind.startswith("shards")
    told = settings(model, kind)
    told["what"] = replace(told["what"], build=partial(_told_of, told["what"].build, mine / "built"))
    job = bags.job(mine, **told, workers=2, shard=sharded)
    job = replace(job, folder=f"file://{folder.absolute()}/run")  # where the workers find each other's prepared values
    run_loop(job, World(rank, 2, torch.device("cpu"), sharded), link)
    (mine / "losses").write_text(" ".join(loss.hex() for loss in bags.losses_of(link.lines)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
