"""TRL's GRPOTrainer for the same job: the same prompts and cards, reward model, adapters, clip, KL, learning rate."""

from __future__ import annotations

import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.rl_setting import BETA, CLIP, LEARNING_RATE, MAX_TOKENS, MICRO, PROMPTS, RANK, SEED, WARM_UP, K


def plain(prompts: str, reward_model: str, steps: int) -> dict[str, Any]:
    """Responses by transformers' generate."""
    return _run(prompts, reward_model, steps, {})


def with_vllm(prompts: str, reward_model: str, steps: int) -> dict[str, Any]:
    """Responses by vLLM in TRL's process (colocate), where that can start; else the reason why not."""
    from flywheel_tasks.models.engine_link import environment

    os.environ.update(environment(sorted(os.sched_getaffinity(0))))
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.1,
        "vllm_max_model_length": 2048,
    }
    try:
        return _run(prompts, reward_model, steps, settings)
    except Exception as error:  # whatever it is, it is the answer
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"}


def _run(prompts: str, reward_model: str, steps: int, engine: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.generation_prompts import MODEL
    from flywheel_tasks.models.resolve import local_folder

    base = local_folder(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        trainer = _trainer(folder, steps, engine)(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
            reward_funcs=_reward(Path(reward_model)),
            reward_processing_classes=tokenizer,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(_messages(prompts)),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )  # fmt: skip
        clock = _clock(trainer, engine)
        trainer.train()
    logged = [line for line in trainer.state.log_history if "num_tokens" in line]
    seen = [0.0, *(line["num_tokens"] for line in logged)]
    return clock.told() | {
        "tokens": statistics.fmean(b - a for a, b in zip(seen[WARM_UP:], seen[WARM_UP + 1 :], strict=False)),
        "response_tokens": statistics.fmean(line["completions/mean_length"] for line in logged[WARM_UP:]),
        "kl": logged[-1]["kl"],
    }


def _messages(prompts: str) -> list[dict[str, Any]]:
    """Card and turns as TRL takes them, in the order in which our rollouts draw the prompts."""
    from benchmarks.generation_prompts import CHARACTERS
    from flywheel_tasks.herding.rollouts import Order
    from flywheel_tasks.models.generate import cards

    known, rows = cards(CHARACTERS), pq.read_table(prompts)
    places, _ = Order(rows.num_rows, SEED).take(0, rows.num_rows)
    return [
        {"prompt": [{"role": "system", "content": known[row["character_id"]].system}, *row["turns"]]}
        for row in rows.take(places).to_pylist()
    ]


def _reward(folder: Path) -> Any:
    """The same reward model as transformers' own class."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16)
    with torch.no_grad():
        model.score.weight.copy_(load_file(folder / "head.safetensors")["weight"])
    return model.eval()


def _trainer(folder: str, steps: int, engine: dict[str, Any]) -> Callable[..., Any]:
    library: Any = importlib.import_module("trl")
    config = library.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=True, max_steps=steps, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=PROMPTS * K // MICRO, num_generations=K, max_completion_length=MAX_TOKENS,
        temperature=1.0, beta=BETA, epsilon=CLIP, loss_type="dapo", scale_rewards="group", shuffle_dataset=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, seed=SEED,
        **engine,
    )  # fmt: skip
    return lambda **more: library.GRPOTrainer(args=config, **more)


class _Clock:
    """Seconds of every step and of the calls inside it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.parts: dict[str, list[float]] = {"generate": [], "score": [], "sync": []}

    def wrap(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.monotonic()
            try:
                return inner(*arguments, **named)
            finally:
                self.parts[part].append(time.monotonic() - began)

        setattr(owner, name, timed)

    def told(self) -> dict[str, Any]:
        counted = self.steps[WARM_UP:]
        parts = {name: statistics.median(values[WARM_UP:]) for name, values in self.parts.items() if values[WARM_UP:]}
        parts["generate"] -= parts.get("sync", 0.0)  # it is called from there
        parts["learn"] = statistics.median(counted) - sum(parts.values())
        return {"step_s": counted, "parts": {"sync": 0.0} | parts}


def _clock(trainer: Any, engine: dict[str, Any]) -> _Clock:
    from transformers import TrainerCallback

    clock = _Clock()
    clock.wrap(trainer, "_generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    if engine:
        clock.wrap(trainer.vllm_generation, "sync_weights", "sync")

    class Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.steps.append(time.monotonic() - self.began)

    trainer.add_callback(Watch())
    return clock
