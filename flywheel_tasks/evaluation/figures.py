"""The figures of a report: win-rates and their gate's lines, the three panels of Figure 8, the twelve of Figure 10."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from flywheel_tasks.evaluation.gate_view import plain
from flywheel_tasks.evaluation.history import CHARACTERISTICS, COMPARISON, Number, Row, Version

GOOD, BAD, OPEN, INK, SOFT = "#1b7837", "#b2182b", "#6b7280", "#1c2430", "#8a94a3"
COLOURS = {"pointwise_internal": "#2166ac", "pointwise_user": "#d9730d", "pairwise_user": "#7b3294"}
REWARD = tuple(row for row in COMPARISON if row.name in COLOURS)
MARK = "†"
"""Stands beside a number that may be looked at but not decide."""
LINES = (("ideal", SOFT, ":"), ("hold", "#b26a00", "--"), ("block", BAD, "-"))
DOUBTFUL, TOO_GOOD = {"color": "#f6b26b", "alpha": 0.25}, {"color": "#e06666", "alpha": 0.22}


def lines(version: Version) -> tuple[float, float, float]:
    """Where its gate drew the ideal, the hold and the block line."""
    return version.win_rate_ideal, version.win_rate.hold, version.win_rate.block


def labels(version: Version) -> dict[float, tuple[str, str]]:
    """Text and colour by place; the graver of two lines that coincide."""
    named = zip(LINES, lines(version), strict=True)
    return {at: (f"{name} {100 * at:.3g} %", colour) for (name, colour, _), at in named if at <= 1}


def band(version: Version) -> bytes:
    """This version's win-rates with their intervals, against the lines of its gate."""
    figure, panels = _canvas(1, 1, (9.6, 2.6))
    axes = panels[0]
    rows = [row for row in reversed(REWARD) if row.name in version.numbers]
    ends = [0.45, *labels(version)]
    _, hold, block = lines(version)
    axes.axvspan(hold, block, linewidth=0, **DOUBTFUL)
    axes.axvspan(block, max(block, 1), linewidth=0, **TOO_GOOD)
    for y, row in enumerate(rows):
        number = version.numbers[row.name]
        _interval(axes, number, y, COLOURS[row.name])
        ends += [x for x in (number.value, number.low, number.high) if x is not None]
        axes.text(number.value, y + 0.22, f"{100 * number.value:.1f} %", ha="center", fontsize=9, color=INK)
    axes.axvline(0.5, color=SOFT, linewidth=0.8)
    for (_, colour, style), at in zip(LINES, lines(version), strict=True):
        axes.axvline(at, color=colour, linewidth=1.2, linestyle=style)
    for at, (label, colour) in labels(version).items():
        axes.text(at, 1.02, label, fontsize=8, color=colour, ha="center", transform=axes.get_xaxis_transform())
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(-0.6, max(len(rows) - 0.4, 0.6))
    axes.set_xlim(max(min(ends) - 0.02, 0), min(max(ends) + 0.05, 1))
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    if not rows:
        _nothing(axes, "no win-rate was measured")
    return _png(figure)


def figure_8(versions: Sequence[Version]) -> bytes:
    """Lifts of the A/B tests, reward-model win-rates with their limits, and cumulative growth of engagement."""
    figure, panels = _canvas(3, 1, (10.5, 9.6))
    names = [plain(v.name)[:16] for v in versions]
    _lifts(panels[0], versions)
    _win_rates(panels[1], versions)
    _growth(panels[2], versions)
    short = max(map(len, names), default=0) < 5
    for axes in panels:
        angle = {"rotation": 0, "ha": "center"} if short else {"rotation": 35, "ha": "right"}
        axes.set_xticks(range(len(names)), names, parse_math=False, **angle)
        axes.set_xlim(-0.6, max(len(names) - 0.4, 0.6))
    return _png(figure)


def figure_10(versions: Sequence[Version]) -> bytes:
    """Twelve response characteristics over the versions, each with its relative change from the first to the last,
    which has a colour where every number of it may decide."""
    figure, panels = _canvas(4, 3, (10.8, 10.2))
    names = [plain(v.name)[:16] for v in versions]
    step = max(1, len(names) // 8)
    for axes, row in zip(panels, CHARACTERISTICS, strict=True):
        _trend(axes, row, versions)
        axes.set_xticks(
            range(0, len(names), step), names[::step], fontsize=7, rotation=30, ha="right", parse_math=False
        )
        axes.set_xlim(-0.6, max(len(names) - 0.4, 0.6))
    return _png(figure)


def growth(versions: Sequence[Version], name: str) -> tuple[list[int], list[float]]:
    """The product of the lifts of released versions: where each stands, and the level it reached."""
    at, levels = list[int](), list[float]()
    for x, v in enumerate(versions):
        if v.released and name in v.numbers:
            levels.append((levels[-1] if levels else 1.0) * (1 + v.numbers[name].value / 100))
            at.append(x)
    return at, levels


def _lifts(axes: Any, versions: Sequence[Version]) -> None:
    levels = {v.lift_level for v in versions if v.lift_level}
    level = f" {100 * levels.pop():.3g} %" if len(levels) == 1 else ""
    title = f"A/B lift over the baseline, with Fieller's{level} set"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    drawn = False
    for shift, marker, name in ((-0.13, "o", "breadth"), (0.13, "s", "depth")):
        axes.plot([], [], marker, color=INK, label=name)
        for x, v in enumerate(versions):
            if number := v.numbers.get(name):
                colour = _significance(number)
                if number.low is not None and number.high is not None:
                    axes.plot([x + shift] * 2, [number.low, number.high], color=colour, linewidth=1.6)
                axes.plot([x + shift], [number.value], marker, color=colour, markersize=6)
                drawn = True
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_ylabel("%")
    _legend(axes)
    if not drawn:
        _nothing(axes, "no A/B test has closed yet")


def _legend(axes: Any) -> None:
    """In a line above the panel, where no number can be."""
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1, ncols=3)


