"""The contracts between stages: one Arrow schema per table, named and versioned (design, section 4)."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from flywheel_tasks.core.errors import InputError

VERSION = 1

STRING = pa.string()
TIMESTAMP = pa.timestamp("us", tz="UTC")
REACTIONS = ("love", "thumb_up", "thumb_down")
SOURCES = ("internal", "production")
ROLES = ("user", "assistant")
MODES = ("static", "interactive", "steerability", "image")
"""How a pair is shown to annotators (Sec. 2.2.2)."""
EXAMPLE_SOURCES = ("internal_rjs", "user_rjs", "safety", "capability", "failure_fix", "base_post_training")
"""The six parts of the SFT mixture (Sec. 2.4.2)."""


def _fields(spec: str, types: dict[str, pa.DataType] | None = None) -> list[pa.Field]:
    """`name` is a required string, `name?` a nullable one; other types come from `types`."""
    types = types or {}
    fields = []
    for word in spec.split():
        name = word.rstrip("?")
        fields.append(pa.field(name, types.get(name, STRING), nullable=word.endswith("?")))
    return fields


SIGNALS = pa.struct(
    _fields(
        "continued? love thumb_up thumb_down feedback? regenerated",
        dict.fromkeys(("continued", "love", "thumb_up", "thumb_down", "regenerated"), pa.bool_()),
    )
)
"""Table 2's user signals on one assistant turn; `continued` is null where the log ends too early to know."""

LOGGED_TURN = pa.struct(_fields("role content at image? language? signals?", {"at": TIMESTAMP, "signals": SIGNALS}))
TURN = pa.struct(_fields("role content"))

EVENT = pa.schema(
    _fields(
        "event_id type conversation_id message_id user_id character_id role? content? reaction? at "
        "model_version? locale? source? image?",
        {"at": TIMESTAMP},
    )
)
CHARACTER = pa.schema(
    _fields(
        "character_id name description traits instructions greeting review_status",
        {"traits": pa.list_(STRING)},
    )
)
CONVERSATION = pa.schema(
    _fields(
        "conversation_id user character_id source locale language? model_version? split turns",
        {"turns": pa.list_(LOGGED_TURN)},
    )
)
PROMPT = pa.schema(
    _fields(
        "prompt_id conversation_id user character_id source turns turn_index first_turn locale language? code_mixed? "
        "jtbd? depth quality? difficulty? model_version? near_policy split",
        {
            "turns": pa.list_(TURN),
            "turn_index": pa.int32(),
            "first_turn": pa.bool_(),
            "code_mixed": pa.bool_(),
            "quality": pa.float64(),
            "difficulty": pa.float64(),
            "near_policy": pa.bool_(),
        },
    )
)
PAIR = pa.schema(
    _fields(
        "pair_id prompt_id user character_id source locale language? jtbd? depth? split turns y0 y1 policy0 policy1 "
        "made mode tool_call0? tool_call1? delta_length delta_emoji delta_list delta_markdown",
        {
            "turns": pa.list_(TURN),
            **dict.fromkeys(("delta_length", "delta_emoji", "delta_list", "delta_markdown"), pa.int32()),
        },
    )
)
"""Two responses to a prompt; deltas are y0 minus y1."""
TASK = pa.schema([*PAIR, *_fields("task_id cycle left digest reviewers", {"reviewers": pa.int32()})])
"""A pair as it was shown to annotators: which response stood left, and the digest of all they saw."""
ANSWER = pa.struct(_fields("name about answer"))
ANNOTATION = pa.schema(
    _fields(
        "annotation_id pair_id user batch mode annotator preferred strength? questions rewrite? seconds? at",
        {"strength": pa.int32(), "questions": pa.list_(ANSWER), "seconds": pa.float64(), "at": TIMESTAMP},
    )
)
PREFERENCE = pa.schema(
    _fields(
        "preference_id pair_id prompt_id user character_id traffic locale language? jtbd? mode split turns chosen "
        "rejected agreement n_reviews conflict batch policy_chosen policy_rejected",
        {"turns": pa.list_(TURN), "n_reviews": pa.int32(), "conflict": pa.bool_()},
    )
)
SCORE = pa.struct(_fields("name value", {"value": pa.float64()}))
COMPLETION = pa.schema(
    _fields(
        "completion_id prompt_id user character_id locale language? jtbd? split turns text sample tokens logprob? "
        "finish policy scores accepted? reason?",
        {
            "turns": pa.list_(TURN),
            "sample": pa.int32(),
            "tokens": pa.int32(),
            "logprob": pa.float64(),
            "scores": pa.list_(SCORE),
            "accepted": pa.bool_(),
        },
    )
)
EXAMPLE = pa.schema(
    _fields(
        "example_id user? source character_id? locale? messages",
        {"messages": pa.list_(pa.struct(_fields("role content trained", {"trained": pa.bool_()})))},
    )
)
EXPOSURE = pa.schema(_fields("experiment unit_id arm exposed_at", {"exposed_at": TIMESTAMP}))
"""What a readout needs of any exposure log."""
EXPOSURE_LOG = EXPOSURE.append(pa.field("locale", STRING))
"""The store's own log, which also says where a unit was at its first exposure."""
ACTIVITY = pa.schema(_fields("unit_id day sends", {"day": pa.date32(), "sends": pa.int64()}))
QUARANTINE = pa.schema(_fields("row_id reason where user? raw?"))
"""Every rejected row of a stage: `where` is file:line or input:row, `raw` its text where keeping it is harmless."""

