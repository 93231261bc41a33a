"""The readout from end to end: exposure log and activity in, result out. Nothing here looks at a clock."""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.release import analysis, shuffle
from flywheel_tasks.release.days import Named, day_problems, pre_period_problems
from flywheel_tasks.release.decision import decide
from flywheel_tasks.release.parts import Part
from flywheel_tasks.release.population import Log, populate, populate_layout, read_head, read_log
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.reduce import Totals, merge
from flywheel_tasks.release.resolve import Resolved, resolve_window, too_many_crossed
from flywheel_tasks.release.result import ReadoutResult, Status
from flywheel_tasks.release.scan import Scan, missing_days
from flywheel_tasks.release.stamp import DENSE, layout_of
from flywheel_tasks.release.sums import sums
from flywheel_tasks.release.window import Window, day_number, day_of
from flywheel_tasks.stats.moments import Moments
from flywheel_tasks.stats.srm import SampleRatio, sample_ratio

Arms = dict[str, Named]
B = TypeVar("B")

RULES = (
    "the first exposure of a unit counts; later rows of the unit in the same arm are duplicates",
    "of exposures of a unit at one instant, each segment takes its first value by name",
    "a unit seen in two arms leaves both",
    "exposure times are cut to microseconds; one without a zone that a clock change repeats or skips is the earlier",
    "activity rows outside the days that are read are not looked at, so nothing in them is refused",
    "activity on the day of exposure counts; activity before it does not",
    "several rows of a unit on one day are added; a unit is active on a day when they add up to more than zero",
    "depth: over units active in the window, with the variance among them; breadth: over units, not unit-days",
)


@dataclass(frozen=True)
class Bucket:
    """One hash range of the units, or range of a layout's rows: what a worker needs to do its share."""

    exposures: tuple[Part, ...]
    activity: tuple[Part, ...]
    config: ReadoutConfig
    window: Window
    experiment: str
    width: int
    number: int


def read_out(
    exposures: Sequence[Part],
    activity: Sequence[Part],
    config: ReadoutConfig,
    stayed: Mapping[str, int] | None = None,
) -> ReadoutResult:
    """The result over any number of files, in any order, on any number of threads or workers: the same bits.

    `stayed` are the sizes of arms that were resized on the way, by the units that no resizing moved: those keep to the
    allocation, so the sample ratio is taken of them.
    """
    layout = layout_of(exposures, activity)
    log = _log(exposures, config, with_ids=layout is None)
    if config.control not in log.arms:
        raise InputError(
            f"no unit in control arm '{config.control}': name one of {', '.join(sorted(log.arms))} as control"
        )
    if len(log.arms) < 2:
        raise InputError(f"only arm '{config.control}' has units: a readout compares at least two arms")
    resolved = resolve_window(log, activity, config)
    if resolved.waits and (resolved.window.relative or not resolved.complete):
        return _empty(log, resolved.window, config, "running", [resolved.waits], warnings=resolved.notes)
    totals, rows = totals_of(log, exposures, activity, config, resolved.window)
    return assemble(log, resolved, config, totals, rows, stayed)


def nobody_yet(experiment: str, arms: Sequence[str], first: dt.date, config: ReadoutConfig) -> ReadoutResult:
    """What is said of an experiment while an arm has no unit yet."""
    log = Log(np.empty((0, 1), np.uint64), np.empty(0, np.int32), np.empty(0, np.int64), (), list(arms), (), experiment)
    day = day_number(first)
    window = Window(day, config.days, day + config.days - 1, config.pre_days, config.estimand)
    return _empty(
        log, window, config, "running", [f"not every arm has a unit since {first}: their activity is not there yet"]
    )


def _log(exposures: Sequence[Part], config: ReadoutConfig, with_ids: bool) -> Log:
    """The whole log; without its rows where the buckets will read them."""
    if config.partition_bits:
        return read_head(exposures, config.experiment, config.naive_zone, with_ids)
    return read_log(exposures, config.experiment, config.columns, config.naive_zone, with_ids)


