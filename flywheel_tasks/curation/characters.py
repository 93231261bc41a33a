"""Character cards (Sec. 2.2.2): who a character is, as its creator wrote it; every prompt to a policy starts with one.

Unlike traffic, cards are written with care and there are few of them, so a bad one stops the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.storage import open_external


class _Card(msgspec.Struct, forbid_unknown_fields=True):
    character_id: str
    name: str
    description: str
    traits: list[str] = []
    instructions: str = ""
    greeting: str = ""
    review_status: str = "unreviewed"


def read_characters(sources: Sequence[SourceRecord]) -> pa.Table:
    """All cards of the files, by id. Every character has exactly one."""
    cards: dict[str, dict[str, Any]] = {}
    for source in sources:
        for where, card in _cards(source):
            name = ids.name(card["character_id"], f"{where}: character_id")
            if name in cards:
                raise InputError(f"{where}: character '{name}' has a card already: keep one of them")
            cards[name] = card
    return pa.Table.from_pylist([cards[name] for name in sorted(cards)], schema=schemas.CHARACTER)


def _cards(source: SourceRecord) -> list[tuple[str, dict[str, Any]]]:
    if source.name.endswith(".parquet"):
        try:
            with open_external(source.uri) as stream:
                table = schemas.conform(pq.read_table(stream), schemas.CHARACTER, source.name)
        except pa.ArrowInvalid as error:
            raise InputError(f"{source.name}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
        return [(f"{source.name}:{number}", row) for number, row in enumerate(table.to_pylist(), start=1)]
    if not source.name.endswith(".jsonl"):
        raise InputError(f"{source.name}: character cards are .jsonl or .parquet files")
    decoder = msgspec.json.Decoder(_Card)
    found = []
    with open_external(source.uri) as stream:
        for number, line in enumerate(stream.read().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{source.name}:{number}"
            try:
                found.append((where, msgspec.structs.asdict(decoder.decode(line))))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise InputError(f"{where}: not a character card: {error}") from error
    return found