SCHEMAS: dict[str, pa.Schema] = {
    "event": EVENT,
    "character": CHARACTER,
    "conversation": CONVERSATION,
    "prompt": PROMPT,
    "pair": PAIR,
    "task": TASK,
    "annotation": ANNOTATION,
    "preference": PREFERENCE,
    "completion": COMPLETION,
    "example": EXAMPLE,
    "exposure": EXPOSURE_LOG,
    "activity": ACTIVITY,
    "quarantine": QUARANTINE,
}

CHECKPOINTS = ("checkpoint", "checkpoints")
"""Contracts of outputs that hold one model, or one in each step's folder."""

DERIVED = "derived"
"""Contract of loose files made from the artifact's own tables that hold people's rows without their names. A purge that
takes a row from those tables drops the files whole; tracking never sees them."""

USER_COLUMNS: dict[str, str] = {
    "conversation": "user",
    "prompt": "user",
    "pair": "user",
    "task": "user",
    "annotation": "user",
    "preference": "user",
    "completion": "user",
    "example": "user",
    "quarantine": "user",
    "activity": "unit_id",
    "exposure": "unit_id",
}
"""Which column of a schema names the (pseudonymous) person; `flywheel forget` purges by it."""


def get(name: str) -> pa.Schema:
    """The schema of that name."""
    if name not in SCHEMAS:
        raise InputError(f"unknown schema '{name}': legal names are {', '.join(SCHEMAS)}")
    return SCHEMAS[name]


def fingerprint(contract: str) -> str:
    """What a contract says, so that an artifact written under another one is another artifact."""
    return SCHEMAS[contract].to_string() if contract in SCHEMAS else contract


def conform(table: pa.Table | pa.RecordBatch, schema: pa.Schema, where: str) -> pa.Table:
    """`table` with exactly the columns and types of `schema`, or an error that names the column."""
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    _same_names(table.schema.names, schema.names, where)
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            raise InputError(f"{where}: column '{field.name}' has {column.null_count} nulls; it must have none")
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, ValueError) as error:
        raise InputError(f"{where}: columns do not have the types of the schema: {error}") from error


def _same_names(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    found, wanted = set(found), set(wanted)
    if found == wanted:
        return
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"unknown {', '.join(extra)}"] if extra else []
    raise InputError(f"{where}: columns do not match the schema: {'; '.join(parts)}")
