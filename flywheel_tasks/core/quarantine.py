"""Rows that a stage leaves out, as rows of the quarantine: an id, a reason, whose they are; never their words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core import schemas

FORGOTTEN = "forgotten"
"""The reason of a row whose user asked to be forgotten, in every stage."""


def quarantined(rows: pa.Table, id_column: str, reason: str | Sequence[str]) -> pa.Table:
    """All of `rows`, for one reason or for one each. Users come from the column `user` where there is one."""
    reasons = [reason] * rows.num_rows if isinstance(reason, str) else list(reason)
    names, nothing = rows[id_column].cast(pa.string()), pa.nulls(rows.num_rows, pa.string())
    users = rows["user"] if "user" in rows.column_names else nothing
    return pa.table([names, pa.array(reasons, pa.string()), names, users, nothing], schema=schemas.QUARANTINE)


def theirs(users: pa.ChunkedArray, forgotten: Iterable[str]) -> NDArray[np.bool_]:
    """Which rows are of users who asked to be forgotten."""
    named = pc.is_in(users, pa.array(sorted(forgotten), pa.string()))
    return np.asarray(pc.fill_null(named, False).to_numpy(), bool)


def of_others(rows: pa.Table, forgotten: Iterable[str]) -> pa.Table:
    """The rows of everybody who did not ask to be forgotten."""
    return without(rows, forgotten, rows.column_names[0])[0]


def without(
    rows: pa.Table, forgotten: Iterable[str], id_column: str, user_column: str = "user"
) -> tuple[pa.Table, pa.Table]:
    """The rows of everybody else, and those of forgotten users as quarantine that names nobody."""
    names = pa.array(sorted(forgotten), pa.string())
    theirs = pc.fill_null(pc.is_in(rows[user_column], names), False)
    gone = rows.filter(theirs)
    if not gone.num_rows:
        return rows, schemas.QUARANTINE.empty_table()
    refused = quarantined(gone.select([id_column]), id_column, FORGOTTEN)
    return rows.filter(pc.invert(theirs)), refused
