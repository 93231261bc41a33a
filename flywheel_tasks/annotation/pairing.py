"""Which two responses a prompt gets, and which pairs may go to annotators (Sec. 2.2.2).

The paper filters pairs "based on a set of constraints, such as response length difference and emoji count difference",
so that preferences can't be learned from the surface. Everything here is a pure function of prompts, texts and a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.curation.privacy import identifiers
from flywheel_tasks.style.features import emoji_count, list_items, markdown_count, word_count

COPIED = ("prompt_id", "user", "character_id", "source", "locale", "language", "jtbd", "depth", "split", "turns")
DELTAS = {"delta_length": word_count, "delta_emoji": emoji_count, "delta_list": list_items,
          "delta_markdown": markdown_count}  # fmt: skip


class Bounds(StageConfig):
    """The widest difference between the two responses of a pair."""

    words: int = Field(12, ge=0, description="words by which the lengths may always differ")
    words_share: float = Field(
        0.35, ge=0, le=1, description="share of the longer response by which they may differ, where that is more"
    )
    emoji: int = Field(1, ge=0, description="emoji")
    list_items: int = Field(2, ge=0, description="list items")
    markdown: int = Field(2, ge=0, description="pieces of markdown: headings, bold runs, links, code, quotations")


class Plan(NamedTuple):
    """One row of `prompts` is one pair to make; the arrays run along it."""

    prompts: pa.Table
    mode: NDArray[np.object_]
    kind: NDArray[np.object_]
    """The kind of rewrite, or None where both responses are sampled."""
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    """Places in the pool; a rewrite starts from the first."""
    swap: NDArray[np.bool_]
    """Whether the first response becomes y1: a position must tell nothing about how a response was made."""


class Made(NamedTuple):
    """The response made for one place of the plan, or why there is none."""

    text: str
    policy: str
    reason: str | None = None
    call: str | None = None


def draws(seed: int, purpose: str, keys: Sequence[str]) -> NDArray[np.float64]:
    """A number in [0, 1) for each key, whatever its neighbours."""
    head = f"{seed}\0{purpose}\0".encode()
    raw = [hashlib.blake2b(head + key.encode(), digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(raw), ">u8").astype(np.float64) / 2.0**64


def plan(
    prompts: pa.Table,
    sessions: Mapping[str, pa.Table],
    *,
    count: int,
    pool: int,
    kinds: Sequence[str],
    rewrite_share: float,
    modes: Mapping[str, float],
    seed: int,
) -> Plan:
    """`count` prompts, sessions that go on first; the rest is drawn by its id, so a prompt's luck is its own."""
    going_on = pa.concat_tables([schemas.PROMPT.empty_table(), *sessions.values()])
    their_mode = [mode for mode, table in sessions.items() for _ in range(len(table))]
    order = np.argsort(draws(seed, "sample", prompts["prompt_id"].to_pylist()), kind="stable")
    fresh = prompts.take(pa.array(np.sort(order[: max(count - len(going_on), 0)])))
    table = pa.concat_tables([going_on, fresh]).combine_chunks()
    ids = table["prompt_id"].to_pylist()
    names, shares = list(modes), np.cumsum(list(modes.values()))
    drawn = np.searchsorted(shares / shares[-1], draws(seed, "mode", ids[len(their_mode) :]), side="right")
    rewritten = draws(seed, "made", ids) < (rewrite_share if kinds else 0.0)
    kind = (draws(seed, "kind", ids) * max(len(kinds), 1)).astype(np.int64)
    first = (draws(seed, "first", ids) * pool).astype(np.int64)
    another = (draws(seed, "second", ids) * max(pool - 1, 1)).astype(np.int64)
    return Plan(
        prompts=table,
        mode=np.array([*their_mode, *(names[min(i, len(names) - 1)] for i in drawn)], object),
        kind=np.array([kinds[k] if yes else None for k, yes in zip(kind, rewritten, strict=True)], object),
        first=first,
        second=(first + 1 + another) % pool if pool > 1 else first,
        swap=draws(seed, "swap", ids) < 0.5,
    )


def assemble(
    planned: Plan, first: Sequence[Made], second: Sequence[Made], bounds: Bounds | None
) -> tuple[pa.Table, pa.Array]:
    """Every planned pair as a `pair` row, and for each the reason why it is dropped (null: it is kept). Without bounds
    any difference of style is allowed."""
    sides = [list(first), list(second)]
    rows = planned.prompts.select(COPIED).to_pylist()
    for row, swap, mode, kind, *two in zip(rows, planned.swap, planned.mode, planned.kind, *sides, strict=True):
        y = two[::-1] if swap else two
        for number, made in enumerate(y):
            row |= {f"y{number}": made.text, f"policy{number}": made.policy, f"tool_call{number}": made.call}
        row["made"] = "rewrite" if kind else "policy_pool"
        row["mode"] = "image" if any(made.call for made in y) else mode
        row["pair_id"] = pair_id(row)
    texts = {y: pa.array([row[y] for row in rows], pa.string()) for y in ("y0", "y1")}
    deltas = {name: (of(texts["y0"]) - of(texts["y1"])).astype(np.int32) for name, of in DELTAS.items()}
    longer = np.maximum(word_count(texts["y0"]), word_count(texts["y1"]))
    columns = {name: [row[name] for row in rows] for name in schemas.get("pair").names if name not in DELTAS} | deltas
    table = pa.table([columns[field.name] for field in schemas.get("pair")], schema=schemas.get("pair"))
    wide = too_different(deltas, longer, bounds) if bounds else [None] * len(rows)
    reasons = [a.reason or b.reason or _unfit(row) or over for a, b, row, over in zip(*sides, rows, wide, strict=True)]
    return table, pa.array(reasons, pa.string())


def too_different(deltas: Mapping[str, NDArray[Any]], longer: NDArray[np.int64], bounds: Bounds) -> list[str | None]:
    """The first bound that each pair breaks."""
    limits = {
        "delta_length": np.maximum(bounds.words, bounds.words_share * longer),
        "delta_emoji": np.full(len(longer), bounds.emoji),
        "delta_list": np.full(len(longer), bounds.list_items),
        "delta_markdown": np.full(len(longer), bounds.markdown),
    }
    broken = {name: np.abs(deltas[name]) > limit for name, limit in limits.items()}
    return [next((name for name in broken if broken[name][row]), None) for row in range(len(longer))]


def pair_id(row: Mapping[str, Any]) -> str:
    """The digest of prompt and responses: the same pair has the same id in every cycle."""
    parts = [row["prompt_id"], row["mode"], *(str(row[f"{name}{n}"]) for n in (0, 1) for name in ("y", "tool_call"))]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _unfit(row: Mapping[str, Any]) -> str | None:
    if not all(row[y].strip() or row[f"tool_call{y[1]}"] for y in ("y0", "y1")):
        return "empty"
    same = row["y0"].casefold().split() == row["y1"].casefold().split()
    if same and row["tool_call0"] == row["tool_call1"]:
        return "identical"
    # A policy can repeat what it was trained on: responses never went through the filter of Phase I.
    said = (row[name] for name in ("y0", "y1", "tool_call0", "tool_call1"))
    return "identifier" if any(identifiers(text) for text in said if text) else None
