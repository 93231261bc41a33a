"""The readout from end to end: exposure log and activity in, result out. Nothing here looks at a clock."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release import analysis
from flywheel_tasks.release.decision import decide
from flywheel_tasks.release.parts import Part, need
from flywheel_tasks.release.population import Log, populate, populate_layout, read_log, span
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.reduce import Totals, merge, reduce_cells
from flywheel_tasks.release.result import ReadoutResult, Status
from flywheel_tasks.release.scan import DENSE, Scan, missing_days, scan
from flywheel_tasks.release.window import Window, day_number, day_of
from flywheel_tasks.stats.moments import Moments
from flywheel_tasks.stats.srm import sample_ratio

RULES = (
    "the first exposure of a unit counts; later rows of the unit in the same arm are duplicates",
    "a unit seen in two arms leaves both",
    "activity on the day of exposure counts; activity before it does not",
    "several rows of a unit on one day are added; a unit is active on a day when they add up to more than zero",
    "depth: over units active in the window, with the variance among them; breadth: over units, not unit-days",
)


@dataclass(frozen=True)
class Bucket:
    """One hash range of the units: what a worker needs to do its share."""

    exposures: tuple[Part, ...]
    activity: tuple[Part, ...]
    config: ReadoutConfig
    window: Window
    experiment: str
    number: int
    bits: int


def read_out(exposures: Sequence[Part], activity: Sequence[Part], config: ReadoutConfig) -> ReadoutResult:
    """The result over any number of files, in any order, on any number of threads or workers: the same bits."""
    columns = tuple(s for s in config.segments if s != "returning")
    log = read_log(exposures, config.experiment, columns, config.naive_zone, with_ids=not is_layout(activity))
    if config.control not in log.arms:
        raise InputError(
            f"no unit in control arm '{config.control}': name one of {', '.join(sorted(log.arms))} as control"
        )
    if len(log.arms) < 2:
        raise InputError(f"only arm '{config.control}' has units: a readout compares at least two arms")
    window, as_of, inferred = resolve_window(log, activity, config)
    complete = window.last + 1 + config.settle_days <= day_number(as_of)
    if not complete:
        return _empty(
            log,
            window,
            config,
            "running",
            [f"the window ends on {day_of(window.last)}; data is complete before {as_of}"],
        )
    totals, rows = totals_of(log, exposures, activity, config, window)
    return assemble(log, window, config, totals, rows, inferred)


def resolve_window(log: Log, activity: Sequence[Part], config: ReadoutConfig) -> tuple[Window, dt.date, list[str]]:
    """The window and the day before which data is complete: from the config, else from the data; never from a clock."""
    first_day, last_day = activity_span(activity)
    start, notes = config.start, []
    if start is None:
        start = max(span(log, config.time_zone)[0], first_day + dt.timedelta(config.pre_days))
        notes.append(f"start was not given: {start} is the later of the first exposure and the first activity")
    as_of = config.as_of or last_day + dt.timedelta(1)
    first = day_number(start)
    last = (
        day_number(as_of) - 1 - config.settle_days if config.estimand == "per_user_window" else first + config.days - 1
    )
    skipped = frozenset((d - start).days for d in config.missing_days)
    if any(not 0 <= d < config.days for d in skipped) or len(skipped) == config.days:
        raise InputError(f"missing_days must name some, not all, of the {config.days} days from {start}")
    last = max(last, first + config.days - 1)
    return Window(first, config.days, last, config.pre_days, config.estimand, skipped), as_of, notes


def totals_of(
    log: Log, exposures: Sequence[Part], activity: Sequence[Part], config: ReadoutConfig, window: Window
) -> tuple[Totals, Counter[str]]:
    """Exact moments, in one piece or bucket by bucket: the units of different buckets are disjoint, so their sums
    are added."""
    if not config.partition_bits:
        share = _share(log, activity, config, window, (0, 0))
    else:
        buckets = [
            Bucket(tuple(exposures), tuple(activity), config, window, log.experiment, number, config.partition_bits)
            for number in range(1 << config.partition_bits)
        ]
        shares = [Share.loads(text) for text in _map(buckets, config.workers)]
        share = Share(
            merge(s.totals for s in shares),
            sum((s.rows for s in shares), Counter[str]()),
            sum((s.by_day for s in shares), Counter[int]()),
        )
    if window.relative and (gone := missing_days(share.by_day, window)):
        raise InputError(
            f"no activity row on {', '.join(gone[:3])}: per_user_window needs every day; give the missing files"
        )
    return share.totals, log.rows + share.rows


class Share(NamedTuple):
    """What one bucket adds: small, exact, and plain enough to travel as text."""

    totals: Totals
    rows: Counter[str]
    by_day: Counter[int]

    def dumps(self) -> str:
        totals = [[list(g), {name: list(m) for name, m in named.items()}] for g, named in self.totals.items()]
        return json.dumps([totals, self.rows, list(self.by_day.items())])

    @classmethod
    def loads(cls, text: str) -> Share:
        totals, rows, by_day = json.loads(text)
        named = {tuple(g): {name: Moments(*m) for name, m in found.items()} for g, found in totals}
        return cls(named, Counter(rows), Counter(dict(by_day)))


def read_bucket(bucket: Bucket) -> str:
    """A worker's share: the units of one hash range, or of one range of a layout."""
    columns = tuple(s for s in bucket.config.segments if s != "returning")
    layout = is_layout(bucket.activity)
    log = read_log(bucket.exposures, bucket.experiment, columns, bucket.config.naive_zone, with_ids=not layout)
    return _share(log, bucket.activity, bucket.config, bucket.window, (bucket.number, bucket.bits)).dumps()


