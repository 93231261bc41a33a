"""Real engines for tests, and what an independent model says about its tokens."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.models.engine import Engine, Request
from flywheel_tasks.models.engine_config import EngineConfig
from tests.tiny_llama import VOCABULARY

SMALL = EngineConfig(cache_gib=0.25, sequences=32, stall_seconds=120, start_seconds=600)


@cache
def shared(folder: Path) -> Engine:
    engine = started(folder)
    atexit.register(engine.close)
    return engine


def started(folder: Path, config: EngineConfig = SMALL) -> Engine:
    """Pinned threads that wait for each other crawl when other processes use the same cores: one thread, unpinned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        return Engine(ModelConfig(path=str(folder)), config).__enter__()


def prompt(number: int, length: int = 40) -> list[int]:
    """Token ids without structure, none of them special, different for each number."""
    return [
        5 + (number * 37 + position * 11 + position * position * 3) % (VOCABULARY - 5) for position in range(length)
    ]


def requests(count: int, length: int = 40) -> list[Request]:
    return [Request(f"p{number}", prompt(number, length)) for number in range(count)]


@cache
def reference(folder: Path) -> Any:
    """The same checkpoint in transformers, in the engine's type."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def logits(folder: Path, prompt: Sequence[int], response: Sequence[int]) -> Any:
    """transformers' logits [len(response), vocabulary] of each response token."""
    import torch

    with torch.no_grad():
        out = reference(folder)(torch.tensor([[*prompt, *response]])).logits[0].float()
    return out[len(prompt) - 1 : len(prompt) - 1 + len(response)]


def logprobs(folder: Path, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
    """A trainer's logprobs for the probe."""
    found = []
    for asked, response in zip(prompts, responses, strict=True):
        table = logits(folder, asked, response).log_softmax(-1)
        found.append([float(table[i, token]) for i, token in enumerate(response)])
    return found
