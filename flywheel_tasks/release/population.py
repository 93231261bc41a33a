"""The analysis population from the cumulative exposure log (Sec. 2.5.2): one row per unit, its arm, its first exposure.

Printed rules: the first exposure of a unit counts, later ones in the same arm are duplicates, and of several at one
instant each segment takes its first value by name; a unit seen in two arms leaves both; a unit exposed too late for
the estimand is left out. Every row and unit is counted under its rule.
"""

from __future__ import annotations

import datetime as dt
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.stamp import exposure_rows
from flywheel_tasks.release.units import (
    UnitTable,
    Words,
    build,
    hashed,
    id_words,
    in_order,
    values,
)
from flywheel_tasks.release.window import Window

_DAY_US = 86_400_000_000
_EMPTY = "the exposure log has no rows"
_MIXED_IDS = "unit_id is a string in one exposure file and an integer in another: give all the same type"


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
    first: int = 0
    last: int = 0
    """The instants of the first and the last exposure, in microseconds."""
    offset: int = 0
    """The row of the layout that comes first, where only a range of them was read."""

    @property
    def width(self) -> int:
        """Words per unit id."""
        return int(self.words.shape[1])


@dataclass(frozen=True, slots=True)
class Population:
    """Units at their positions; `groups` names (arm, segment values...).

    `group` is -1 for a unit that was left out; `latest` is the last first exposure.
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
    part: tuple[int, int] = (0, 0),
    width: int | None = None,
) -> Log:
    """The exposure rows of one experiment. A layout's units are known by their row, so their ids need not be read.

    `part` = (number, bits) keeps one of 2^bits ranges: of the ids' hashes, whose `width` in words is then given, or of
    a layout's rows.
    """
    reader = _Reader(parts, experiment, segments, naive_zone, with_ids, part, width)
    batches = list(reader)
    if not batches:
        raise InputError(_EMPTY)
    words, arms, times, *columns = zip(*batches, strict=True)
    if len({w.shape[1] for w in words}) > 1:
        most = max(w.shape[1] for w in words)
        words = tuple(_widen(w, most) for w in words)
    codes = [_compact(np.concatenate(c), reader, name) for c, name in zip([arms, *columns], reader.texts, strict=True)]
    return reader.head(np.concatenate(words), codes[0], np.concatenate(times), tuple(codes[1:]))


def read_head(
    parts: Sequence[Part], experiment: str | None, naive_zone: str | None = None, with_ids: bool = True
) -> Log:
    """What `read_log` knows of the whole log, without keeping a row of it."""
    reader = _Reader(parts, experiment, (), naive_zone, with_ids)
    widths = {words.shape[1] for words, *_ in reader}
    if not widths:
        raise InputError(_EMPTY)
    if len(widths) > 1 and 1 in widths:
        raise InputError(_MIXED_IDS)
    nothing = np.empty(0, np.int64)
    return reader.head(np.empty((0, max(widths)), np.uint64), nothing.astype(np.int32), nothing, ())


class _Reader:
    """The rows of one experiment, batch by batch: words, arm, instant, segments; and what is known at their end."""

    def __init__(
        self,
        parts: Sequence[Part],
        experiment: str | None,
        segments: Sequence[str],
        naive_zone: str | None,
        with_ids: bool,
        part: tuple[int, int] = (0, 0),
        width: int | None = None,
    ) -> None:
        self.parts, self.naive_zone, self.with_ids, self.width = parts, naive_zone, with_ids, width
        self.number, self.bits = part
        self.experiment, self.given = experiment, experiment is not None
        self.texts = ("arm", *segments)
        self.names: dict[str, dict[str, int]] = {name: {} for name in ("experiment", *self.texts)}
        self.used: dict[str, set[int]] = {name: set() for name in self.texts}
        self.first, self.last, self.others = np.iinfo(np.int64).max, np.iinfo(np.int64).min, 0
        total = sum(p.open().metadata.num_rows for p in parts)
        self.start, self.stop = (total * n >> self.bits for n in (self.number, self.number + 1))

    def __iter__(self) -> Iterator[tuple[NDArray[Any], ...]]:
        columns = [*self.names, "exposed_at"] + ["unit_id"] * self.with_ids
        seen = 0
        for part in self.parts:
            need(part.open().schema_arrow, columns, part.path)
            file = part.open(columns=list(self.names))
            for batch in file.iter_batches(1 << 19, row_groups=part.groups(file.metadata), columns=columns):
                for name in ("experiment", "arm", "exposed_at", *["unit_id"] * self.with_ids):
                    if batch.column(name).null_count:
                        raise InputError(
                            f"{part.path}: column '{name}' has {batch.column(name).null_count} nulls; fill or drop them"
                        )
                yield self._mine(batch, part.path, seen)
                seen += batch.num_rows

    def _mine(self, batch: pa.RecordBatch, path: str, seen: int) -> tuple[NDArray[Any], ...]:
        codes = {n: _codes(batch.column(n), known, f"{path}: column '{n}'") for n, known in self.names.items()}
        if self.experiment is None and batch.num_rows:
            self.experiment = list(self.names["experiment"])[codes["experiment"][0]]
        mine = codes["experiment"] == self.names["experiment"].get(self.experiment or "", -1)
        others = batch.num_rows - int(np.count_nonzero(mine))
        if others and not self.given:
            self.experiment = choose_experiment(self.parts)
        self.others += others
        none = np.empty((batch.num_rows, 0), np.uint64)
        words = id_words(batch.column("unit_id"), self.width) if self.with_ids else none
        if self.bits and self.with_ids:
            mine &= hashed(words) >> np.uint64(64 - self.bits) == self.number
        elif self.bits:
            row = np.arange(seen, seen + batch.num_rows)
            mine &= (row >= self.start) & (row < self.stop)
        at = microseconds(batch.column("exposed_at"), path, self.naive_zone)
        found: tuple[NDArray[Any], ...] = (words, codes["arm"], at, *(codes[name] for name in self.texts[1:]))
        if not mine.all():
            found = tuple(column[mine] for column in found)
        for name, column in zip(self.texts, (found[1], *found[3:]), strict=True):
            unseen = set(self.names[name].values()) - self.used[name]
            self.used[name] |= {code for code in unseen if (column == code).any()}
        if len(found[2]):
            self.first, self.last = min(self.first, int(found[2].min())), max(self.last, int(found[2].max()))
        return found

    def head(
        self, words: Words, arm: NDArray[np.int32], at: NDArray[np.int64], segments: tuple[NDArray[np.int32], ...]
    ) -> Log:
        if self.experiment is None:
            raise InputError(_EMPTY)
        if self.experiment not in self.names["experiment"]:
            known = _some(self.names["experiment"])
            raise InputError(f"no exposure of experiment '{self.experiment}': name one of {known}")
        rows = exposure_rows(self.parts)
        if self.others:
            rows["of another experiment"] += self.others
        arms, *values = ([n for n, code in self.names[t].items() if code in self.used[t]] for t in self.texts)
        offset = 0 if self.with_ids else self.start
        return Log(words, arm, at, segments, arms, tuple(values), self.experiment, rows, self.first, self.last, offset)


def _compact(codes: NDArray[np.int32], reader: _Reader, name: str) -> NDArray[np.int32]:
    """Codes into the names that occur: a log of many experiments, or a dictionary, knows more."""
    known, used = reader.names[name], reader.used[name]
    if len(used) == len(known):
        return codes
    place = np.cumsum([code in used for code in range(len(known))], dtype=np.int32) - np.int32(1)
    return np.asarray(place[codes], np.int32)


def choose_experiment(parts: Sequence[Part], preferred: str | None = None) -> str:
    """The experiment to read where none is named: the preferred one if the log holds it, else the only one."""
    found: set[str] = set()
    for part in parts:
        need(part.open().schema_arrow, ["experiment"], part.path)
        for batch in part.open(columns=["experiment"]).iter_batches(1 << 19, columns=["experiment"]):
            found.update(str(name) for name in batch.column(0).unique().to_pylist() if name is not None)
    if preferred in found:
        return str(preferred)
    if not found:
        raise InputError(_EMPTY)
    if len(found) > 1:
        raise InputError(f"the log holds {len(found)} experiments: name one of {_some(found)}")
    return found.pop()


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:8])


def populate(
    log: Log, window: Window, zone: str, part: tuple[int, int] = (0, 0), split_returning: bool = False
) -> Population:
    """Apply the rules and place each remaining unit. `part` = (number, bits) is the hash range that was read."""
    rows = Counter[str]()
    h = hashed(log.words)
    words, arm, at, segments = log.words, log.arm, log.at, log.segments
    # The leading bits are the same in the whole part: without them the hashes spread over the table again.
    h <<= np.uint64(part[1])
    order = np.argsort(h)
    ranked = in_order(h, order)
    if bool((ranked[1:-2] == ranked[:-3]).any()):
        keep, segments = _first_exposures(log, h, rows)
        h, words, arm, at = h[keep], words[keep], arm[keep], at[keep]
        order = np.argsort(h)
        ranked = in_order(h, order)
    del h
    exposed = local_days(at, zone)
    eligible, why = window.eligible(exposed)
    if not eligible.all():
        rows[f"units {why}"] = int((~eligible).sum())
    group = _group_codes(log, arm, segments, eligible)[order]
    rows["units"] = int(eligible.sum())
    latest = int(exposed.max(initial=0, where=eligible))
    table = build(words, ranked, order)
    return Population(table, group, exposed[order], group_names(log), rows, latest, not eligible.all(), split_returning)


def _group_codes(
    log: Log, arm: NDArray[np.int32], segments: Sequence[NDArray[np.int32]], eligible: NDArray[np.bool_]
) -> NDArray[np.int16]:
    """The number of each unit's group; -1 for a unit that is left out."""
    groups = len(log.arms) * math.prod(len(names) for names in log.segment_values)
    if groups > np.iinfo(np.int16).max:
        raise InputError(f"arms and segments make {groups} groups: split by fewer columns or values")
    code = arm.astype(np.int16)
    for names, column in zip(log.segment_values, segments, strict=True):
        code = code * np.int16(len(names)) + column.astype(np.int16)
    code[~eligible] = -1
    return code


