"""The forest plot: one line per arm and metric, drawn as the set it is (eq. 18)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flywheel_tasks.release.analysis import PRIMARY, Comparison
from flywheel_tasks.release.result import ReadoutResult

_WON, _LOST, _OPEN = "#1b7837", "#b2182b", "#4d4d4d"


def forest(result: ReadoutResult, path: Path) -> None:
    """Write the plot as PNG. A readout without lifts says why instead."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [*result.comparisons, *(c for c in result.segments if c.metric in PRIMARY)]
    figure = Figure(figsize=(9, 1.8 + 0.42 * max(len(rows), 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(
        f"{result.experiment}: lift over {result.control}, {result.window['first']} to {result.window['last']}",
        loc="left", fontsize=11, parse_math=False,
    )  # fmt: skip
    if not rows:
        axes.set_axis_off()
        text = f"{result.status}: " + "; ".join(result.problems)
        axes.text(0, 0.5, text, wrap=True, va="center", transform=axes.transAxes, parse_math=False)
        figure.savefig(path, dpi=120)
        return
    low, high = _range(rows)
    for y, c in enumerate(reversed(rows)):
        _line(axes, y, c, low, high)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(low, high)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    names = [f"{c.arm}  {c.metric}" + (f"  ({c.segment})" if c.segment != "all" else "") for c in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    axes.set_xlabel(f"lift in %, with Fieller's {100 * (1 - result.alpha):g} % set")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=120)


def _range(rows: list[Comparison]) -> tuple[float, float]:
    """The span of all finite ends and lifts, with zero and a margin."""
    ends = [0.0]
    for c in rows:
        ends += [e for e in c.lift.lift_pct_bounds or () if math.isfinite(e)]
        ends += [] if c.lift.lift_pct is None or not math.isfinite(c.lift.lift_pct) else [c.lift.lift_pct]
    margin = 0.35 * (max(ends) - min(ends)) or 1.0
    return min(ends) - 0.3 * margin, max(ends) + margin


def _line(axes: Any, y: int, c: Comparison, low: float, high: float) -> None:
    lift = c.lift
    positive = lift.lift_pct is not None and lift.lift_pct > 0
    colour = _OPEN if not lift.significant else _WON if positive else _LOST
    style = {"color": colour, "linewidth": 2.2, "solid_capstyle": "butt"}
    if lift.lift_pct_bounds is None:
        axes.text(0, y, f"  {lift}", va="center", fontsize=8, color=colour)
        return
    left, right = lift.lift_pct_bounds
    if lift.kind == "exclusive":
        if math.isfinite(left):
            axes.annotate("", (low, y), (left, y), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
        if math.isfinite(right):
            axes.annotate("", (high, y), (right, y), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
    elif lift.kind == "whole_line":
        axes.annotate("", (low, y), (high, y), arrowprops={"arrowstyle": "<->", "color": colour, "linestyle": ":"})
    else:
        axes.plot([left, right], [y, y], **style)
    if lift.lift_pct is not None and low <= lift.lift_pct <= high:
        axes.plot([lift.lift_pct], [y], "o", color=colour, markersize=5)
    label = str(lift) if lift.lift_pct is None else f"{lift.lift_pct:+.3g} %   {lift}"
    axes.text(high, y + 0.24, label, ha="right", va="center", fontsize=7.5, color=colour)