def _win_rates(axes: Any, versions: Sequence[Version]) -> None:
    axes.set_title("Reward-model win-rate against the champion", loc="left", fontsize=11, fontweight="bold")
    _lines_of_each(axes, versions)
    ends, drawn = [0.45, *(at for v in versions for at in labels(v))], False
    for row in REWARD:
        points = [(x, v.numbers[row.name]) for x, v in enumerate(versions) if row.name in v.numbers]
        if points:
            axes.plot(
                [x for x, _ in points],
                [n.value for _, n in points],
                "o-",
                color=COLOURS[row.name],
                label=row.label.replace(" win rate", ""),
                markersize=5,
                linewidth=1.4,
            )
            drawn = True
        for x, n in points:
            ends.append(n.value)
            if n.low is not None and n.high is not None:
                axes.plot([x, x], [n.low, n.high], color=COLOURS[row.name], linewidth=1.0, alpha=0.6)
                ends += [n.low, n.high]
    axes.axhline(0.5, color=SOFT, linewidth=0.8)
    for at, (label, colour) in labels(versions[-1]).items():
        axes.text(1.005, at, label, color=colour, fontsize=8, va="center", transform=axes.get_yaxis_transform())
    axes.set_ylim(min(ends) - 0.02, min(max(ends) + 0.03, 1))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    if drawn:
        _legend(axes)
    else:
        _nothing(axes, "no win-rate was measured")


def _lines_of_each(axes: Any, versions: Sequence[Version]) -> None:
    """Each version between the lines that its own gate judged by: a team may move them."""
    edges = [-0.6, *(x - 0.5 for x in range(1, len(versions))), max(len(versions) - 0.4, 0.6)]
    ideal, hold, block = zip(*map(lines, versions), strict=True)
    axes.stairs(block, edges, baseline=hold, fill=True, linewidth=0, **DOUBTFUL)
    axes.stairs([max(at, 1) for at in block], edges, baseline=block, fill=True, linewidth=0, **TOO_GOOD)
    for (_, colour, style), places in zip(LINES, (ideal, hold, block), strict=True):
        axes.stairs(places, edges, baseline=None, color=colour, linewidth=1.1, linestyle=style)


def _growth(axes: Any, versions: Sequence[Version]) -> None:
    axes.set_title(
        "Cumulative engagement of released versions (first baseline = 1)", loc="left", fontsize=11, fontweight="bold"
    )
    drawn = False
    for name, colour in (("breadth", "#1b7837"), ("depth", "#4d4d4d")):
        at, levels = growth(versions, name)
        if at:
            axes.plot(at, levels, "o-", color=colour, label=name, markersize=5, linewidth=1.6)
            drawn = True
    axes.axhline(1, color=SOFT, linewidth=0.8)
    if drawn:
        _legend(axes)
    else:
        _nothing(axes, "no version has been released after an A/B test")


def _trend(axes: Any, row: Row, versions: Sequence[Version]) -> None:
    points = [(x, v.numbers[row.name]) for x, v in enumerate(versions) if row.name in v.numbers]
    unproven = any(n.why for _, n in points)
    axes.set_title(f"{row.label} {MARK}" if unproven else row.label, loc="left", fontsize=9.5)
    if not points:
        _nothing(axes, "not measured")
        return
    scale = 100 if row.unit == "share" else 1
    ys = [scale * n.value for _, n in points]
    for x, n in points:
        if n.low is not None and n.high is not None:
            axes.plot([x, x], [scale * n.low, scale * n.high], color="#2166ac", linewidth=1, alpha=0.5)
    axes.plot([x for x, _ in points], ys, "o-", color="#2166ac", markersize=3.5, linewidth=1.4)
    axes.set_ylabel("%" if row.unit == "share" else row.unit, fontsize=8)
    if len(ys) > 1 and ys[0]:
        change = 100 * (ys[-1] / ys[0] - 1)
        better = None if unproven or not row.good else (change > 0) == (row.good == "up")
        colour = OPEN if better is None or abs(change) < 0.05 else GOOD if better else BAD
        axes.set_title(f"{change:+.1f} %", loc="right", fontsize=9.5, color=colour)


def _significance(number: Number) -> str:
    if number.low is None or number.high is None or number.low <= 0 <= number.high:
        return OPEN
    return GOOD if number.low > 0 else BAD


def _interval(axes: Any, number: Number, y: float, colour: str) -> None:
    if number.low is not None and number.high is not None:
        axes.plot([number.low, number.high], [y, y], color=colour, linewidth=2.4, solid_capstyle="butt")
    axes.plot([number.value], [y], "o", color=colour, markersize=7)


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=SOFT, fontsize=9)
    axes.set_yticks([])


def _canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e9ecf1", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5, length=3)
    return figure, panels


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, metadata={"Software": None})
    return out.getvalue()
