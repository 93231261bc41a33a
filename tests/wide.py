"""Tables with more text than one Arrow string array can hold, in little memory: all rows share one long turn."""

from __future__ import annotations

import pyarrow as pa

TEXT = 1 << 27
ROWS = 17


def wide(table: pa.Table, column: str) -> pa.Table:
    """`table` with a user turn of 128 MiB in every row of `column`, each row a chunk. 17 of them are past 2 GiB."""
    field = table.schema.field(column)
    turn = {"role": "user", "content": "x" * TEXT} | ({"trained": False} if column == "messages" else {})
    long = pa.array([[turn]], field.type)
    return table.set_column(table.schema.get_field_index(column), field, pa.chunked_array([long] * table.num_rows))
