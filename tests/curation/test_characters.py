"""Cards come in whole or the stage stops and says which line is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.curation.characters import read_characters
from flywheel_tasks.simulation.characters import character_table, demo_characters

CARD = {"character_id": "maya", "name": "Maya", "description": "A gardener.", "traits": ["calm"]}


def source(path: Path) -> SourceRecord:
    return SourceRecord(name=path.name, uri=str(path), bytes=path.stat().st_size, sha256="0" * 64)


def written(folder: Path, *lines: str, name: str = "cards.jsonl") -> SourceRecord:
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return source(path)


def test_both_formats_give_the_same_cards(tmp_path: Path) -> None:
    table = character_table(demo_characters())
    pq.write_table(table, tmp_path / "cards.parquet")
    lines = [json.dumps(row) for row in table.to_pylist()]
    from_json = read_characters([written(tmp_path, *lines)])
    assert from_json.equals(read_characters([source(tmp_path / "cards.parquet")]))
    assert from_json.num_rows == len(demo_characters())


def test_a_byte_order_mark_and_blank_lines_are_no_cards(tmp_path: Path) -> None:
    cards = read_characters([written(tmp_path, "\ufeff" + json.dumps(CARD), "", "  ")])
    assert cards["character_id"].to_pylist() == ["maya"]
    assert cards["review_status"].to_pylist() == ["unreviewed"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a character card"),
        (json.dumps({"character_id": "x"}), "name"),
        (json.dumps(CARD | {"trait": "typo"}), "trait"),
        (json.dumps(CARD | {"character_id": "../up"}), "not a plain name"),
        (json.dumps(CARD), "has a card already"),
    ],
)
def test_a_bad_card_stops_the_stage_and_is_named(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_characters([written(tmp_path, json.dumps(CARD), line)])
    assert "cards.jsonl:2" in str(caught.value)


def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(CARD | {"name": "José"}, ensure_ascii=False).encode("latin-1"))
    (tmp_path / "cards.parquet").write_bytes(b"not Parquet at all")
    with pytest.raises(InputError, match=r"latin.jsonl:1: not a character card"):
        read_characters([source(tmp_path / "latin.jsonl")])
    with pytest.raises(InputError, match=r"cards.parquet: not a readable Parquet file"):
        read_characters([source(tmp_path / "cards.parquet")])


def test_two_files_may_not_both_have_a_character(tmp_path: Path) -> None:
    files = [written(tmp_path, json.dumps(CARD), name=f"{n}.jsonl") for n in "ab"]
    with pytest.raises(InputError, match=r"b\.jsonl:1: character 'maya'"):
        read_characters(files)
