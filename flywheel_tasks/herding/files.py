"""Data from outside the loop for SFT and DPO: safety, capability, failure fixes, base data (Sec. 2.4.2).

JSON lines. A line that breaks the contract goes to quarantine with its file, number and reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.storage import open_external

_BOM = b"\xef\xbb\xbf"
_Role = Literal["system", "user", "assistant", "tool"]


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: _Role
    content: str
    trained: bool | None = None


class _Example(msgspec.Struct, forbid_unknown_fields=True):
    """One conversation to imitate; unless it says otherwise, every assistant turn is trained."""

    example_id: str
    source: Literal["internal_rjs", "user_rjs", "safety", "capability", "failure_fix", "base_post_training"]
    messages: list[_Message]
    character_id: str | None = None
    locale: str | None = None


class _Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str


class _Preference(msgspec.Struct, forbid_unknown_fields=True):
    """One pair to patch with."""

    preference_id: str
    turns: list[_Turn]
    chosen: str
    rejected: str
    character_id: str = "none"
    locale: str = "und"


def read_examples(sources: Sequence[SourceRecord]) -> tuple[pa.Table, pa.Table]:
    """Rows of schema `example`, and the quarantine."""

    def row(found: _Example) -> dict[str, Any] | str:
        if not any(message.role == "assistant" and message.content.strip() for message in found.messages):
            return "nothing_to_train"
        messages = [
            {
                "role": m.role,
                "content": m.content,
                "trained": m.role == "assistant" if m.trained is None else m.trained,
            }
            for m in found.messages
        ]
        if any(m["trained"] and m["role"] != "assistant" for m in messages):
            return "trains_a_turn_that_is_not_the_assistants"
        return {**msgspec.structs.asdict(found), "user": None, "messages": messages}

    return _read(sources, _Example, row, schemas.EXAMPLE)


def read_preferences(sources: Sequence[SourceRecord]) -> tuple[pa.Table, pa.Table]:
    """Rows of schema `preference` with traffic internal, and the quarantine."""

    def row(found: _Preference) -> dict[str, Any] | str:
        if not found.turns or found.turns[-1].role != "user":
            return "context_does_not_end_in_a_user_turn"
        name = found.preference_id
        fixed = {"user": "", "traffic": "internal", "language": None, "jtbd": None, "mode": "static", "split": "train"}
        made = {"agreement": "single", "n_reviews": 1, "conflict": False, "batch": "000000"}
        policies = {"policy_chosen": "file", "policy_rejected": "file"}
        turns = [msgspec.structs.asdict(turn) for turn in found.turns]
        same = {key: getattr(found, key) for key in ("character_id", "locale", "chosen", "rejected")}
        return {
            **fixed,
            **made,
            **policies,
            **same,
            **dict.fromkeys(("preference_id", "pair_id", "prompt_id"), name),
            "turns": turns,
        }

    return _read(sources, _Preference, row, schemas.PREFERENCE)


def _read(
    sources: Sequence[SourceRecord], kind: type, row: Callable[[Any], dict[str, Any] | str], schema: pa.Schema
) -> tuple[pa.Table, pa.Table]:
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    kept: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    seen: set[str] = set()
    name = schema.names[0]
    for source in sources:
        with open_external(source.uri) as stream:
            lines = stream.read().removeprefix(_BOM).splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            made = _decoded(decoder, line, row)
            where = f"{source.name}:{number}"
            if isinstance(made, dict) and made[name] in seen:
                made = f"{name}_repeats"
            if isinstance(made, str):
                refused.append({"row_id": where, "reason": made, "where": where, "user": None, "raw": None})
            else:
                seen.add(made[name])
                kept.append(made)
    return pa.Table.from_pylist(kept, schema), pa.Table.from_pylist(refused, schemas.QUARANTINE)


def _decoded(
    decoder: msgspec.json.Decoder[Any], line: bytes, row: Callable[[Any], dict[str, Any] | str]
) -> dict[str, Any] | str:
    try:
        return row(decoder.decode(line))
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return "not_json" if type(error) is msgspec.DecodeError else f"breaks_the_contract: {error}"[:200]
