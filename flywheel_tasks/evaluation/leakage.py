"""No evaluation prompt was seen in training (Sec. 2.5.1), shown by ids and by hashes of what was said.

A prompt leaked if its id, its conversation, or its text occurs in training data. Text means the turns up to the
prompt's last one, so a training row that goes on from there counts too. "hi" occurs everywhere and says nothing: below
a number of characters only ids count. An id that leaked means that the split is broken, and stops the stage. A text may
be that of two people who said the same to the same: where a team allows for a few, these are left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.storage import open_external

TEXT = "text"
_SHOWN = 20


class Seen(NamedTuple):
    """What training saw: prompt ids, conversation ids, and hashes of every conversation up to each user turn."""

    prompts: frozenset[str]
    conversations: frozenset[str]
    texts: frozenset[bytes]


class Overlap(NamedTuple):
    """Evaluation prompts checked, and those that leaked with the reason for each."""

    prompts: int
    leaked: dict[str, str]


def seen(
    tables: Iterable[pa.Table],
    conversation_of: Mapping[str, str],
    conversations: Iterable[Sequence[Mapping[str, Any]]] = (),
) -> Seen:
    """What training tables hold (of the columns prompt_id, conversation_id, turns and messages those that each has),
    and further conversations that have no ids."""
    prompts: set[str] = set()
    known: set[str] = set()
    texts = {text for turns in conversations for text in prefixes(turns)}
    for table in tables:
        names = set(table.schema.names)
        if "prompt_id" in names:
            prompts.update(table["prompt_id"].to_pylist())
        if "conversation_id" in names:
            known.update(table["conversation_id"].to_pylist())
        for column in names & {"turns", "messages"}:
            for turns in table[column].to_pylist():
                texts.update(prefixes(turns))
    known |= {conversation_of[prompt] for prompt in prompts if prompt in conversation_of}
    return Seen(frozenset(prompts), frozenset(known), frozenset(texts))


def delivered(source: SourceRecord) -> Iterator[list[dict[str, Any]]]:
    """The conversations in a JSONL file that a training stage read from outside the store.

    A line that is no conversation was quarantined there. A file that is not what that stage read proves nothing.
    """
    with open_external(source.uri) as stream:
        data = stream.read()
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise InputError(f"{source.uri} is not the file that was trained on any more: put it back, or train again")
    for line in data.removeprefix(b"\xef\xbb\xbf").splitlines():
        try:
            row = json.loads(line)
            turns = row.get("messages") or row.get("turns") or []
            yield [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue


def prefixes(turns: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """The hash of a conversation up to each of its user turns; a system message is not part of what was said."""
    digest = hashlib.sha256()
    for turn in turns:
        if turn["role"] not in ("user", "assistant"):
            continue
        content = " ".join(str(turn["content"] or "").split()).casefold()
        digest.update(f"{turn['role']}\0{content}\1".encode("utf-8", "surrogatepass"))
        if turn["role"] == "user":
            yield digest.digest()


def overlap(prompts: pa.Table, known: Seen, least_characters: int) -> Overlap:
    """Evaluation prompts that training saw."""
    leaked: dict[str, str] = {}
    for row in prompts.select(["prompt_id", "conversation_id", "turns"]).to_pylist():
        *_, text = (b"", *prefixes(row["turns"]))
        said = sum(len(turn["content"] or "") for turn in row["turns"])
        if row["prompt_id"] in known.prompts:
            leaked[row["prompt_id"]] = "prompt"
        elif row["conversation_id"] in known.conversations:
            leaked[row["prompt_id"]] = "conversation"
        elif said >= least_characters and text in known.texts:
            leaked[row["prompt_id"]] = TEXT
    return Overlap(prompts.num_rows, leaked)


def refuse(found: Overlap, most_texts: float) -> None:
    """Stop where an id leaked, or the texts of more than this share of the prompts, and name them."""
    texts = list(found.leaked.values()).count(TEXT)
    if texts < len(found.leaked) or texts > most_texts * found.prompts:
        names = sorted(found.leaked)
        shown = ", ".join(f"{name} ({found.leaked[name]})" for name in names[:_SHOWN])
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise InputError(
            f"respond: {len(names)} of {found.prompts} evaluation prompts occur in training data: {shown}{more}; take "
            "them out of training, draw other evaluation prompts, or, where people only said the same (text), let "
            "respond.most_leaked leave a share of them out: an evaluation on them proves nothing"
        )
