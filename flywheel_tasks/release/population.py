"""The analysis population from the cumulative exposure log (Sec. 2.5.2): one row per unit, its arm, its first exposure.

Printed rules: the first exposure of a unit counts, later ones in the same arm are duplicates; a unit seen in two
arms leaves both; a unit exposed too late for the estimand is left out. Every row and unit is counted under its rule.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.units import (
    UnitTable,
    Words,
    build,
    hashed,
    id_words,
    values,
)
from flywheel_tasks.release.window import Window

_DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Log:
    """The exposure log as arrays, before any rule; `arm` and `segments` are codes into their names."""

    words: Words
    arm: NDArray[np.int32]
    at: NDArray[np.int64]
    segments: tuple[NDArray[np.int32], ...]
    arms: list[str]
    segment_values: tuple[list[str], ...]
    experiment: str
    rows: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Population:
    """Units at their positions; `groups` names (arm, segment values...).

    `group` is -1 where a position holds no unit and -2 where its unit was left out; `latest` is the last first
    exposure.
    """

    table: UnitTable | None
    group: NDArray[np.int16]
    exposed: NDArray[np.int32]
    groups: list[tuple[str, ...]]
    rows: Counter[str]
    latest: int = 0
    excluded: bool = False
    split_returning: bool = False
    """Whether groups end in a segment of their own: units with activity in the pre-period, or without."""
    offset: int = 0
    """The unit_index of position 0, where a layout is read by ranges."""

    @property
    def slots(self) -> int:
        return len(self.group)


def read_log(
    parts: Sequence[Part],
    experiment: str | None,
    segments: Sequence[str] = (),
    naive_zone: str | None = None,
    with_ids: bool = True,
) -> Log:
    """All exposure rows of one experiment. A layout's units are known by their row, so their ids need not be read."""
    columns = ["experiment", "arm", "exposed_at", *segments] + ["unit_id"] * with_ids
    names: dict[str, dict[str, int]] = {c: {} for c in ("experiment", "arm", *segments)}
    words: list[Words] = []
    times: list[NDArray[np.int64]] = []
    codes: dict[str, list[NDArray[np.int32]]] = {c: [] for c in names}
    for part in parts:
        need(part.open().schema_arrow, columns, part.path)
        file = part.open(columns=list(names))
        for batch in file.iter_batches(batch_size=1 << 19, columns=columns):
            for name in {"experiment", "arm", "exposed_at", "unit_id"} & set(columns):
                if batch.column(name).null_count:
                    raise InputError(
                        f"{part.path}: column '{name}' has {batch.column(name).null_count} nulls; fill or drop them"
                    )
            words.append(id_words(batch.column("unit_id")) if with_ids else np.empty((batch.num_rows, 0), np.uint64))
            times.append(microseconds(batch.column("exposed_at"), part.path, naive_zone))
            for name, known in names.items():
                codes[name].append(_codes(batch.column(name), known, f"{part.path}: column '{name}'"))
    if not words:
        raise InputError("the exposure log has no rows")
    if len({w.shape[1] for w in words}) > 1:
        width = max(w.shape[1] for w in words)
        words = [_widen(w, width) for w in words]
    chosen = _choose(list(names["experiment"]), experiment)
    mine = np.concatenate(codes["experiment"]) == names["experiment"][chosen]
    whole = bool(mine.all())
    keep = slice(None) if whole else mine
    rows = Counter({"exposure rows": len(mine)})
    if not whole:
        rows["of another experiment"] = int((~mine).sum())
    return Log(
        np.concatenate(words)[keep],
        np.concatenate(codes["arm"])[keep],
        np.concatenate(times)[keep],
        tuple(np.concatenate(codes[s])[keep] for s in segments),
        list(names["arm"]),
        tuple(list(names[s]) for s in segments),
        chosen,
        rows,
    )


def populate(
    log: Log, window: Window, zone: str, part: tuple[int, int] = (0, 0), split_returning: bool = False
) -> Population:
    """Apply the rules and place each remaining unit. `part` = (number, bits) keeps one of 2^bits hash ranges."""
    rows = Counter[str]()
    h = hashed(log.words)
    words, arm, at, segments = log.words, log.arm, log.at, log.segments
    if part[1]:
        mine = np.flatnonzero(h >> np.uint64(64 - part[1]) == part[0])
        # The leading bits are the same in the whole part: without them the hashes spread over the table again.
        h, words, arm, at = h[mine] << np.uint64(part[1]), words[mine], arm[mine], at[mine]
        segments = tuple(s[mine] for s in segments)
    order = np.argsort(h)
    ranked = h[order]
    if len(h) > 1 and bool((ranked[1:] == ranked[:-1]).any()):
        keep = _first_exposures(words, h, arm, at, rows)
        h, words, arm, at = h[keep], words[keep], arm[keep], at[keep]
        segments = tuple(s[keep] for s in segments)
        order = np.argsort(h)
    exposed = local_days(at, zone)
    eligible, why = window.eligible(exposed)
    if not eligible.all():
        rows[f"units {why}"] = int((~eligible).sum())
    table, slot = build(words, h, order)
    group = np.full(table.slots, -1, np.int16)
    group[slot] = _group_codes(log, arm, segments, eligible)[order]
    when = np.zeros(table.slots, np.int32)
    when[slot] = exposed[order]
    rows["units"] = int(eligible.sum())
    latest = int(exposed.max(initial=0, where=eligible))
    return Population(table, group, when, group_names(log), rows, latest, not eligible.all(), split_returning)