def populate_layout(
    log: Log, window: Window, zone: str, part: tuple[int, int] = (0, 0), split_returning: bool = False
) -> Population:
    """The population of a layout, or of the range of its rows that was read: a unit's position is its row."""
    exposed = local_days(log.at, zone)
    eligible, why = window.eligible(exposed)
    rows = Counter({"units": int(eligible.sum())})
    if not eligible.all():
        rows[f"units {why}"] = int((~eligible).sum())
    code = _group_codes(log, log.arm, log.segments, eligible)
    latest = int(exposed.max(initial=0, where=eligible))
    return Population(
        None, code, exposed, group_names(log), rows, latest, not eligible.all(), split_returning, log.offset
    )


def local_days(at: NDArray[np.int64], zone: str) -> NDArray[np.int32]:
    """Calendar days in a time zone, from instants in microseconds."""
    if zone == "UTC":
        return np.floor_divide(at, _DAY_US, out=np.empty(len(at), np.int32), casting="unsafe")
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
        naive = column.cast(pa.timestamp("us"), safe=False)
        column = pc.assume_timezone(naive, naive_zone, ambiguous="earliest", nonexistent="earliest")
    return values(column.cast(pa.timestamp("us", tz="UTC"), safe=False), np.int64)


def span(log: Log, zone: str) -> tuple[dt.date, dt.date]:
    """First and last local day of an exposure."""
    first, last = local_days(np.array([log.first, log.last]), zone)
    return dt.date(1970, 1, 1) + dt.timedelta(int(first)), dt.date(1970, 1, 1) + dt.timedelta(int(last))


