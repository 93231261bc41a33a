"""Completions of a table of prompts: k responses each, in chunks that survive the attempt (Sec. 2.4.1, Algorithm 1).

A chunk is a run of prompts. It is committed as soon as its last response is there, then handed to the caller, while
the engine goes on with the next ones: what the caller does with it (scoring) overlaps generation. The next attempt
finds the committed chunks and generates the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.models.chat import Card, Template, card_of, load_tokenizer, refusal
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.engine_config import Sampling, SamplingConfig
from flywheel_tasks.models.engine_wire import Completion, Request
from flywheel_tasks.models.resolve import local_folder

CHUNK_PROMPTS = 64
_CARRIED = ("prompt_id", "user", "character_id", "locale", "language", "jtbd", "split", "turns")
"""What a completion repeats of its prompt."""

Encode = Callable[[Mapping[str, Any]], Sequence[int]]
"""From a row to the token ids that the response continues; an InputError becomes an error row."""


class Partial(Protocol):
    """`out.partial` of a stage, as far as it is used here."""

    def table(self, name: str, schema: pa.Schema) -> pa.Table | None: ...

    def put_table(self, name: str, table: pa.Table) -> None: ...


@dataclass(frozen=True)
class Chunk:
    """Completions of a run of prompts, exactly k rows for each: rows that failed have finish `error` and a reason."""

    name: str
    table: pa.Table
    resumed: bool
    """An earlier attempt made it."""


def template_of(engine: Engine) -> Template:
    """The chat template of the model that the engine serves."""
    return Template(load_tokenizer(local_folder(engine.model)))


def cards(characters: pa.Table) -> dict[str, Card]:
    """Character id → card, from a table of schema `character`."""
    return {row["character_id"]: Card.of(row) for row in characters.to_pylist()}


def encoder(template: Template, characters: Mapping[str, Card], room: int) -> Encode:
    """Card and history of a row as tokens, at most `room`: old turns are cut first, the card never."""

    def encode(row: Mapping[str, Any]) -> Sequence[int]:
        card = card_of(characters, row["character_id"])
        return template.chat(row["turns"], card=card, max_tokens=room).ids.tolist()

    return encode


def prompt_room(engine: Engine, sampling: SamplingConfig) -> int:
    """How many tokens a prompt may have, so that a whole response fits behind it."""
    room = engine.context - sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"sampling.max_tokens {sampling.max_tokens} leaves no room for a prompt in a context of {engine.context}: "
            "lower it"
        )
    return room


def complete(
    engine: Engine,
    template: Template,
    prompts: pa.Table,
    encode: Encode,
    sampling: Sampling,
    policy: str,
    *,
    partial: Partial | None = None,
    name: str = "completions",
    chunk: int = CHUNK_PROMPTS,
    deadline: float | None = None,
) -> Iterator[Chunk]:
    """Every prompt's k responses by `policy`, a chunk at a time, in the order in which chunks get ready.

    `prompts` has the columns of schema `prompt` that a completion repeats, and prompt ids that do not repeat. The
    pieces of one stage's attempt need a `name` for each call. The responses differ between policies of one seed."""
    _check_ids(prompts)
    runs = {f"{name}-{start // chunk:05d}": prompts.slice(start, chunk) for start in range(0, len(prompts), chunk)}
    for key in list(runs):
        done = partial.table(key, schemas.COMPLETION) if partial else None
        if done is not None and _covers(done, runs[key], sampling.k):
            del runs[key]
            yield Chunk(key, done, resumed=True)
    if not runs:
        return
    sampling = sampling.seeded(policy_seed(sampling, policy))
    chunk_of: dict[str, str] = {}
    refused: dict[str, str] = {}

    def requests() -> Iterator[Request]:
        for key, run in list(runs.items()):
            for row in run.to_pylist():
                chunk_of[row["prompt_id"]] = key
                yield Request(row["prompt_id"], encoded(encode, row, refused))

    drawn: dict[str, dict[str, list[Completion]]] = {key: {} for key in runs}
    for completions in engine.stream(requests(), sampling, deadline):
        key = chunk_of.pop(completions[0].id)
        drawn[key][completions[0].id] = completions
        if len(drawn[key]) == len(runs[key]):
            table = tabulate(runs.pop(key), drawn.pop(key), refused, template, sampling, policy)
            if partial:
                partial.put_table(key, table)
            yield Chunk(key, table, resumed=False)


def _check_ids(prompts: pa.Table) -> None:
    ids = prompts.column("prompt_id")
    if len(ids.unique()) != len(ids):
        raise InputError(f"{len(ids) - len(ids.unique())} prompts repeat a prompt_id: each must come once")


def _covers(table: pa.Table, run: pa.Table, k: int) -> bool:
    wanted = np.repeat(run.column("prompt_id").to_numpy(zero_copy_only=False), k)
    found = table.column("prompt_id").to_numpy(zero_copy_only=False)
    return len(found) == len(wanted) and bool((found == wanted).all())


def encoded(encode: Encode, row: Mapping[str, Any], refused: dict[str, str]) -> list[int]:
    try:
        return list(encode(row))
    except InputError as error:
        # The engine hands a prompt without tokens back as an error; the reason is this one.
        refused[row["prompt_id"]] = f"{refusal(error)}: {error}"
        return []


def tabulate(
    run: pa.Table,
    drawn: Mapping[str, list[Completion]],
    refused: dict[str, str],
    template: Template,
    sampling: Sampling,
    policy: str,
) -> pa.Table:
    """What the engine drew for a run of prompts, as rows of schema `completion`: k in a row for each prompt. `refused`
    says of prompts without tokens why they have none."""
    prompt_ids = run.column("prompt_id").to_pylist()
    rows = [completion for prompt_id in prompt_ids for completion in drawn[prompt_id]]
    failed = [completion.finish == "error" for completion in rows]
    texts = template.tokenizer.batch_decode([c.tokens for c in rows], skip_special_tokens=True)
    draw = f"{policy}\0{sampling.seed}\0{sampling.temperature}\0{sampling.top_p}\0{sampling.max_tokens}"
    reasons = {c.id: refused.pop(c.id, c.reason) for c in rows if c.sample == 0}
    columns = {
        **dict(
            zip(_CARRIED, run.select(_CARRIED).take(np.repeat(np.arange(len(run)), sampling.k)).columns, strict=True)
        ),
        "completion_id": [f"{_number(draw, c.id, str(c.sample)):032x}" for c in rows],
        "text": [text.strip() for text in texts],
        "sample": [c.sample for c in rows],
        "tokens": [len(c.tokens) for c in rows],
        "logprob": [None if bad else float(np.sum(c.logprobs)) for c, bad in zip(rows, failed, strict=True)],
        "finish": [c.finish for c in rows],
        "policy": [policy] * len(rows),
        "scores": [[]] * len(rows),
        "accepted": [False if bad else None for bad in failed],
        "reason": [reasons[c.id] for c in rows],
    }
    return pa.table([columns[field.name] for field in schemas.COMPLETION], schema=schemas.COMPLETION)


def policy_seed(sampling: Sampling, policy: str) -> int:
    """What `policy` draws with: two policies with the same noise would agree more than they do."""
    return _number(policy, str(sampling.seed)) % 2**62


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest(), "big")
