"""A readout as a table for people: every lift with its set, the checks, the decision."""

from __future__ import annotations

import io
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from flywheel_tasks.release.analysis import Comparison, Look
from flywheel_tasks.release.result import ReadoutResult
from flywheel_tasks.stats.fieller import FiellerSet
from flywheel_tasks.stats.moments import Estimate


def render(result: ReadoutResult) -> Group:
    """The whole readout, ready for a rich console."""
    window = result.window
    parts: list[Table | str] = [
        f"experiment {escape(result.experiment)}: {result.status}, {window['first']} to {window['last']}",
        *([f"candidate: {escape(result.candidate['artifact'])}"] if result.candidate else []),
        f"estimand: {result.estimand}",
    ]
    if result.comparisons:
        parts += [
            _lifts(f"lift over {escape(result.control)}", result.comparisons, _level(result)),
            _others(result.comparisons),
        ]
    if result.segments:
        parts.append(_lifts("segments", result.segments, _level(result)))
    if result.cuped:
        table = Table(
            "arm", "metric", "lift", f"{_level(result)} set", "variance kept", title="CUPED (pre-period covariate)"
        )
        for c in result.cuped:
            table.add_row(escape(c.arm), c.metric, lift_text(c.lift), set_text(c.lift), f"{c.variance_kept:.1%}")
        parts.append(table)
    if len({claim["experiment"] for claim in result.versions}) > 1:
        parts.append(_versions(result.versions))
    for _, looks in groupby(result.novelty, key=lambda look: (look.arm, look.metric)):
        parts.append(_novelty(list(looks)))
    parts.append("rows: " + ", ".join(f"{n:,} {what}" for what, n in result.rows.items()))
    parts += [f"rule: {rule}" for rule in result.rules]
    if result.sample_ratio:
        shares = ", ".join(f"{escape(a)} {n:,}" for a, n in result.sample_ratio.observed.items())
        parts.append(f"sample ratio: {shares}; p = {result.sample_ratio.p:.3g}")
    parts += [f"[yellow]warning:[/] {escape(w)}" for w in result.warnings]
    parts += [f"[red]{result.status}:[/] {escape(p)}" for p in result.problems]
    parts += [
        f"[bold]decision for {escape(d.arm)}: {d.verdict}[/] ({escape('; '.join(d.reasons))})" for d in result.decisions
    ]
    return Group(*parts)


def plain_text(result: ReadoutResult, width: int = 150) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(result))
    file = console.file
    return file.getvalue() if isinstance(file, io.StringIO) else ""


def lift_text(lift: FiellerSet) -> str:
    return "-" if lift.lift_pct is None else f"{lift.lift_pct:+.3g} %"


def _level(result: ReadoutResult) -> str:
    return f"{100 * (1 - result.alpha):g} %"


def set_text(lift: FiellerSet) -> str:
    """A set without its level, which the column names."""
    return str(lift).removeprefix(f"{100 * (1 - lift.alpha):g} % ").replace(" %,", ",").replace(" %]", "]")


def _lifts(title: str, found: list[Comparison], level: str) -> Table:
    table = Table(
        "", "lift", f"Fieller {level}", "p", "p Holm", "p BH", title=title, title_justify="left", box=SIMPLE_HEAD
    )
    for c in found:
        table.add_row(
            escape(_name(c)), lift_text(c.lift), set_text(c.lift), _p(c.p), _p(c.p_holm), _p(c.p_bh),
            style="bold" if c.lift.significant else None,
        )  # fmt: skip
    return table


def _others(found: list[Comparison]) -> Table:
    title = "the means, and other intervals of the lift for comparison"
    table = Table("", "control", "test", "delta", "log-delta", title=title, title_justify="left", box=SIMPLE_HEAD)
    for c in found:
        table.add_row(escape(_name(c)), _mean(c.control), _mean(c.test), _bounds(c.delta_pct), _bounds(c.log_delta_pct))
    return table


def _versions(claims: list[dict[str, Any]]) -> Table:
    title = "all versions read so far, adjusted together"
    table = Table("", "lift", "p", "p Holm", "p BH", title=title, title_justify="left", box=SIMPLE_HEAD)
    for c in claims:
        lift = "-" if c["lift_pct"] is None else f"{c['lift_pct']:+.3g} %"
        name = escape(f"{c['experiment']} {c['arm']} {c['metric']}")
        table.add_row(name, lift, _p(c["p"]), _p(c["p_holm"]), _p(c["p_bh"]))
    return table


def _name(c: Comparison) -> str:
    return f"{c.arm} {c.metric}" + (f" {c.segment}" if c.segment != "all" else "")


def _novelty(looks: list[Look]) -> Table:
    title = f"{escape(looks[0].arm)} {looks[0].metric} by day; looks are cumulative, |z| against O'Brien-Fleming"
    table = Table(
        "day", "on the day", "set", "so far", "z", "boundary", "", title=title, title_justify="left", box=SIMPLE_HEAD
    )
    for look in looks:
        z = "-" if look.z is None else f"{look.z:+.2f}"
        table.add_row(
            look.day, lift_text(look.on_day), set_text(look.on_day), lift_text(look.through), z,
            f"{look.boundary:.2f}", "crossed" if look.crossed else "",
        )  # fmt: skip
    return table


def _mean(e: Estimate) -> str:
    return "-" if e.mean is None else f"{e.mean:.4g}"


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.2g}"


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"[{bounds[0]:+.3g}, {bounds[1]:+.3g}]"
