"""Prompts and responses as the tests of RL's parts write them down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from flywheel_tasks.core import schemas


def prompts(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Schema `prompt`; a row names what matters to it."""
    return pa.Table.from_pylist([_prompt(number, row) for number, row in enumerate(rows)], schemas.PROMPT)


def completions(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Schema `completion`; `asked` is the user turn that a row's text answers."""
    return pa.Table.from_pylist([_completion(number, row) for number, row in enumerate(rows)], schemas.COMPLETION)


def turns(*texts: str) -> list[dict[str, str]]:
    """User and assistant in alternation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _prompt(number: int, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_id": f"p{number}", "conversation_id": f"c{number}", "user": f"u{number}", "character_id": "none",
        "source": "production", "turns": turns("Hello, how are you?"), "turn_index": 0, "first_turn": True,
        "locale": "en_US", "language": "en", "code_mixed": False, "jtbd": None, "depth": "first", "quality": None,
        "difficulty": None, "model_version": "v1", "near_policy": True, "split": "train",
    } | row  # fmt: skip


def _completion(number: int, row: dict[str, Any]) -> dict[str, Any]:
    asked = row.pop("asked", "Hello, how are you?")
    return {
        "completion_id": f"r{number}", "prompt_id": "p0", "user": "u0", "character_id": "none", "locale": "en_US",
        "language": None, "jtbd": None, "split": "train", "turns": turns(asked), "text": "Fine, thanks.", "sample": 0,
        "tokens": 5, "logprob": -5.0, "finish": "stop", "policy": "policy", "scores": [], "accepted": None,
        "reason": None,
    } | row  # fmt: skip