def _group_codes(
    log: Log, arm: NDArray[np.int32], segments: Sequence[NDArray[np.int32]], eligible: NDArray[np.bool_]
) -> NDArray[np.int16]:
    """The number of each unit's group; -2 for a unit that is left out."""
    groups = len(log.arms) * math.prod(len(names) for names in log.segment_values)
    if groups > np.iinfo(np.int16).max:
        raise InputError(f"arms and segments make {groups} groups: split by fewer columns or values")
    code = arm.astype(np.int16)
    for names, column in zip(log.segment_values, segments, strict=True):
        code = code * np.int16(len(names)) + column.astype(np.int16)
    code[~eligible] = -2
    return code


def populate_layout(
    log: Log, window: Window, zone: str, part: tuple[int, int] = (0, 0), split_returning: bool = False
) -> Population:
    """The population of a layout: one row per unit already, a unit's position is its row. `part` keeps a range of
    rows."""
    start, stop = (len(log.at) * n >> part[1] for n in (part[0], part[0] + 1))
    exposed = local_days(log.at[start:stop], zone)
    eligible, why = window.eligible(exposed)
    rows = Counter({"units": int(eligible.sum())})
    if not eligible.all():
        rows[f"units {why}"] = int((~eligible).sum())
    code = _group_codes(log, log.arm[start:stop], [column[start:stop] for column in log.segments], eligible)
    latest = int(exposed.max(initial=0, where=eligible))
    return Population(None, code, exposed, group_names(log), rows, latest, not eligible.all(), split_returning, start)


def local_days(at: NDArray[np.int64], zone: str) -> NDArray[np.int32]:
    """Calendar days in a time zone, from instants in microseconds."""
    if zone == "UTC":
        return np.floor_divide(at, _DAY_US).astype(np.int32)
    shifted = pc.local_timestamp(
        pa.array(at, pa.timestamp("us", tz="UTC")).cast(pa.timestamp("us", tz=ZoneInfo(zone).key))
    )
    return values(shifted.cast(pa.date32()), np.int32)


def microseconds(column: pa.Array, where: str, naive_zone: str | None) -> NDArray[np.int64]:
    """Instants. Any zone is converted; a time without a zone is refused unless the config names its zone."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        try:
            column = column.cast(pa.timestamp("us", tz="UTC"))
        except pa.ArrowInvalid as error:
            raise InputError(f"{where}: exposed_at is text that is no time with a zone offset: {error}") from error
    if not pa.types.is_timestamp(column.type):
        raise InputError(f"{where}: exposed_at has type {column.type}: give timestamps with a zone")
    if column.type.tz is None:
        if naive_zone is None:
            raise InputError(f"{where}: exposed_at has no time zone: write one, or set naive_zone to the zone it means")
        column = pc.assume_timezone(column.cast(pa.timestamp("us")), naive_zone)
    return values(column.cast(pa.timestamp("us", tz="UTC")), np.int64)


def span(log: Log, zone: str) -> tuple[dt.date, dt.date]:
    """First and last local day of an exposure."""
    first, last = local_days(np.array([log.at.min(), log.at.max()]), zone)
    return dt.date(1970, 1, 1) + dt.timedelta(int(first)), dt.date(1970, 1, 1) + dt.timedelta(int(last))


def _first_exposures(
    words: Words, h: Words, arm: NDArray[np.int32], at: NDArray[np.int64], rows: Counter[str]
) -> NDArray[np.int64]:
    """Rows that hold the first exposure of a unit seen in one arm only."""
    order = np.lexsort([arm, at, *words.T, h])
    ranked = words[order]
    starts = np.concatenate([[True], (ranked[1:] != ranked[:-1]).any(axis=1)])
    hashes = h[order][starts]
    if bool((hashes[1:] == hashes[:-1]).any()):
        raise InputError("two unit ids share a 64-bit hash: rename one of them")
    unit = np.cumsum(starts) - 1
    arms = arm[order]
    crossed = np.zeros(int(unit[-1]) + 1, bool)
    crossed[unit[arms != arms[starts][unit]]] = True
    rows["duplicate rows of a unit in its arm"] = int((~crossed[unit]).sum() - (~crossed).sum())
    rows["units in two arms"] = int(crossed.sum())
    rows["rows of units in two arms"] = int(crossed[unit].sum())
    return np.sort(order[starts & ~crossed[unit]])


def group_names(log: Log) -> list[tuple[str, ...]]:
    names: list[tuple[str, ...]] = [(a,) for a in log.arms]
    for segment in log.segment_values:
        names = [(*name, value) for name in names for value in segment]
    return names


def _codes(column: pa.Array, known: dict[str, int], where: str) -> NDArray[np.int32]:
    """Codes of a text column under names that grow from batch to batch."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    found = encoded.dictionary.to_pylist()
    if any(not isinstance(v, str | bool | int) for v in found if v is not None):
        raise InputError(f"{where} has type {encoded.dictionary.type}: give text")
    lookup = [known.setdefault(str(v), len(known)) for v in found]
    index = encoded.indices.cast(pa.int32())
    if index.null_count:
        index = index.fill_null(len(lookup))
        lookup.append(known.setdefault("(none)", len(known)))
    return np.array(lookup, np.int32)[values(index, np.int32)]


def _widen(words: Words, width: int) -> Words:
    """String rows padded to more words; the length stays last."""
    if words.shape[1] == 1:
        raise InputError("unit_id is a string in one exposure file and an integer in another: give all the same type")
    out = np.zeros((len(words), width), np.uint64)
    out[:, : words.shape[1] - 1] = words[:, :-1]
    out[:, -1] = words[:, -1]
    return out


def _choose(found: list[str], wanted: str | None) -> str:
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted in found:
        return str(wanted)
    names = ", ".join(sorted(found)[:8])
    problem = f"no exposure of experiment '{wanted}'" if wanted else f"the log holds {len(found)} experiments"
    raise InputError(f"{problem}: name one of {names}")
