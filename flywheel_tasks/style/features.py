"""Artifact features (Sec. 2.4.4): functions of (history, response) that return a binary indicator or a real number.

One registry for pairs, rejection sampling, the monitor and the metrics of Table 4. Every feature reads a whole Arrow
column; NaN says that it does not apply to a row (no language known, say). Add a feature by adding a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.style import markdown, rules, words
from flywheel_tasks.style.words import BoolArray, FloatArray, IntArray, count, emoji_count, matches, word_count

__all__ = ["FEATURES", "Exchange", "Feature", "chunks", "emoji_count", "history_exchange", "list_items",
           "markdown_count", "measure", "word_count"]  # fmt: skip

_LIST_ITEM = r"(?m)^[ \t]{0,6}(?:[-*+•‣▪–]|\d{1,3}[.)]|[a-hA-H][.)])[ \t]+\S"
_MARKS = (
    r"(?m)^[ \t]{0,3}#{1,6}[ \t]+\S", r"\*\*[^\s*][^*\n]*\*\*|__[^\s_][^_\n]*__", r"`[^`\n]+`",
    r"(?m)^[ \t]{0,3}(?:```|~~~)",
    r"\[[^\]\n]+\]\([^)\s]+\)", r"(?m)^[ \t]{0,3}>[ \t]", r"(?m)^[ \t]*\|.*\|[ \t]*$",
)  # fmt: skip
_ASKS_BACK = r"[?？؟][\s\"'”’)*_\]»\x{fe0f}\x{200d}\x{1f000}-\x{1faff}\x{2600}-\x{27bf}]*$"
_NON_LATIN = (
    r"[\p{Devanagari}\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Arabic}\p{Cyrillic}\p{Greek}\p{Hebrew}\p{Thai}"
    r"\p{Bengali}\p{Tamil}\p{Telugu}\p{Gujarati}\p{Kannada}\p{Malayalam}\p{Gurmukhi}]"
)


@dataclass(frozen=True)
class Exchange:
    """Responses, what was said before each, and (where known) the language of each and the one the user writes in."""

    response: pa.StringArray
    history: pa.ListArray | pa.ChunkedArray | None = None
    language: pa.StringArray | None = None
    wanted: pa.StringArray | None = None

    def __post_init__(self) -> None:
        for name in ("response", "history", "language", "wanted"):
            column = getattr(self, name)
            if isinstance(column, pa.ChunkedArray) and name != "history":
                object.__setattr__(self, name, column.combine_chunks())
            if column is not None and len(column) != len(self.response):
                raise InputError(f"{len(self.response)} responses, but {len(column)} rows of '{name}'")
        object.__setattr__(self, "response", pc.fill_null(self.response.cast(pa.string()), ""))

    def parts(self) -> Iterator[Exchange]:
        """The exchange by the chunks of its history: joined, those of a week can pass what Arrow addresses."""
        if not isinstance(self.history, pa.ChunkedArray):
            yield self
            return
        start = 0
        for chunk in chunks(self.history):
            tags = (tag if tag is None else tag.slice(start, len(chunk)) for tag in (self.language, self.wanted))
            yield Exchange(self.response.slice(start, len(chunk)), chunk, *tags)
            start += len(chunk)

    @cached_property
    def words(self) -> words.Words:
        return words.words(self.response)

    @cached_property
    def word_counts(self) -> IntArray:
        return word_count(self.response)

    @cached_property
    def emoji(self) -> IntArray:
        return emoji_count(self.response)

    @cached_property
    def list_items(self) -> IntArray:
        return list_items(self.response)

    @cached_property
    def markdown(self) -> IntArray:
        return markdown_count(self.response)

    @cached_property
    def longest_block(self) -> IntArray:
        return longest_block(self.response)

    @cached_property
    def repetition(self) -> FloatArray:
        return words.repetition(self.words)


class Feature(NamedTuple):
    """A named function of an exchange; binary ones are compared by prevalence, real ones by distribution."""

    name: str
    kind: Literal["binary", "real"]
    of: Callable[[Exchange], FloatArray | IntArray | BoolArray]


def list_items(texts: pa.StringArray) -> IntArray:
    """Lines that begin with a bullet or a number."""
    return count(texts, _LIST_ITEM)


def markdown_count(texts: pa.StringArray) -> IntArray:
    """Headings, bold runs, code, links, quotations and table rows; a single pair of stars is acting, not formatting."""
    return np.sum([count(texts, mark) for mark in _MARKS], axis=0, dtype=np.int64)


def longest_block(texts: pa.StringArray) -> IntArray:
    """Words of the longest stretch without a line break."""
    long = np.zeros(len(texts), np.int64)
    if not len(texts):
        return long
    blocks = pc.split_pattern(texts, "\n")
    np.maximum.at(long, pc.list_parent_indices(blocks).to_numpy(zero_copy_only=False), word_count(blocks.flatten()))
    return long


def translated(texts: pa.StringArray) -> BoolArray:
    """A labelled translation, or one in brackets (Table 7)."""
    rule = rules.load().translation
    labelled = matches(texts, f"(?i)(?:{rule.labelled})") | matches(texts, f"(?i)(?:{rule.paragraph})")
    return labelled | bracketed_translation(texts)


def bracketed_translation(texts: pa.StringArray) -> BoolArray:
    """Latin words in brackets inside a text of another script."""
    pattern = rules.load().translation.bracketed
    found = matches(texts, pattern)
    if len(rows := np.flatnonzero(found)):
        outside = pc.replace_substring_regex(texts.take(pa.array(rows)), pattern, "")
        found[rows] = count(outside, _NON_LATIN) > count(outside, r"\p{Latin}")
    return found


def asked_for_translation(history: pa.ListArray) -> BoolArray:
    """Whether the last user turn speaks of translating or of what something means."""
    return matches(last_user_turn(history), f"(?i)(?:{rules.load().translation.asked})")


def chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    """The pieces that a column is made of, at least one."""
    if not isinstance(column, pa.ChunkedArray):
        return [column]
    return column.chunks or [column.combine_chunks()]


def last_user_turn(history: pa.ListArray) -> pa.StringArray:
    """The content of the last user turn of every history, or an empty text."""
    said = _turns(history)
    result = np.full(len(history), -1, np.int64)
    asked = np.flatnonzero(said.user)
    np.maximum.at(result, said.rows[asked], asked)
    return pc.fill_null(said.content.take(pa.array(result, mask=result < 0)), "")


def history_exchange(history: pa.ListArray, language: pa.StringArray | None = None) -> tuple[Exchange, IntArray]:
    """The assistant turns of every history as responses of their own, and the row each came from (Sec. 3.5.6)."""
    said = _turns(history)
    own = np.flatnonzero(~said.user)
    rows = said.rows[own]
    wanted = None if language is None else language.take(pa.array(rows))
    return Exchange(said.content.take(pa.array(own)), wanted=wanted), rows


class _Turns(NamedTuple):
    content: pa.StringArray
    user: BoolArray
    rows: IntArray


def _turns(history: pa.ListArray | pa.ChunkedArray) -> _Turns:
    if isinstance(history, pa.ChunkedArray):
        history = history.combine_chunks()
    flat = history.flatten()
    user = pc.equal(pc.struct_field(flat, "role"), "user").to_numpy(zero_copy_only=False).astype(bool)
    rows = pc.list_parent_indices(history).to_numpy(zero_copy_only=False).astype(np.int64)
    return _Turns(pc.fill_null(pc.struct_field(flat, "content"), ""), user, rows)


def same_language(response: str, wanted: str) -> bool:
    """Tags agree in language, and in script where either names one: hi-Latn is answered in hi-Latn, pt-BR in pt."""
    a, b = response.split("-"), wanted.split("-")
    script_a, script_b = (next((part for part in tag[1:] if len(part) == 4), "") for tag in (a, b))
    return a[0].lower() == b[0].lower() and script_a.lower() == script_b.lower()


def _language_mismatch(exchange: Exchange) -> FloatArray:
    result = np.full(len(exchange.response), np.nan)
    if exchange.language is None or exchange.wanted is None:
        return result
    for row, (found, wanted) in enumerate(zip(exchange.language.to_pylist(), exchange.wanted.to_pylist(), strict=True)):
        if found and wanted and "und" not in (found, wanted):
            result[row] = not same_language(found, wanted)
    return result


def _unrequested_translation(exchange: Exchange) -> BoolArray:
    found = translated(exchange.response)
    return found if exchange.history is None else found & ~asked_for_translation(exchange.history)


def _repetitive(exchange: Exchange) -> BoolArray:
    limits = rules.load().limits
    return (exchange.repetition >= limits.repetition) & (exchange.word_counts >= limits.repetition_words)


def _loop(exchange: Exchange) -> BoolArray:
    limits = rules.load().limits
    sizes = limits.loop_repeats, limits.loop_words, limits.loop_characters
    return words.loops(exchange.response, exchange.words, exchange.repetition, *sizes)


def _pattern(*patterns: str) -> Callable[[Exchange], BoolArray]:
    joined = rules.any_of(patterns)
    return lambda exchange: matches(exchange.response, joined)


def _registry() -> dict[str, Feature]:
    known = rules.load()
    limits = known.limits
    features = (
        Feature("words", "real", lambda e: e.word_counts),
        Feature("emoji", "real", lambda e: e.emoji),
        Feature("has_emoji", "binary", lambda e: e.emoji > 0),
        Feature("emoji_excess", "binary", lambda e: e.emoji > limits.emoji),
        Feature("list_items", "real", lambda e: e.list_items),
        Feature("has_list", "binary", lambda e: e.list_items > 1),
        Feature("list_excess", "binary", lambda e: e.list_items > limits.list_items),
        Feature("markdown", "real", lambda e: e.markdown),
        Feature("has_markdown", "binary", lambda e: (e.markdown > 0) | (e.list_items > 1)),
        Feature("broken_markdown", "binary", lambda e: markdown.broken_rows(e.response)),
        Feature("longest_block", "real", lambda e: e.longest_block),
        Feature("wall_of_text", "binary", lambda e: e.longest_block > limits.block_words),
        Feature("exclamations", "real", lambda e: count(e.response, "[!！]")),
        Feature("questions", "real", lambda e: count(e.response, "[?？؟]")),
        Feature("asks_back", "binary", lambda e: matches(e.response, _ASKS_BACK)),
        Feature("empty", "binary", lambda e: e.word_counts + e.emoji == 0),
        Feature("overused_phrase", "binary", _pattern(*(p.pattern for p in known.repaired_phrases))),
        *(Feature(f"phrase:{phrase.name}", "binary", _pattern(phrase.pattern)) for phrase in known.phrases),
        Feature("templated", "binary", _pattern(*known.templates)),
        Feature("templated_refusal", "binary", _pattern(*known.refusals)),
        Feature("repetition", "real", lambda e: e.repetition),
        Feature("repetitive", "binary", _repetitive),
        Feature("infinity_loop", "binary", _loop),
        Feature("language_mismatch", "binary", _language_mismatch),
        Feature("translation", "binary", _unrequested_translation),
    )
    return {feature.name: feature for feature in features}


FEATURES: dict[str, Feature] = _registry()


def measure(exchange: Exchange, names: Iterable[str] | None = None) -> dict[str, FloatArray]:
    """The named features (all without names) of every row."""
    wanted = list(FEATURES if names is None else names)
    if unknown := sorted(set(wanted) - set(FEATURES)):
        raise InputError(f"no style feature '{unknown[0]}': the features are {', '.join(FEATURES)}")
    found = [[np.asarray(FEATURES[name].of(part), dtype=np.float64) for name in wanted] for part in exchange.parts()]
    return {name: np.concatenate(values) for name, values in zip(wanted, zip(*found, strict=True), strict=True)}
