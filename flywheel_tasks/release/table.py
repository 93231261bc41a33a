"""A readout as a table for people: the decision, every lift with its set, the checks."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from flywheel_tasks.core.terminal import Table, line, text_of
from flywheel_tasks.release.analysis import Comparison, Look
from flywheel_tasks.release.result import ReadoutResult
from flywheel_tasks.stats.fieller import FiellerSet
from flywheel_tasks.stats.moments import Estimate


def render(result: ReadoutResult, problems: bool = True) -> list[Any]:
    """The whole readout, ready for `terminal.show`; without `problems` where they are told otherwise."""
    window = result.window
    parts: list[Any] = [
        f"experiment {result.experiment}: {result.status}, {window['first']} to {window['last']}",
        *([f"candidate: {result.candidate['artifact']}"] if result.candidate else []),
        *([f"champion: {result.champion}"] if result.champion else []),
    ]
    for d in result.decisions:
        why = "no readout" if result.problems else "; ".join(d.reasons)
        parts.append(line(f"decision for {d.arm}: {d.verdict} ({why})", "bold"))
    parts += [line(f"{result.status}: {p}", "red") for p in (result.problems if problems else [])]
    parts.append(f"estimand: {result.estimand}")
    if result.comparisons:
        parts += [
            _lifts(f"lift over {result.control}", result.comparisons, _level(result)),
            _others(result.comparisons),
        ]
    if result.segments:
        parts.append(_lifts("segments", result.segments, _level(result)))
    if result.cuped:
        rows = [(c.arm, c.metric, lift_text(c.lift), set_text(c.lift), f"{c.variance_kept:.1%}") for c in result.cuped]
        head = ("arm", "metric", "lift", f"{_level(result)} set", "variance kept")
        parts.append(Table(head, rows, "CUPED (pre-period covariate)"))
    if len({claim["experiment"] for claim in result.versions}) > 1:
        parts.append(_versions(result.versions))
    for _, looks in groupby(result.novelty, key=lambda look: (look.arm, look.metric)):
        parts.append(_novelty(list(looks)))
    parts += [line(f"warning: {w}", "yellow") for w in result.warnings]
    if result.sample_ratio:
        shares = ", ".join(f"{a} {n:,}" for a, n in result.sample_ratio.observed.items())
        parts.append(f"sample ratio: {shares}; p = {result.sample_ratio.p:.3g}")
    parts.append("rows: " + ", ".join(f"{n:,} {what}" for what, n in result.rows.items()))
    return parts + [f"rule: {rule}" for rule in result.rules]


def plain_text(result: ReadoutResult, width: int = 150) -> str:
    return text_of(render(result), width)


def lift_text(lift: FiellerSet) -> str:
    return "-" if lift.lift_pct is None else f"{lift.lift_pct:+.3g} %"


def _level(result: ReadoutResult) -> str:
    return f"{100 * (1 - result.alpha):g} %"


def set_text(lift: FiellerSet) -> str:
    """A set without its level, which the column names."""
    return str(lift).removeprefix(f"{100 * (1 - lift.alpha):g} % ").replace(" %,", ",").replace(" %]", "]")


def _lifts(title: str, found: list[Comparison], level: str) -> Table:
    rows = []
    for c in found:
        cells = (_name(c), lift_text(c.lift), set_text(c.lift), _p(c.p), _p(c.p_holm), _p(c.p_bh))
        rows.append([(cell, "bold" if c.lift.significant else "") for cell in cells])
    return Table(("", "lift", f"Fieller {level}", "p", "p Holm", "p BH"), rows, title)


def _others(found: list[Comparison]) -> Table:
    rows = [(_name(c), _mean(c.control), _mean(c.test), _bounds(c.delta_pct), _bounds(c.log_delta_pct)) for c in found]
    title = "the means, and other intervals of the lift for comparison"
    return Table(("", "control", "test", "delta", "log-delta"), rows, title)


def _versions(claims: list[dict[str, Any]]) -> Table:
    rows = []
    for c in claims:
        lift = "-" if c["lift_pct"] is None else f"{c['lift_pct']:+.3g} %"
        name = f"{c['experiment']} {c['arm']} {c['metric']}"
        rows.append((name, lift, _p(c["p"]), _p(c["p_holm"]), _p(c["p_bh"])))
    return Table(("", "lift", "p", "p Holm", "p BH"), rows, "all versions read so far, adjusted together")


def _name(c: Comparison) -> str:
    return f"{c.arm} {c.metric}" + (f" {c.segment}" if c.segment != "all" else "")


def _novelty(looks: list[Look]) -> Table:
    rows = []
    for look in looks:
        z = "-" if look.z is None else f"{look.z:+.2f}"
        rows.append((
            look.day, lift_text(look.on_day), set_text(look.on_day), lift_text(look.through), z,
            f"{look.boundary:.2f}", "crossed" if look.crossed else "",
        ))  # fmt: skip
    title = f"{looks[0].arm} {looks[0].metric} by day; looks are cumulative, |z| against O'Brien-Fleming"
    return Table(("day", "on the day", "set", "so far", "z", "boundary", ""), rows, title)


def _mean(e: Estimate) -> str:
    return "-" if e.mean is None else f"{e.mean:.4g}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"[{bounds[0]:+.3g}, {bounds[1]:+.3g}]"
