"""Prompts cut from conversations: every context that ends in a user turn (Sec. 2.2.1, Table 1, Sec. 3.5.2).

Cut after filtering, so that unfiltered text is never multiplied. All index arithmetic on flat turns; no row is a Python
object.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import StageConfig

DEPTHS: Final = ("first", "short", "medium", "long")


class PromptConfig(StageConfig):
    """How much context a prompt carries and where the depth buckets begin."""

    context_turns: int = Field(
        16, ge=1, le=512, description="most turns of a prompt, the user turn it ends in included"
    )
    short_from: int = Field(
        1, ge=1, description="depth 'short' begins after this many earlier user turns; 'first' is before it"
    )
    medium_from: int = Field(5, ge=1, description="depth 'medium' begins after this many earlier user turns")
    long_from: int = Field(20, ge=1, description="depth 'long' begins after this many earlier user turns")
    champion: str | None = Field(
        None,
        description="version whose traffic is near-policy (default: the one with most production conversations "
        "on the last day of the traffic)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "PromptConfig":
        if not self.short_from < self.medium_from < self.long_from:
            raise ValueError("depth bounds must rise: short_from < medium_from < long_from")
        return self


class TurnMarks(NamedTuple):
    """Per flat turn: its language and whether it mixes two."""

    language: npt.NDArray[np.object_]
    mixed: npt.NDArray[np.bool_]


def cut(conversations: pa.Table, marks: TurnMarks, champion: str | None, config: PromptConfig) -> pa.Table:
    """One `prompt` row for each user turn that says something, in the order of the conversations."""
    conversations = conversations.combine_chunks()
    turns = _one_array(conversations["turns"])
    offsets = turns.offsets.to_numpy().astype(np.int64) - (turns.offsets[0].as_py() if len(turns.offsets) else 0)
    owner = np.repeat(np.arange(len(turns)), np.diff(offsets))
    flat = turns.flatten()
    stays = np.flatnonzero(~_discarded(flat, owner))
    place = stays - offsets[owner[stays]]
    flat, owner, marks = flat.take(pa.array(stays)), owner[stays], TurnMarks(marks.language[stays], marks.mixed[stays])
    offsets = np.searchsorted(owner, np.arange(len(turns) + 1))
    role, content = flat.field("role"), flat.field("content")
    is_user = pc.equal(role, "user").to_numpy(zero_copy_only=False).astype(bool)
    says = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(content)), 0).to_numpy(zero_copy_only=False).astype(bool)
    end = np.flatnonzero(is_user & says)
    parent = owner[end]
    first = np.maximum(offsets[parent], end - config.context_turns + 1)
    length = end - first + 1
    bounds = np.concatenate(([0], np.cumsum(length)))
    index = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - first, length)
    context = pa.StructArray.from_arrays(
        [role.take(pa.array(index)), content.take(pa.array(index))], fields=list(schemas.TURN)
    )
    said_before = np.concatenate(([0], np.cumsum(is_user)))
    earlier = said_before[end] - said_before[offsets[parent]]
    rows = conversations.take(pa.array(parent))
    position = place[end].astype(np.int32)
    version = rows["model_version"]
    near = pc.and_(pc.equal(version, champion or ""), pc.equal(rows["source"], "production")) if champion else None
    language = np.where(
        marks.language[end] == "und", np.array(rows["language"].to_pylist(), object), marks.language[end]
    )
    nothing = pa.nulls(len(end), pa.string())
    numbers = pa.nulls(len(end), pa.float64())
    columns = {
        "prompt_id": pc.binary_join_element_wise(
            rows["conversation_id"], pc.cast(pa.array(position), pa.string()), "."
        ),
        "turns": pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), context),
        "turn_index": pa.array(position),
        "first_turn": pa.array(earlier == 0),
        "language": pa.array(language, pa.string()),
        "code_mixed": pa.array(marks.mixed[end]),
        "jtbd": nothing,
        "depth": _depth(earlier, config),
        "quality": numbers,
        "difficulty": numbers,
        "near_policy": pc.fill_null(near, False) if near is not None else pa.array(np.zeros(len(end), bool)),
    }
    copied = {
        name: rows[name]
        for name in ("conversation_id", "user", "character_id", "source", "locale", "model_version", "split")
    }
    return pa.table({name: (columns | copied)[name] for name in schemas.PROMPT.names})


def _discarded(flat: pa.StructArray, owner: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Responses that the user had generated again, where the new one follows: nobody's context holds the old one."""
    again = pc.fill_null(flat.field("signals").field("regenerated"), False).to_numpy(zero_copy_only=False).astype(bool)
    by_assistant = pc.equal(flat.field("role"), "assistant").to_numpy(zero_copy_only=False).astype(bool)
    replaced = np.append(by_assistant[1:] & (owner[1:] == owner[:-1]), False)[: len(owner)]
    return again & by_assistant & replaced


def _depth(earlier: npt.NDArray[np.int64], config: PromptConfig) -> pa.Array:
    bucket = np.searchsorted([config.short_from, config.medium_from, config.long_from], earlier, side="right")
    return pa.array(np.array(DEPTHS, object)[bucket], pa.string())


def _one_array(column: pa.ChunkedArray) -> pa.ListArray:
    return (
        column.chunk(0)
        if column.num_chunks == 1
        else pa.concat_arrays(column.chunks)
        if column.num_chunks
        else column.combine_chunks()
    )