def _first_exposures(log: Log, h: Words, rows: Counter[str]) -> tuple[NDArray[np.int64], tuple[NDArray[np.int32], ...]]:
    """Rows that hold the first exposure of a unit seen in one arm only, and the unit's segments."""
    words, arm, at = log.words, log.arm, log.at
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
    tied = np.flatnonzero(~starts & (at[order] == at[order][starts][unit]))
    first = order[starts]
    found = first_values(log, first, unit[tied], order[tied])
    kept = np.flatnonzero(~crossed)
    kept = kept[np.argsort(first[kept])]
    return first[kept], tuple(codes[kept] for codes in found)


def first_values(
    log: Log, first: NDArray[np.int64], unit: NDArray[np.int64], tied: NDArray[np.int64]
) -> tuple[NDArray[np.int32], ...]:
    """The segments of units by the row `first` of each and the rows `tied` with it, of which `unit` says whose they
    are: of several values at one instant the first by name, in whatever order the rows came."""
    found = []
    for codes, names in zip(log.segments, log.segment_values, strict=True):
        by_name = np.array(sorted(range(len(names)), key=names.__getitem__), np.int32)
        rank = np.empty(len(names), np.int32)
        rank[by_name] = np.arange(len(names), dtype=np.int32)
        least = rank[codes[first]]
        np.minimum.at(least, unit, rank[codes[tied]])
        found.append(by_name[least])
    return tuple(found)


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
        raise InputError(_MIXED_IDS)
    out = np.zeros((len(words), width), np.uint64)
    out[:, : words.shape[1] - 1] = words[:, :-1]
    out[:, -1] = words[:, -1]
    return out
