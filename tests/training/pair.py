"""One of two workers that train together over gloo, without Ray: `python -m tests.training.pair RANK PORT FOLDER MODEL
KIND`. KIND is `copies` or `shards`, then `lora` or `full`, then a dtype: shards-lora-float32."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.training import sft
from flywheel_tasks.training.loop import run_loop
from flywheel_tasks.training.step import World
from tests.training import bags, chats

SAID = ("The tide is high.", "Gulls.", "A long story of salt and rope and rain.", "Aye.")


def settings(model: Path, kind: str) -> dict[str, Any]:
    """13 examples in batches of 4: the last batch has one row for two workers."""
    _, tuned, dtype = kind.split("-")
    lora = Lora(rank=4, alpha=8) if tuned == "lora" else None
    return {
        "what": sft.task(model, lora=lora, dtype=getattr(torch, dtype)),
        "rows_table": examples(model), "batch": 4, "epochs": 1, "token_budget": 150, "learning_rate": 1e-3,
        "save_every": 1,
    }  # fmt: skip


def examples(model: Path) -> pa.Table:
    talks = [
        [{"role": "user", "content": f"Word {i}."}, {"role": "assistant", "content": SAID[i % 4]}] for i in range(13)
    ]
    table = chats.examples([chats.example(f"e{i}", talk) for i, talk in enumerate(talks)])
    return sft.encode(table, chats.CARDS, Template(load_tokenizer(model)), max_tokens=512).table


def main(rank: int, port: str, folder: Path, model: Path, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    mine = folder / f"worker-{rank}"
    mine.mkdir(parents=True)
    link = bags.Here(mine)
    sharded = kind.startswith("shards")
    run_loop(
        bags.job(mine, **settings(model, kind), workers=2, shard=sharded),
        World(rank, 2, torch.device("cpu"), sharded),
        link,
    )
    (mine / "losses").write_text(" ".join(loss.hex() for loss in bags.losses_of(link.lines)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
