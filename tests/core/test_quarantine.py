"""What is left out is counted; what was forgotten is left out without a name."""

from __future__ import annotations

import pyarrow as pa

from flywheel_tasks.core.quarantine import quarantined, without

ROWS = pa.table({"row": ["a", "b", "c"], "user": ["u1", "u2", None]})


def test_every_row_has_its_reason() -> None:
    assert quarantined(ROWS, "row", "late")["reason"].to_pylist() == ["late"] * 3
    found = quarantined(ROWS, "row", ["x", "y", "z"]).to_pylist()
    assert [(r["row_id"], r["reason"], r["user"]) for r in found] == [
        ("a", "x", "u1"),
        ("b", "y", "u2"),
        ("c", "z", None),
    ]


def test_forgotten_users_are_out_and_unnamed() -> None:
    kept, refused = without(ROWS, {"u2"}, "row")
    assert kept["row"].to_pylist() == ["a", "c"]
    assert refused.to_pylist() == [{"row_id": "b", "reason": "forgotten", "where": "b", "user": None, "raw": None}]
    assert without(ROWS, set(), "row")[0] is ROWS
