"""What all encoders share: the same history for every response of a row, and the reasons a row can't be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core.quarantine import quarantined
from flywheel_tasks.models.chat import NO_CHARACTER, Card, Chat, Template

EMPTY = "empty_response"
EQUAL = "equal_responses"


def responses(
    template: Template,
    turns: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    card: Card | None,
    max_tokens: int,
) -> list[Chat]:
    """Each response after the same history: where the longest forces a cut, the others are cut with it, or a pair would
    also differ in what it answers."""
    chats = [template.chat(turns, card=card, response=text, max_tokens=max_tokens) for text in texts]
    dropped = max(chat.dropped_turns for chat in chats)
    if all(chat.dropped_turns == dropped for chat in chats):
        return chats
    first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    kept = [*turns[:first], *turns[first + dropped :]]
    again = [template.chat(kept, card=card, response=text, max_tokens=max_tokens) for text in texts]
    return [Chat(chat.ids, chat.trained, chat.eot, dropped) for chat in again]


def useless(chosen: str, rejected: str) -> str | None:
    """Why a pair teaches nothing, if it does not."""
    if not chosen.strip() or not rejected.strip():
        return EMPTY
    return EQUAL if chosen.strip() == rejected.strip() else None


def with_card(rows: pa.Table, cards: Mapping[str, Card], id_column: str) -> tuple[pa.Table, pa.Table]:
    """Rows that can be read (models.chat.card_of), and the quarantine of those whose character has no card."""
    known = pa.array(["", NO_CHARACTER, *cards], pa.string())
    ok = pc.or_(pc.is_null(rows["character_id"]), pc.is_in(rows["character_id"], known))
    return rows.filter(ok), quarantined(rows.filter(pc.invert(ok)), id_column, "unknown_character")
