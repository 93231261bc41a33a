"""One repair per rule of the linter (Table 7, Sec. 3.5.6): pure functions from text to text.

A repair takes something away or breaks a line; no repair writes words. Whether it was enough is the linter's to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pyarrow as pa

from flywheel_tasks.style import markdown, rules
from flywheel_tasks.style.features import bracketed_translation
from flywheel_tasks.style.rules import Phrase
from flywheel_tasks.style.words import emoji_pattern

_ENDS_SENTENCE = ".!?…。！？।\n"
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)*_]*\s+(?=[^\s.!?…])|(?<=[。！？।])\s*(?=\S)")
_ITEM = re.compile(r"(?m)^([ \t]{0,6})(?:[-*+•‣▪–]|\d{1,3}[.)]|[a-hA-H][.)])[ \t]+(?=\S)")
_FREE_BEFORE, _FREE_AFTER = set(' \t\n,.!?…;:~—–*_"“”('), set(' \t\n,.!?…;:~—–*_"”')
# The marks behind an exclamation; a colon that begins an emoticon is none of them.
_CLOSING = re.compile(r"(?:[ \t]*(?:[,.!?…~—–]|[:;](?![-()DPpOo/|])))*")
_WRAPS = ("***", "**", "*", "_", '"')


def phrases(text: str) -> str:
    """The text without its over-used phrases, where they can go and leave a sentence behind."""
    for phrase in rules.load().repaired_phrases:
        pattern = _compiled(f"(?i){phrase.pattern}")
        at = 0
        while match := pattern.search(text, at):
            cut = _cut(text, match.start(), match.end(), phrase)
            if cut is None:
                at = match.end()
                continue
            start, end, then = cut
            text = text[:start] + then + text[end:]
            at = max(0, start - 1)
    return text.strip() if text.strip() else ""


def _cut(text: str, start: int, end: int, phrase: Phrase) -> tuple[int, int, str] | None:
    """What goes with a phrase: [start, end) and what takes its place; None where taking it would leave a hole."""
    for wrap in _WRAPS:
        if text[:start].endswith(wrap) and text[end:].startswith(wrap):
            start, end = start - len(wrap), end + len(wrap)
            break
    before, after = text[start - 1 : start], text[end : end + 1]
    if (before and before not in _FREE_BEFORE and not _is_emoji(before)) or (
        after and after not in _FREE_AFTER and not _is_emoji(after)
    ):
        return None
    head = text[:start].rstrip(" \t")
    opens = not head or head[-1] in _ENDS_SENTENCE or _is_emoji(head[-1])
    closing = _CLOSING.match(text, end)
    stop = closing.end() if closing else end
    mark, tail = text[end:stop], text[stop:]
    ends = not tail.strip() or any(c in _ENDS_SENTENCE for c in mark) or tail.startswith("\n")
    if opens:
        if phrase.repair == "sentence" and not ends:
            return None
        rest = re.match(r"[ \t]*", tail)
        stop += rest.end() if rest else 0
        return (start, stop + 1, text[stop].upper()) if _capital_due(text, start, stop) else (start, stop, "")
    if phrase.repair != "interjection":
        return None
    if before not in (" ", "\t", ","):
        return None
    # Inside a sentence the phrase goes with the comma before it; the mark behind it stays.
    return len(text[:start].rstrip(" \t,")), end, ""


def _capital_due(text: str, start: int, stop: int) -> bool:
    """Whether the removed opener carried the capital letter of its sentence."""
    following = text[stop : stop + 1]
    return following.isascii() and following.islower() and text[start : start + 1].isupper()


def _is_emoji(character: str) -> bool:
    return bool(re.match("[\ufe0f\u2600-\u27bf\U0001f1e6-\U0001faff]", character))


def emoji(text: str) -> str:
    """The text with its first emoji, as many as are allowed."""
    allowed = rules.load().limits.emoji
    pieces, end = [], 0
    for number, match in enumerate(_compiled(emoji_pattern()).finditer(text)):
        if number >= allowed:
            pieces.append(text[end : match.start()])
            end = match.end()
            if pieces[-1].endswith((" ", "\n")) and text[end : end + 1] in ("", " ", "\n", "!", ".", "?"):
                pieces[-1] = pieces[-1].removesuffix(" ")
    return ("".join(pieces) + text[end:]).strip(" ")


def lists(text: str) -> str:
    """The items as plain lines."""
    return _ITEM.sub(r"\1", text)


def wall(text: str) -> str:
    """A long stretch broken into paragraphs at ends of sentences; every word stays."""
    limits = rules.load().limits
    return "\n".join(_paragraphs(line, limits.block_words, limits.paragraph_words) for line in text.split("\n"))


def _paragraphs(line: str, most: int, aim: int) -> str:
    if _words(line) <= most:
        return line
    ends = [match.end() for match in _SENTENCE_END.finditer(line)]
    pieces, begin, size = [""], 0, 0
    for end in [*ends, len(line)]:
        sentence = line[begin:end]
        begin, length = end, _words(sentence)
        if size and size + length > aim:
            pieces[-1] = pieces[-1].rstrip(" \t")
            pieces.append("")
            size = 0
        pieces[-1] += sentence
        size += length
    return "\n\n".join(pieces)


def translation(text: str) -> str:
    """The text without a labelled translation, and without one in brackets inside a text of another script."""
    rule = rules.load().translation
    for pattern in (rule.labelled, rule.paragraph):
        text = _without(pattern, text)
    if bracketed_translation(pa.array([text], pa.string()))[0]:
        text = _without(rule.bracketed, text)
    return text.strip()


def _without(pattern: str, text: str) -> str:
    return _compiled(rf"(?i)[ \t]*(?:{pattern})").sub("", text)


def _words(text: str) -> int:
    return len(_WORDS.findall(text))


_CJK = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_CJK}]{{1,2}}|[^\W_{_CJK}]+")


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


REPAIRS: dict[str, Callable[[str], str]] = {
    "translation": translation,
    "overused_phrase": phrases,
    "emoji_excess": emoji,
    "list_excess": lists,
    "wall_of_text": wall,
    "broken_markdown": markdown.repair,
}
"""In the order they run: taking words out may leave a mark alone, so markdown comes last."""
