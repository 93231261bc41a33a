"""The linter (Table 7, Sec. 3.5.6): finds stylistic faults in SFT data and in the history of RL prompts, repairs what
can be repaired without writing words, and drops the rest, with a count for every rule.

A policy mimics the turns before it, so prompts are cleaned like answers. What a user wrote is never touched. `lint` is
the judge of `repair`: a text comes out only if it breaks none of the rules that its use repairs or drops for, so a
second repair finds nothing to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas
from flywheel_tasks.style import features, rules
from flywheel_tasks.style.features import Exchange
from flywheel_tasks.style.repairs import REPAIRS
from flywheel_tasks.style.rules import Use
from flywheel_tasks.style.words import BoolArray, IntArray

Language = Callable[[pa.StringArray], Sequence[str | None]]
"""Tells the language of texts; curation's detector, handed in by whoever may import it."""
_ROUNDS = 4
_BATCH = 8192


class Repaired(NamedTuple):
    """What became of a text: None where it must be dropped, the rules it broke, and those that a repair removed."""

    text: str | None
    broken: tuple[str, ...]
    repaired: tuple[str, ...]


class Cleaned(NamedTuple):
    """What is left of a table, its dropped rows as quarantine rows, and counts by (rule, found|repaired|dropped)."""

    table: pa.Table
    rejected: pa.Table
    counts: dict[tuple[str, str], int]


load = rules.load


def broken_rules(exchange: Exchange) -> dict[str, BoolArray]:
    """For every rule, which rows break it."""
    found = features.measure(exchange, load().rules)
    return {rule: rows == 1 for rule, rows in found.items()}


def lint(text: str, language: str | None = None, wanted: str | None = None, asked: str = "") -> tuple[str, ...]:
    """The rules that a text breaks; `asked` is the user turn it answers."""
    found = broken_rules(_exchange([text], [language], [wanted], [asked]))
    return tuple(rule for rule, rows in found.items() if rows[0])


def repair(
    text: str, use: Use = "sft", language: str | None = None, wanted: str | None = None, asked: str = ""
) -> Repaired:
    """One text repaired or dropped."""
    return repair_all([text], np.array([use]), [language], [wanted], [asked])[0]


def repair_all(
    texts: Sequence[str],
    uses: npt.NDArray[np.str_],
    languages: Sequence[str | None],
    wanted: Sequence[str | None],
    asked: Sequence[str],
    exempt: Mapping[str, BoolArray] | None = None,
) -> list[Repaired]:
    """Every text repaired or dropped; each round lints as one column what the last one changed."""
    text: list[str | None] = list(texts)
    broken: list[list[str]] = [[] for _ in texts]
    repaired: list[list[str]] = [[] for _ in texts]
    rows = np.arange(len(texts))
    for turn in range(_ROUNDS + 1):
        here = rows.tolist()
        left = [text[row] or "" for row in here]
        spoken, meant, said = ([column[row] for row in here] for column in (languages, wanted, asked))
        found = broken_rules(_exchange(left, spoken, meant, [turn or "" for turn in said]))
        action = {rule: _actions(rule, uses[rows]) for rule in found}
        for rule in found:
            found[rule] &= (action[rule] != "keep") & ~(exempt or {}).get(rule, np.zeros(len(texts), bool))[rows]
        faulty = np.flatnonzero(np.any(list(found.values()), axis=0)) if here else rows
        for at in faulty.tolist():
            row, now = here[at], [rule for rule, hits in found.items() if hits[at]]
            broken[row] += [rule for rule in now if rule not in broken[row]]
            dropped = turn == _ROUNDS or any(action[rule][at] == "drop" for rule in now)
            text[row] = None if dropped else _fix(text[row] or "", now)
            if text[row] is None:
                repaired[row] = []
            else:
                repaired[row] += [rule for rule in now if rule not in repaired[row]]
        rows = np.array([here[at] for at in faulty.tolist() if text[here[at]] is not None], np.int64)
        if not len(rows):
            break
    return [Repaired(*each) for each in zip(text, map(tuple, broken), map(tuple, repaired), strict=True)]