def is_layout(activity: Sequence[Part]) -> bool:
    """Whether the activity names units by their number in a layout."""
    return bool(activity) and DENSE in activity[0].open().schema_arrow.names


def _map(buckets: list[Bucket], workers: int) -> Any:
    if workers < 2:
        return map(read_bucket, buckets)
    from flywheel_tasks.compute.blocks import map_blocks

    return map_blocks(read_bucket, buckets, cpus=1)


def _share(log: Log, activity: Sequence[Part], config: ReadoutConfig, window: Window, part: tuple[int, int]) -> Share:
    threads = config.threads or (1 if part[1] and config.workers > 1 else os.cpu_count() or 1)
    place = populate_layout if is_layout(activity) else populate
    population = place(log, window, config.time_zone, part, "returning" in config.segments)
    cells = scan(activity, Scan(population, window, config.bad_rows, part), threads)
    return Share(reduce_cells(cells, population, window, threads), population.rows + cells.rows, cells.by_day)


def assemble(
    log: Log, window: Window, config: ReadoutConfig, totals: Totals, rows: Counter[str], warnings: list[str]
) -> ReadoutResult:
    """Checks first; lifts only where every check passed."""
    arms = analysis.by_arm(totals).get("all", {})
    problems = [f"arm '{arm}' has no unit in the population" for arm in log.arms if arm not in arms]
    problems += [f"arm '{a}' has no active unit in the window" for a, m in sorted(arms.items()) if m["depth"].n == 0]
    crossed = rows["units in two arms"]
    if crossed > config.max_crossed * max(1, crossed + rows["units"]):
        problems.append(
            f"{crossed} units were seen in two arms, above max_crossed = {config.max_crossed:g} of the units"
        )
    ratio = None
    if not problems:
        weights = config.allocation or dict.fromkeys(arms, 1.0)
        if set(weights) != set(arms):
            raise InputError(f"allocation names {', '.join(sorted(weights))}; the log has {', '.join(sorted(arms))}")
        ratio = sample_ratio({a: m["sends"].n for a, m in sorted(arms.items())}, weights)
        if ratio.p < config.srm_p:
            problems.append(
                f"sample ratio mismatch: p = {ratio.p:.2g} < {config.srm_p:g}, so the arms are not comparable"
            )
        day_problems, day_warnings = analysis.day_problems(arms, window, config.partial_share)
        problems += day_problems
        warnings = warnings + day_warnings
    if problems:
        return _empty(log, window, config, "refused", problems, rows, warnings, ratio)

    compared = analysis.compare(arms, config.control, window, config.alpha)
    segments = _segments(totals, log, config, window)
    warnings = warnings + analysis.active_share_warnings(compared)
    if segments:
        warnings.append(
            f"{len(segments)} segment comparisons: expect {len(segments) * config.alpha:.1f} false alarms; "
            "p_holm and p_bh are adjusted over all of them"
        )
    return ReadoutResult(
        **_head(log, window, config, rows),
        status="closed",
        warnings=warnings,
        sample_ratio=ratio,
        arms={
            a: {m: analysis.metric_estimate(arms[a], m, window.scale) for m in analysis.METRICS} for a in sorted(arms)
        },
        comparisons=compared,
        segments=segments,
        novelty=analysis.novelty(arms, config.control, window, config.alpha),
        cuped=analysis.cuped_lifts(arms, config.control, window, config.alpha),
        decisions=[
            decide(compared, a, [], config.alpha, config.guard_pct) for a in sorted(arms) if a != config.control
        ],
    )


