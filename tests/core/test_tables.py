"""Parquet parts: what is read back is what was written, however much text a table holds."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.manifest import OutputRecord
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.core.tables import PartSpec, TableReader, write_part

TEXT, ROWS, BATCH = 1 << 17, 20 << 10, 1 << 10


@pytest.mark.slow
def test_a_table_of_more_text_than_one_column_holds_is_read_whole(tmp_path: Path) -> None:
    """20,480 prompts of 128 KiB are 2.5 GiB; a piece of 65,536 rows, nested as turns are, could not be converted."""
    turns = [{"role": "user", "content": "x" * TEXT}]
    row = dict.fromkeys(schemas.PROMPT.names) | {"turns": turns}
    for field in schemas.PROMPT:
        if not field.nullable and field.name != "turns":
            row[field.name] = {pa.string(): "x", pa.bool_(): False}.get(field.type, 0)
    batch = pa.Table.from_pylist([row] * BATCH, schemas.PROMPT)
    spec = PartSpec(f"file://{tmp_path}", "a", "attempt", "prompts", "prompt")
    part = write_part(spec, 0, [batch] * (ROWS // BATCH))
    reader = TableReader(
        Storage(spec.store_uri), "a", OutputRecord(contract="prompt", version=schemas.VERSION, files=(part,))
    )
    found = reader.read(["turns"])
    assert found.num_rows == ROWS
    assert all(len(said[0]["content"].as_py()) == TEXT for said in found["turns"].slice(ROWS - 3))
