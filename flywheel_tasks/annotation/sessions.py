"""Interactive annotation, turn by turn (Sec. 2.2.2, 2.5.1): the conversation goes on from one of the two responses,
drawn at random whichever was preferred, so that the history favours neither; then the annotator says the next thing.

A session that goes on is a prompt again, so the next round makes a pair for it as for any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from flywheel_tasks.annotation.pairing import draws
from flywheel_tasks.core import schemas

MODES = ("interactive", "steerability")


def continued(pair: Mapping[str, Any], seed: int) -> str:
    """The response (y0 or y1) that the conversation goes on with."""
    return "y0" if draws(seed, "continue", [pair["pair_id"]])[0] < 0.5 else "y1"


def next_prompt(
    pair: Mapping[str, Any], annotator: str, said: str, seed: int, most_turns: int
) -> dict[str, Any] | None:
    """The session's next prompt, or None where it has had enough turns. Each annotator has a session of their own."""
    earlier = sum(turn["role"] == "user" for turn in pair["turns"])
    if earlier >= most_turns:
        return None
    y = continued(pair, seed)
    own = hashlib.sha256(f"session\0{pair['pair_id']}\0{annotator}\0{said}".encode()).hexdigest()[:32]
    turns = [*pair["turns"], {"role": "assistant", "content": pair[y]}, {"role": "user", "content": said}]
    return {
        **{name: pair[name] for name in ("user", "character_id", "locale", "language", "jtbd", "split")},
        "prompt_id": own,
        "conversation_id": own,
        "source": "internal",
        "turns": turns,
        "turn_index": len(turns) - 1,
        "first_turn": False,
        "code_mixed": None,
        "depth": "short" if earlier < 5 else "medium" if earlier < 20 else "long",
        "quality": None,
        "difficulty": None,
        "model_version": pair[f"policy{y[1]}"],
        "near_policy": True,
    }


def prompts(rows: Iterable[dict[str, Any] | None]) -> pa.Table:
    """Session prompts as a table."""
    return pa.Table.from_pylist([row for row in rows if row], schema=schemas.PROMPT)
