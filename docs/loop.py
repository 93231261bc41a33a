"""The picture of the loop: docs/loop.svg, drawn from the one list of stages."""

from __future__ import annotations

from html import escape
from pathlib import Path

from flywheel_tasks.core.stage import PHASES
from flywheel_tasks.pipeline import STAGES

ABOUT = {
    "curation": ("Sec. 2.2.1", "#2166ac"),
    "annotation": ("Sec. 2.2.2", "#7b4fa3"),
    "preherding": ("Sec. 2.3, 2.4.1", "#1b7837"),
    "herding": ("Sec. 2.4.2, 2.4.3", "#b8600b"),
    "evaluation": ("Sec. 2.5.1, 3.1", "#b2182b"),
    "release": ("Sec. 2.5.2, 2.6", "#37474f"),
}
WIDTH, GAP, LEFT, TOP, STEP = 152, 14, 16, 64, 31
PEOPLE = {"annotation": "people judge", "evaluation": "HOLD: a person decides", "release": "7 days, two arms"}


def text(x: float, y: float, said: str, *, size: int = 13, fill: str = "#1f2933", more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" {more}>{escape(said)}</text>'


def column(number: int, phase: str) -> tuple[list[str], int]:
    """One phase: its name, its stages from top to bottom; and how many rows that takes."""
    section, colour = ABOUT[phase]
    x = LEFT + number * (WIDTH + GAP)
    names = [stage.name for stage in STAGES if stage.phase == phase]
    out = [
        f'<rect x="{x}" y="{TOP - 46}" width="{WIDTH}" height="40" rx="6" fill="{colour}"/>',
        text(x + 10, TOP - 29, phase, fill="#ffffff", more='font-weight="600"'),
        text(x + 10, TOP - 13, section, size=11, fill="#e8ecf1"),
    ]
    for row, name in enumerate(names):
        y = TOP + row * STEP
        out += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="25" rx="5" fill="#ffffff" stroke="{colour}"/>',
            text(x + 10, y + 17, name),
        ]
    if phase in PEOPLE:
        y = TOP + len(names) * STEP + 14
        out.append(text(x + 10, y, PEOPLE[phase], size=12, fill=colour, more='font-style="italic"'))
    return out, len(names) + (phase in PEOPLE)


def main() -> None:
    columns = [column(number, phase) for number, phase in enumerate(PHASES)]
    right = LEFT + len(PHASES) * (WIDTH + GAP) - GAP
    bottom = TOP + max(rows for _, rows in columns) * STEP
    low, height = bottom + 22, bottom + 52
    first, last = LEFT + WIDTH / 2, right - WIDTH / 2
    arrows = [
        f'<path d="M{LEFT + n * (WIDTH + GAP) - GAP + 1} {TOP - 26} l{GAP - 4} 0" stroke="#8a94a3" '
        'stroke-width="2" marker-end="url(#head)"/>'
        for n in range(1, len(PHASES))
    ]
    back = (
        f'<path d="M{last} {bottom - 4} V{low} H{first} V{bottom - 4}" fill="none" stroke="#8a94a3" '
        'stroke-width="2" marker-end="url(#head)"/>'
    )
    said = text((first + last) / 2, low + 20, "the champion talks with everybody for a week: the next cycle's traffic",
                size=12, fill="#52606d", more='text-anchor="middle"')  # fmt: skip
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + LEFT} {height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="The stages of a cycle, phase by phase">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 Z" fill="#8a94a3"/></marker></defs>',
        f'<rect width="{right + LEFT}" height="{height}" rx="10" fill="#f5f7fa"/>',
        *(line for lines, _ in columns for line in lines),
        *arrows,
        back,
        said,
        "</svg>",
    ]
    Path(__file__).with_name("loop.svg").write_text("\n".join(svg) + "\n")


if __name__ == "__main__":
    main()