def totals_of(
    log: Log, exposures: Sequence[Part], activity: Sequence[Part], config: ReadoutConfig, window: Window
) -> tuple[Totals, Counter[str]]:
    """Exact moments, in one piece or bucket by bucket: the units of different buckets are disjoint, so their sums
    are added."""
    share = Share({}, Counter(), Counter())
    if not config.partition_bits:
        share = _share(log, activity, config, window, (0, 0))
    for more in _by_bucket(log, exposures, activity, config, window) if config.partition_bits else ():
        share = Share(merge([share.totals, more.totals]), share.rows + more.rows, share.by_day + more.by_day)
    if window.relative and (gone := missing_days(share.by_day, window)):
        raise InputError(
            f"no activity row on {', '.join(gone[:3])}: per_user_window needs every day; give the missing files"
        )
    return share.totals, log.rows + share.rows


def _by_bucket(
    log: Log, exposures: Sequence[Part], activity: Sequence[Part], config: ReadoutConfig, window: Window
) -> Iterator[Share]:
    """What each bucket adds. Raw inputs are first written by bucket, once; a layout's rows lie by unit already."""
    bits, empty = config.partition_bits, Share({}, Counter(), Counter())
    with ExitStack() as stack:
        each: list[tuple[tuple[Part, ...], tuple[Part, ...]]] = [(tuple(exposures), tuple(activity))] * (1 << bits)
        if not is_layout(activity):
            store = stack.enter_context(_scratch(config.scratch))
            common: dict[str, Any] = {"store": store, "bits": bits, "width": log.width}
            columns = ("experiment", "unit_id", "arm", "exposed_at", *config.columns)
            work = shuffle.shares(exposures, "exposures", columns, experiment=log.experiment, **common)
            units, _ = shuffle.gather(list(_map(shuffle.split, work, config.workers)), store, bits)
            work = shuffle.shares(
                activity, "activity", shuffle.ACTIVITY, window=window, bad_rows=config.bad_rows, **common
            )
            sends, rows = shuffle.gather(list(_map(shuffle.split, work, config.workers)), store, bits)
            each = list(zip(units, sends, strict=True))
            yield empty._replace(rows=rows)
        buckets = [Bucket(*parts, config, window, log.experiment, log.width, n) for n, parts in enumerate(each)]
        yield from (Share.loads(text) for text in _map(read_bucket, buckets, config.workers))


@contextmanager
def _scratch(folder: str | None) -> Iterator[str]:
    """A folder of this run alone, gone with it: two runs that share a scratch folder share no file, and what lies in
    it by unit does not outlive the readout."""
    if folder is None:
        with TemporaryDirectory(prefix="flywheel-buckets-") as local:
            yield f"file://{local}"
        return
    own = f"readout-{secrets.token_hex(8)}"
    try:
        yield f"{folder.rstrip('/')}/{own}"
    finally:
        Storage(folder).delete_folder(own)


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
    """A worker's share: only the units of its range are ever held."""
    config, part = bucket.config, (bucket.number, bucket.config.partition_bits)
    if bucket.exposures:
        log = read_log(
            bucket.exposures,
            bucket.experiment,
            config.columns,
            config.naive_zone,
            with_ids=not is_layout(bucket.activity),
            part=part,
            width=bucket.width,
        )
    else:
        log = _nobody(bucket)
    return _share(log, bucket.activity, config, bucket.window, part).dumps()


def _nobody(bucket: Bucket) -> Log:
    """The log of a bucket that no unit fell into: its activity is of strangers, and is accounted for as theirs."""
    none, columns = np.empty(0, np.int32), bucket.config.columns
    words = np.empty((0, bucket.width), np.uint64)
    names: tuple[list[str], ...] = tuple([] for _ in columns)
    return Log(words, none, np.empty(0, np.int64), (none,) * len(columns), [], names, bucket.experiment)


def is_layout(activity: Sequence[Part]) -> bool:
    """Whether the activity names units by their number in a layout."""
    return bool(activity) and DENSE in activity[0].open().schema_arrow.names


def _map(fn: Callable[[B], str], blocks: Sequence[B], workers: int) -> Iterable[str]:
    if workers < 2:
        return map(fn, blocks)
    from flywheel_tasks.compute.blocks import map_blocks

    return map_blocks(fn, blocks, cpus=1, actors=min(workers, len(blocks)))