def _actions(rule: str, uses: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    spec = load().rules[rule]
    return np.where(uses == "sft", spec.sft, spec.prompt)


def _fix(text: str, broken: Sequence[str]) -> str | None:
    """The text after the repairs of the rules it breaks; None where nothing is left of it."""
    for rule, fix in REPAIRS.items():
        if rule in broken:
            text = fix(text)
    return text if text.strip() else None


def clean_examples(table: pa.Table, language: Language | None = None) -> Cleaned:
    """SFT rows (schema `example`): trained assistant turns repaired; a row with one that must go is dropped whole.

    Turns that are not trained are context, and are cleaned as the history of a prompt.
    """

    def clean(batch: pa.RecordBatch) -> Cleaned:
        messages, source = batch["messages"], batch["source"].to_numpy(zero_copy_only=False)
        trained = pc.struct_field(messages.flatten(), "trained").to_numpy(zero_copy_only=False).astype(bool)
        exempt = {rule: np.isin(source, spec.exempt) for rule, spec in load().rules.items()}
        done = _clean_turns(messages, np.where(trained, "sft", "prompt"), exempt, language)
        return _result(batch, "messages", "example_id", done)

    return _by_batch(table, clean)


def clean_prompts(table: pa.Table, language: Language | None = None, id_column: str = "prompt_id") -> Cleaned:
    """Rows with `turns` (Sec. 3.5.6): assistant turns of the history repaired, a row with one that must go dropped."""

    def clean(batch: pa.RecordBatch) -> Cleaned:
        turns = batch["turns"]
        done = _clean_turns(turns, np.full(len(turns.flatten()), "prompt"), {}, language)
        return _result(batch, "turns", id_column, done)

    return _by_batch(table, clean)


def _by_batch(table: pa.Table, clean: Callable[[pa.RecordBatch], Cleaned]) -> Cleaned:
    """A batch at a time: every turn is judged by itself, and Arrow can't join more than 2 GiB of text."""
    batches = table.to_batches(max_chunksize=_BATCH) or [pa.RecordBatch.from_pylist([], table.schema)]
    done = [clean(batch) for batch in batches]
    counts = sum((Counter(one.counts) for one in done), Counter[tuple[str, str]]())
    return Cleaned(
        pa.concat_tables([one.table for one in done]),
        pa.concat_tables([one.rejected for one in done]).combine_chunks(),
        dict(sorted(counts.items())),
    )


class _Done(NamedTuple):
    turns: pa.ListArray
    reason: list[str | None]
    counts: Counter[tuple[str, str]]


def _clean_turns(
    turns: pa.ListArray, uses: npt.NDArray[np.str_], exempt: dict[str, BoolArray], language: Language | None
) -> _Done:
    """Every assistant turn linted and repaired, as one column."""
    flat = turns.flatten()
    content, rows = pc.fill_null(flat.field("content"), ""), _rows(turns)
    own = np.flatnonzero(pc.equal(flat.field("role"), "assistant").to_numpy(zero_copy_only=False).astype(bool))
    asked = _asked(flat, rows, own)
    said = content.take(pa.array(own))
    spoken, wanted = _languages(said, asked, language)
    exempt = {rule: at[rows[own]] for rule, at in exempt.items()}
    done = repair_all(said.to_pylist(), uses[own], spoken, wanted, asked, exempt)
    counts: Counter[tuple[str, str]] = Counter()
    reason: list[str | None] = [None] * len(turns)
    changed = content.to_pylist()
    for at, row, use, outcome in zip(own.tolist(), rows[own].tolist(), uses[own].tolist(), done, strict=True):
        counts.update((rule, "found") for rule in outcome.broken)
        if outcome.text is None:
            rule = _reason(outcome, use)
            counts[rule, "dropped"] += 1
            reason[row] = reason[row] or rule
        else:
            changed[at] = outcome.text
            counts.update((rule, "repaired") for rule in outcome.repaired)
    names = [field.name for field in flat.type]
    columns = [pa.array(changed, pa.string()) if name == "content" else flat.field(name) for name in names]
    struct = pa.StructArray.from_arrays(columns, fields=list(flat.type))
    offsets = pc.subtract(turns.offsets, turns.offsets[0])
    return _Done(pa.ListArray.from_arrays(offsets, struct), reason, counts)


def _result(batch: pa.RecordBatch, column: str, id_column: str, done: _Done) -> Cleaned:
    table = pa.Table.from_batches([batch])
    index = table.schema.get_field_index(column)
    table = table.set_column(index, table.schema.field(column), done.turns.cast(table.schema.field(column).type))
    drop = pa.array([reason is not None for reason in done.reason], pa.bool_())
    dropped = table.filter(drop)
    reasons = [f"style_{reason}" for reason in done.reason if reason]
    rejected = pa.table(
        {
            "row_id": dropped[id_column].cast(pa.string()),
            "reason": pa.array(reasons, pa.string()),
            "where": pa.array([column] * len(reasons), pa.string()),
            "user": dropped["user"] if "user" in table.schema.names else pa.nulls(len(reasons), pa.string()),
            "raw": pa.nulls(len(reasons), pa.string()),
        },
        schema=schemas.QUARANTINE,
    )
    return Cleaned(table.filter(pc.invert(drop)), rejected, done.counts)


def _reason(done: Repaired, use: str) -> str:
    """The rule a text was dropped for: one that asks for it, else the first that no repair could remove."""
    dropping = [rule for rule in done.broken if getattr(load().rules[rule], use) == "drop"]
    return (dropping or [*done.broken])[0]


def _languages(
    said: pa.StringArray, asked: list[str], language: Language | None
) -> tuple[Sequence[str | None], Sequence[str | None]]:
    if language is None:
        unknown: list[str | None] = [None] * len(asked)
        return unknown, unknown
    return list(language(said)), list(language(pa.array(asked, pa.string())))


def _asked(flat: pa.StructArray, rows: IntArray, own: IntArray) -> list[str]:
    """For every assistant turn, the user turn before it in the same row."""
    user = pc.equal(flat.field("role"), "user").to_numpy(zero_copy_only=False).astype(bool)
    last = np.maximum.accumulate(np.where(user, np.arange(len(flat)), -1)) if len(flat) else np.empty(0, np.int64)
    at = last[own]
    at = np.where((at >= 0) & (rows[np.maximum(at, 0)] == rows[own]), at, -1) if len(own) else at
    return pc.fill_null(flat.field("content").take(pa.array(at, pa.int64(), mask=at < 0)), "").to_pylist()


_TURNS = pa.list_(schemas.TURN)


def _as_history(asked: Sequence[str]) -> pa.ListArray:
    return pa.array([[{"role": "user", "content": text}] for text in asked], _TURNS)


def _exchange(
    texts: Sequence[str], languages: Sequence[str | None], wanted: Sequence[str | None], asked: Sequence[str]
) -> Exchange:
    return Exchange(
        pa.array(texts, pa.string()),
        _as_history(asked),
        pa.array(languages, pa.string()),
        pa.array(wanted, pa.string()),
    )


def _rows(lists: pa.ListArray) -> IntArray:
    rows: IntArray = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    return rows
