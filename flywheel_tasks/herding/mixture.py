"""The SFT mixture: six named sources in fixed proportions (Sec. 2.4.2), sampled the same way every time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.training.rows import Encoded, take

_ONE = 1e-6
_PIECE = 1024


def check(ratios: Mapping[str, float]) -> None:
    """Ratios name known sources, none is negative, and they sum to one."""
    for name, ratio in ratios.items():
        if name not in schemas.EXAMPLE_SOURCES:
            raise ConfigError(f"'{name}' is no source of examples: they are {', '.join(schemas.EXAMPLE_SOURCES)}")
        if not (math.isfinite(ratio) and ratio >= 0):
            raise ConfigError(f"the ratio of '{name}' is {ratio}: it is a share of the examples, 0 or more")
    total = sum(ratios.values())
    if abs(total - 1) > _ONE:
        raise ConfigError(f"the ratios sum to {total:g}: they are shares of all examples and sum to 1")


def quotas(counts: Mapping[str, int], ratios: Mapping[str, float], rows: int | None) -> dict[str, int]:
    """Examples to take of each source, each within one row of its share (largest remainders).

    Without `rows` it is the largest mixture that repeats no example; with it, a source too small for its share is an
    error that says how many rows it could carry.
    """
    check(ratios)
    wanted = {name: ratio for name, ratio in ratios.items() if ratio > 0}
    if empty := sorted(name for name in wanted if not counts.get(name)):
        raise InputError(
            f"the source '{empty[0]}' has no rows but a ratio of {wanted[empty[0]]:g}: give it examples, or set its "
            "ratio to 0 and share the rest among the others"
        )
    most = min(math.floor(counts[name] / ratio + _ONE) for name, ratio in wanted.items())
    total = most if rows is None else rows
    taken = _apportion(wanted, total)
    while rows is None and any(taken[name] > counts[name] for name in wanted):
        total -= 1  # a remainder rounded up past the last row of its source
        taken = _apportion(wanted, total)
    if short := sorted(name for name in wanted if taken[name] > counts[name]):
        name = short[0]
        raise InputError(
            f"{total} examples need {taken[name]} of '{name}', which has {counts[name]}: {most} examples are the most "
            "that these ratios allow"
        )
    return taken


def sample(examples: pa.Table, ratios: Mapping[str, float], rows: int | None, seed: int) -> NDArray[np.int64]:
    """The rows of the mixture: of each source its quota by hash of seed and id, all shuffled together by that hash."""
    sources = examples["source"].to_pylist()
    taken = quotas(Counter(sources), ratios, rows)
    digests = [_digest(seed, name) for name in examples["example_id"].to_pylist()]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    left = dict(taken)
    chosen = []
    for row in order:
        if left.get(sources[row], 0) > 0:
            left[sources[row]] -= 1
            chosen.append(row)
    return np.array(chosen, np.int64)


def encoded(
    examples: pa.Table,
    ratios: Mapping[str, float],
    rows: int | None,
    seed: int,
    encode: Callable[[pa.Table], Encoded],
) -> tuple[Encoded, NDArray[np.bool_]]:
    """The mixture of rows that can be trained on, as training rows, and a mask of those neither drawn nor refused.

    A row that is refused (too long for the context, say) leaves and the next one of its source takes its place, so the
    ratios hold for what is trained; only what is drawn is ever tokenised.
    """
    keys = examples.select(["example_id", "source"])
    names = keys["example_id"].to_pylist()
    fits, tried = np.ones(len(names), bool), np.zeros(len(names), bool)
    parts: list[Encoded] = []
    while True:
        alive = np.flatnonzero(fits)
        try:
            drawn = alive[sample(keys.take(pa.array(alive)), ratios, rows, seed)]
        except InputError as error:
            refused = sum((Counter(part.reasons) for part in parts), Counter[str]())
            if not refused:
                raise
            why = ", ".join(f"{reason} ({n})" for reason, n in sorted(refused.items()))
            raise InputError(f"{error}; of those drawn some can't be trained on: {why}") from error
        fresh = drawn[~tried[drawn]]
        if not len(fresh) and parts:
            break
        tried[fresh] = True
        parts.append(encode(_taken(examples, fresh)))
        out = set(parts[-1].rejected["row_id"].to_pylist())
        fits[[row for row in fresh if names[row] in out]] = False
    table = pa.concat_tables([part.table for part in parts])
    place = {name: i for i, name in enumerate(table["row_id"].to_pylist())}
    mixed = _taken(table, np.array([place[names[row]] for row in drawn], np.int64))
    left = fits.copy()
    left[drawn] = False
    rejected = pa.concat_tables([part.rejected for part in parts])
    return Encoded(mixed, rejected, sum(part.dropped_turns for part in parts)), left


def _taken(table: pa.Table, rows: NDArray[np.int64]) -> pa.Table:
    """These rows in this order, a piece at a time: Arrow can't join more than 2 GiB of text."""
    firsts = range(0, max(len(rows), 1), _PIECE)
    return pa.concat_tables([take(table, rows[first : first + _PIECE]) for first in firsts])


def _apportion(ratios: Mapping[str, float], total: int) -> dict[str, int]:
    exact = {name: ratio * total for name, ratio in ratios.items()}
    taken = {name: math.floor(share + _ONE) for name, share in exact.items()}
    by_remainder = sorted(ratios, key=lambda name: (taken[name] - exact[name], name))
    for name in by_remainder[: max(total - sum(taken.values()), 0)]:
        taken[name] += 1
    return taken


def _digest(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
