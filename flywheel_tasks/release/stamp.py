"""What every file of a layout says about itself, so that files of two layouts are never read as one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part

DENSE = "unit_index"
"""The column of a layout: a unit's row in its units.parquet."""
UNIT_BLOCK = 1 << 17
"""Units of a layout that are read and summed at once; its row groups end where a block of units ends."""
_KEY = b"flywheel.layout"
_AGAIN = "write the layout again, to a folder of its own"


class Stamp(NamedTuple):
    """The identity of a layout, the days of the activity it was made of, and where the exposure rows went."""

    layout: str
    units: int
    first: int
    last: int
    rows: dict[str, int]

    def on(self, schema: pa.Schema) -> pa.Schema:
        return schema.with_metadata({_KEY: json.dumps(self._asdict()).encode()})


def layout_id(columns: Sequence[NDArray[Any]], *choices: object) -> str:
    """A digest of the units, in their order, of their sends, and of what was chosen about them."""
    digest = hashlib.blake2b(repr(choices).encode(), digest_size=16)
    for column in columns:
        digest.update(np.ascontiguousarray(column).reshape(-1).data)
    return digest.hexdigest()


def read_stamp(part: Part) -> Stamp | None:
    """The stamp of one file; None for a file that is no part of a layout."""
    found = (part.open().schema_arrow.metadata or {}).get(_KEY)
    try:
        return Stamp(**json.loads(found)) if found is not None else None
    except (TypeError, ValueError) as error:
        raise InputError(f"{part.path} is part of a layout of another version: {_AGAIN}") from error


def exposure_rows(parts: Sequence[Part]) -> Counter[str]:
    """The rows of the exposure log; a layout remembers those it was made of."""
    rows = Counter[str]()
    for part in parts:
        stamp = read_stamp(part)
        rows.update(stamp.rows if stamp else {"exposure rows": part.open().metadata.num_rows})
    return rows


def layout_of(exposures: Sequence[Part], activity: Sequence[Part]) -> Stamp | None:
    """The layout that all the files belong to; None for raw activity, an error for anything in between."""
    dense = [DENSE in part.open().schema_arrow.names for part in activity]
    if not any(dense):
        return None
    if not all(dense):
        raise InputError(
            f"{activity[dense.index(False)].path} is raw activity beside a layout's: read one or the other"
        )
    parts = [*exposures, *activity]
    if len({part.path for part in parts}) < len(parts):
        raise InputError("a file of the layout is named twice: name each once")
    stamps = [read_stamp(part) for part in parts]
    first = stamps[0]
    for part, stamp in zip(parts, stamps, strict=True):
        if stamp is None or first is None or stamp.layout != first.layout:
            raise InputError(f"{part.path} and {parts[0].path} are not of one layout: {_AGAIN}")
    units = sum(part.open().metadata.num_rows for part in exposures)
    if first is None or units != first.units:
        raise InputError(f"the layout has {first.units if first else 0} units, {units} were read: {_AGAIN}")
    return first
