"""The project's own demo personas (Sec. 2.2.2: name, traits and instructions make a character)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import pyarrow as pa
import yaml

from flywheel_tasks.core import schemas


@dataclass(frozen=True)
class Character:
    character_id: str
    name: str
    description: str
    traits: tuple[str, ...]
    instructions: str
    greeting: str
    review_status: str
    topics: tuple[str, ...]
    intents: tuple[str, ...]
    vocabulary: frozenset[str] = field(compare=False)
    """Words that show the character is being itself: its topics (singular or plural) and its name."""


@cache
def demo_characters() -> tuple[Character, ...]:
    text = files("flywheel_tasks.simulation").joinpath("characters.yaml").read_text(encoding="utf-8")
    return tuple(_character(row) for row in yaml.safe_load(text))


def character_table(characters: tuple[Character, ...]) -> pa.Table:
    """The personas as rows of the `character` schema."""
    names = schemas.CHARACTER.names
    return pa.Table.from_pylist([{n: getattr(c, n) for n in names} for c in characters], schema=schemas.CHARACTER)


def _character(row: dict[str, str | list[str]]) -> Character:
    listed = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    topics = [w.casefold() for w in row["topics"]]
    name = str(row["name"]).casefold().split()
    vocabulary = frozenset([*topics, *(t + "s" for t in topics), *name])
    return Character(**listed, vocabulary=vocabulary)  # type: ignore[arg-type]