def _segments(totals: Totals, log: Log, config: ReadoutConfig, window: Window) -> list[analysis.Comparison]:
    names = [s for s in config.segments if s != "returning"] + ["returning"] * ("returning" in config.segments)
    found = []
    for position, name in enumerate(names, start=1):
        for value, arms in sorted(analysis.by_arm(totals, position).items()):
            if config.control in arms:
                found += analysis.compare(arms, config.control, window, config.alpha, f"{name}={value}")
    return analysis.adjust(found)


def _empty(
    log: Log, window: Window, config: ReadoutConfig, status: Status, problems: list[str],
    rows: Counter[str] | None = None, warnings: Sequence[str] = (), ratio: Any = None,
) -> ReadoutResult:  # fmt: skip
    tests = sorted(a for a in log.arms if a != config.control)
    return ReadoutResult(
        **_head(log, window, config, log.rows if rows is None else rows),
        status=status,
        problems=problems,
        warnings=list(warnings),
        sample_ratio=ratio,
        decisions=[decide([], a, problems, config.alpha, config.guard_pct) for a in tests],
    )


def _head(log: Log, window: Window, config: ReadoutConfig, rows: Counter[str]) -> dict[str, Any]:
    """What every result says, whatever its status."""
    return {
        "experiment": log.experiment,
        "control": config.control,
        "estimand": window.describe(),
        "window": _window_json(window),
        "alpha": config.alpha,
        "rows": dict(sorted(rows.items())),
        "rules": list(RULES),
    }


def _window_json(window: Window) -> dict[str, Any]:
    return {
        "first": str(day_of(window.first)),
        "last": str(day_of(window.last)),
        "days": window.days,
        "estimand": window.estimand,
        "pre_days": window.pre_days,
        "missing_days": [str(day_of(window.first + d)) for d in sorted(window.skipped)],
    }


def activity_span(parts: Sequence[Part]) -> tuple[dt.date, dt.date]:
    """First and last day of the activity, from the file statistics where there are some."""
    lows, highs = [], []
    for part in parts:
        file = part.open()
        need(file.schema_arrow, ["day", "sends"], part.path)
        index = file.metadata.schema.names.index("day") if file.metadata.num_row_groups else 0
        for group in range(file.metadata.num_row_groups):
            low, high = _group_span(file, group, index)
            if low is not None:
                lows.append(low)
                highs.append(high)
    if not lows:
        raise InputError("the activity has no rows")
    if not isinstance(lows[0], dt.date):
        raise InputError(f"{parts[0].path}: column 'day' holds {type(lows[0]).__name__}: give dates")
    return min(lows), max(highs)


def _group_span(file: pq.ParquetFile, group: int, index: int) -> tuple[Any, Any]:
    found = file.metadata.row_group(group).column(index).statistics
    if found is not None and found.has_min_max:
        return found.min, found.max
    column = file.read_row_group(group, columns=["day"]).column(0).drop_null()
    import pyarrow.compute as pc

    both = pc.min_max(column).as_py()
    return both["min"], both["max"]
