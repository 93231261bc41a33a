"""What is printed for people: text that can't command their terminal, and tables that break between words."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

_SHORT = 16
"""A cell of at most so many characters, such as an interval, is broken only where nothing else makes room."""
_GAP = 2


def visible(text: str) -> str:
    """One line whatever was handed in: a newline, a terminal's escape code or a mark that turns the text around is
    shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(*parts: Any) -> None:
    """Print tables and lines of text to stdout."""
    from rich.console import Console

    _print(Console(highlight=False, soft_wrap=False), parts)


def say(*lines: str) -> None:
    """Print lines to stdout as they are, for people and for `grep`: the terminal itself breaks the long ones."""
    for text in lines:
        print(visible(text))


def text_of(parts: Iterable[Any], width: int) -> str:
    """The same as a plain text of that width."""
    from rich.console import Console

    into = io.StringIO()
    _print(Console(file=into, width=width, color_system=None, highlight=False), parts)
    return into.getvalue()


def line(text: str, style: str = "") -> Any:
    """A line of text that nobody outside can style or steer."""
    from rich.text import Text

    return Text(visible(text), style=style)


class Table:
    """Rows under a head. A cell is anything with a text, or a pair of one and its style."""

    def __init__(self, head: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "") -> None:
        self.head, self.title = [visible(name) for name in head], visible(title)
        self.rows = [[_cell(cell) for cell in row] for row in rows]

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as Drawn
        from rich.text import Text

        columns = list(zip(self.head, *([text for text, _ in row] for row in self.rows), strict=True))
        widths = fitted(columns, options.max_width - _GAP * (len(self.head) - 1))
        drawn = Drawn(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        for name, width in zip(self.head, widths, strict=True):
            drawn.add_column(name, width=width, overflow="fold")
        for row in self.rows:
            drawn.add_row(*(Text(text, style=style) for text, style in row))
        if self.title:
            yield Text(self.title, style="italic")
        yield drawn


def fitted(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths that add up to at most `room`: columns narrow between words first, the one that has most to spare first;
    inside a word only where all words together are too wide."""
    most = [max(map(len, cells)) for cells in columns]
    words = [max(map(_longest_word, cells)) for cells in columns]
    short = [whole if whole <= _SHORT else word for whole, word in zip(most, words, strict=True)]
    widths = next((least[:] for least in (most, short, words) if sum(least) <= room), words[:])
    while sum(widths) > max(room, len(widths)):
        widths[widths.index(max(widths))] -= 1
    while sum(widths) < room and widths != most:
        wants = [whole / max(1, width) for whole, width in zip(most, widths, strict=True)]
        widths[wants.index(max(wants))] += 1
    return [max(1, width) for width in widths]


def _longest_word(cell: str) -> int:
    indent = len(cell) - len(cell.lstrip())
    return indent + max(map(len, cell.split() or [""]))


def _print(console: Any, parts: Iterable[Any]) -> None:
    before: Any = ""
    for part in parts:
        if isinstance(part, Table) or isinstance(before, Table):
            console.print()
        console.print(line(part) if isinstance(part, str) else part)
        before = part


def _cell(cell: Any) -> tuple[str, str]:
    text, style = cell if isinstance(cell, tuple) else (cell, "")
    return visible(f"{text:,}" if type(text) is int else str(text)), style
