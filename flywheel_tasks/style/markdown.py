"""Broken and unclosed markdown (Table 7: "37% unclosed or broken formatting"): where it is, and the text without it.

A CommonMark parser decides. A mark is broken when the parser leaves it as literal text although it stands where only an
opener or only a closer can: against a word on one side. `5 * 3`, `f*ck`, `^_^` and the stars in code are none.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.style.words import BoolArray, matches

_KISS = re.compile(r"[:;=]-?$")
_CANDIDATE = r"[*_`]|~~~"
_BEFORE = r"(?m)(^|[ \t(\"“])"
_LETTER = r"[\p{L}\p{N}]"
_INSIDE = r"[^*_`\\\n]*"
# A text whose only marks are pairs of a pure opener and a pure closer is well-formed; RE2 sees that far faster.
_WELL_FORMED = tuple(
    rf"{_BEFORE}{mark}{_LETTER}(?:{_INSIDE}{end}"
    for mark in (r"\*\*", r"\*")
    for end in (rf"{_LETTER})?{mark}([ \t.,!?;:)\"”]|$)", rf"[.!?…~,]){mark}([ \t]|$)")
)
_ROUNDS = 8


class Break(NamedTuple):
    """One broken mark: [start, end) of the text, and its kind."""

    start: int
    end: int
    kind: str


def broken_rows(texts: pa.StringArray) -> BoolArray:
    """Whether every text has broken markdown."""
    result = np.zeros(len(texts), bool)
    candidates = np.flatnonzero(matches(texts, _CANDIDATE))
    left = texts.take(pa.array(candidates))
    risky = matches(left, r"[\\`\[<]|~~~|\t|(?m)^ {4}")
    for pattern in _WELL_FORMED * 2:  # neighbours share the character between them
        left = pc.replace_substring_regex(left, pattern, r"\1x\2")
    doubtful = candidates[matches(left, r"[*_]") | risky]
    for row in doubtful:
        result[row] = bool(breaks(texts[int(row)].as_py()))
    return result


def breaks(text: str) -> list[Break]:
    """Every broken mark of a text, in order."""
    found: list[Break] = []
    plain = _same_length(text)
    lines = plain.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    for token in _parser().parse(plain):
        if token.type == "fence" and not _closed(token, lines):
            found.append(_unclosed(token, lines, starts))
        if token.type == "inline" and token.map:
            found += _in_line(token, lines, starts)
    return sorted(found)


def repair(text: str) -> str:
    """The text without its broken marks: a fence is closed, any other mark is removed, no word is touched.

    Removing one mark may set free another, so it looks again; a text that is still broken after some rounds comes back
    as it was left, and whoever asked must look.
    """
    for _ in range(_ROUNDS):
        found = breaks(text)
        if not found:
            break
        for broken in reversed(found):
            closing = broken.kind if broken.start == broken.end else ""
            text = text[: broken.start] + closing + text[broken.end :]
    return text


def _same_length(text: str) -> str:
    """What the parser would replace by something of another length, or by a line end, does not move a position."""
    return re.sub(r"[\r\x00]", " ", text)


def _closed(token: Any, lines: list[str]) -> bool:
    last = lines[token.map[1] - 1].strip(" >") if token.map[1] - token.map[0] > 1 else ""
    return bool(re.fullmatch(re.escape(token.markup[0]) + f"{{{len(token.markup)},}}", last.strip()))


def _unclosed(token: Any, lines: list[str], starts: list[int]) -> Break:
    """A fence is closed at the end of the text; inside a quotation or a list, where it has no end, its start goes."""
    first = token.map[0]
    if lines[first].startswith(token.markup):
        end = starts[-1] - 1
        return Break(end, end, ("" if not lines[-1] else "\n") + token.markup)
    start = starts[first] + max(lines[first].find(token.markup), 0)
    return Break(start, start + len(token.markup), token.markup)


def _in_line(token: Any, lines: list[str], starts: list[int]) -> list[Break]:
    """The literal marks of one inline block, mapped back to the text line by line."""
    begin = token.map[0]
    offsets = []
    line = begin
    for content in token.content.split("\n"):
        while line < len(lines) - 1 and content not in lines[line]:
            line += 1
        column = lines[line].rfind(content) if content else len(lines[line])
        offsets.append(starts[line] + max(column, 0))
        line += 1
    found = []
    # A mark that found its partner is no text any more, or text without content.
    literal = (child for child in token.children or () if child.type == "text" and child.content)
    for child in literal:
        for at, mark in child.meta.get("marks", ()):
            row = token.content.count("\n", 0, at)
            column = at - (token.content.rfind("\n", 0, at) + 1)
            start = offsets[row] + column
            found.append(Break(start, start + len(mark), mark))
    return found


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False})
    parser.inline.ruler.at("emphasis", _emphasis)
    parser.inline.ruler.at("backticks", _backticks)
    parser.inline.ruler2.disable("fragments_join")
    parser.core.ruler.disable("text_join")
    return parser


def _emphasis(state: Any, silent: bool) -> bool:
    """The parser's own rule, which also remembers where each star or underscore stands that is one-sided."""
    from markdown_it.rules_inline import emphasis

    start, known = state.pos, len(state.delimiters)
    if not emphasis.tokenize(state, silent):
        return False
    before = state.src[max(0, start - 2) : start]
    for index, delimiter in enumerate(state.delimiters[known:]):
        if delimiter.open != delimiter.close and not (delimiter.close and _KISS.search(before)):
            state.tokens[delimiter.token].meta = {"marks": [(start + index, state.src[start + index])]}
    return True


def _backticks(state: Any, silent: bool) -> bool:
    """The parser's own rule; a run of backticks without its partner stays literal, which is broken beside a word."""
    from markdown_it.rules_inline import backtick

    start, pending = state.pos, len(state.pending)
    if not backtick(state, silent):
        return False
    if not silent and len(state.pending) > pending:
        run = state.src[start : state.pos]
        before, after = state.src[start - 1 : start], state.src[state.pos : state.pos + 1]
        if before.strip() == "" or after.strip() == "":
            state.pending = state.pending[:pending]
            token = state.push("text", "", 0)
            token.content, token.meta = run, {"marks": [(start, run)]}
    return True
