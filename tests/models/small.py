"""Rows, chat templates and models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from flywheel_tasks.models.chat import Template, load_tokenizer
from tests.tiny_llama import VOCABULARY

# Tensors this small gain nothing from a second thread, and lose much on a busy machine.
torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
           "<think>")  # fmt: skip


def template(folder: Path, kind: str = "llama3") -> Template:
    """The tiny model's tokenizer under Llama 3's template, or under ChatML with its control tokens and with <think>,
    which is not declared special."""
    tokenizer = load_tokenizer(folder)
    if kind == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.add_tokens(["<think>"])
        tokenizer.chat_template = CHATML
    return Template(tokenizer)


def turns(*texts: str) -> list[dict[str, Any]]:
    """Turns by user and assistant in alternation."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def token_rows(seed: int, lengths: Sequence[int], shared: int = 0) -> list[np.ndarray]:
    """Random rows that begin with the same `shared` tokens."""
    draw = np.random.default_rng(seed)
    prefix = draw.integers(5, VOCABULARY, shared)
    return [np.concatenate([prefix, draw.integers(5, VOCABULARY, n)]) for n in lengths]


ragged = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def flat_targets(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Every token but the first of each row."""
    return np.concatenate([np.arange(len(row)) > 0 for row in rows])


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to `tolerance` of the larger one's norm."""
    return bool((a - b).norm() <= tolerance * max(float(b.norm()), 1e-3))