def _share(log: Log, activity: Sequence[Part], config: ReadoutConfig, window: Window, part: tuple[int, int]) -> Share:
    threads = config.threads or (1 if part[1] and config.workers > 1 else session.cpus())
    place = populate_layout if is_layout(activity) else populate
    population = place(log, window, config.time_zone, part, "returning" in config.segments)
    totals, rows, by_day = sums(activity, Scan(population, window, config.bad_rows, part), threads)
    return Share(totals, population.rows + rows, by_day)


def assemble(
    log: Log,
    resolved: Resolved,
    config: ReadoutConfig,
    totals: Totals,
    rows: Counter[str],
    stayed: Mapping[str, int] | None = None,
) -> ReadoutResult:
    """Checks first; lifts only where every check passed; only the looks so far while the window is open."""
    window = resolved.window
    arms = analysis.by_arm(totals).get("all", {})
    days = resolved.complete if resolved.waits else window.kept
    problems, warnings, ratio = _checks(arms, log, resolved, days, config, rows, stayed)
    if problems or resolved.waits:
        status: Status = "running" if resolved.waits else "refused"
        empty = _empty(log, window, config, status, [*filter(None, [resolved.waits]), *problems], rows, warnings, ratio)
        looks = [] if problems else analysis.novelty(arms, config.control, window, config.alpha, days)
        return replace(empty, novelty=looks)

    compared = analysis.compare(arms, config.control, window, config.alpha)
    segments = _segments(totals, log, config, window)
    holes = pre_period_problems(arms, config.control, window, config.srm_p)
    warnings = warnings + analysis.active_share_warnings(compared)
    warnings += [f"no CUPED: the pre-period has a hole: {hole}" for hole in holes]
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
        cuped=[] if holes else analysis.cuped_lifts(arms, config.control, window, config.alpha),
        decisions=[
            decide(compared, a, [], config.alpha, config.guard_pct) for a in sorted(arms) if a != config.control
        ],
    )


def _checks(
    arms: Arms,
    log: Log,
    resolved: Resolved,
    days: Sequence[int],
    config: ReadoutConfig,
    rows: Counter[str],
    stayed: Mapping[str, int] | None,
) -> tuple[list[str], list[str], SampleRatio | None]:
    """Problems, warnings, and the sample ratio, over the days that are complete."""
    problems = [f"arm '{arm}' has no unit in the population" for arm in log.arms if arm not in arms]
    problems += [f"arm '{a}' has no active unit in the window" for a, m in sorted(arms.items()) if m["depth"].n == 0]
    problems += filter(None, [too_many_crossed(rows, config.max_crossed)])
    if problems:
        return problems, list(resolved.notes), None
    weights = config.allocation or dict.fromkeys(arms, 1.0)
    if set(weights) != set(arms):
        raise InputError(f"allocation names {', '.join(sorted(weights))}; the log has {', '.join(sorted(arms))}")
    counted = stayed or {a: m["sends"].n for a, m in sorted(arms.items())}
    ratio = sample_ratio(counted, weights) if any(counted.values()) else None
    if ratio is None:
        problems.append("no unit kept its place while the arms were resized, so the sample ratio can't be checked")
    elif ratio.p < config.srm_p:
        planned = ", ".join(f"{a} {w:g}" for a, w in sorted(weights.items()))
        problems.append(
            f"sample ratio mismatch: p = {ratio.p:.2g} < {config.srm_p:g} against the planned weights {planned}, so "
            "the arms are not comparable; if other weights were planned, set readout.allocation"
        )
    of_days, warnings = day_problems(arms, resolved.window, days, config.partial_share)
    if stayed:
        warnings.append(
            f"the arms were resized while units entered: the sample ratio is of the {sum(stayed.values()):,} units "
            "whose place was never given or taken; arms whose units came at different times may differ for that alone"
        )
    return problems + of_days, [*resolved.notes, *warnings], ratio


def _segments(totals: Totals, log: Log, config: ReadoutConfig, window: Window) -> list[analysis.Comparison]:
    names = [*config.columns, *["returning"] * ("returning" in config.segments)]
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
