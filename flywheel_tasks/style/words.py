"""Words, emoji and repetition over whole Arrow columns (Table 7: repetitive phrases, infinity loop).

A word is a run of letters, or two characters of a script that is written without spaces: about as much text.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{UNSPACED}]{{1,2}}|[\p{{L}}\p{{M}}\p{{N}}]+(?:['’ʼ-][\p{{L}}\p{{M}}\p{{N}}]+)*"
_ASCII_WORD = r"[A-Za-z0-9]+(?:['-][A-Za-z0-9]+)*"
_GAP = r"[^\p{L}\p{M}\p{N}'’ʼ]+"
_MIX = np.uint64(0x9E3779B97F4A7C15)
_GRAM = 3
_JOINER, _VARIATION, _KEYCAP = "\u200d", "\ufe0f", "\u20e3"


class Words(NamedTuple):
    """All words of a column as numbers (equal words, equal numbers), and the row each belongs to."""

    codes: IntArray
    rows: IntArray
    texts: int
    """How many texts the column has."""


def count(texts: pa.StringArray, pattern: str) -> IntArray:
    """How often `pattern` occurs in every text."""
    found: IntArray = pc.count_substring_regex(texts, pattern).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def matches(texts: pa.StringArray, pattern: str) -> BoolArray:
    """Whether `pattern` occurs in every text."""
    found: BoolArray = pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
    return found.astype(bool)


def word_count(texts: pa.StringArray) -> IntArray:
    """Words of every text."""
    ascii_only = pc.string_is_ascii(texts).to_numpy(zero_copy_only=False).astype(bool)
    if ascii_only.all():
        return count(texts, _ASCII_WORD)
    if not ascii_only.any():
        return count(texts, _WORD)
    # RE2 reads ASCII classes several times faster than Unicode ones, and most chat is ASCII.
    result = np.empty(len(texts), np.int64)
    for rows, pattern in ((np.flatnonzero(ascii_only), _ASCII_WORD), (np.flatnonzero(~ascii_only), _WORD)):
        result[rows] = count(texts.take(pa.array(rows)), pattern)
    return result


def emoji_count(texts: pa.StringArray) -> IntArray:
    """Emoji of every text as a reader sees them: a family, a flag or a keycap is one."""
    result = np.zeros(len(texts), np.int64)
    candidates = np.flatnonzero(~pc.string_is_ascii(texts).to_numpy(zero_copy_only=False).astype(bool))
    if len(candidates):
        result[candidates] = count(texts.take(pa.array(candidates)), emoji_pattern())
    return result


@cache
def emoji_pattern() -> str:
    """One emoji, in syntax that RE2 and Python's re share.

    A character that Unicode shows as text by default (©, ↔, ❤) is an emoji with a variation selector, and the
    pictographs U+2600–27BF among them without one too: people type ❤ and ☺ bare and mean the emoji.
    """
    from emoji import EMOJI_DATA, STATUS

    single = {e: data["status"] for e, data in EMOJI_DATA.items() if len(e) == 1}
    shown = {e for e, status in single.items() if status == STATUS["fully_qualified"] or "\u2600" <= e <= "\u27bf"}
    text = set(single) - shown
    modifier = "[\U0001f3fb-\U0001f3ff]"
    one = f"(?:{_set(shown)}{_VARIATION}?{modifier}?|{_set(text)}(?:{_VARIATION}{modifier}?|{modifier}))"
    loose = f"(?:{_set(shown | text)}{_VARIATION}?{modifier}?)"
    tags = "[\U000e0020-\U000e007f]+"
    flag = "[\U0001f1e6-\U0001f1ff]{2}"
    return f"(?:{flag}|[0-9#*]{_VARIATION}?{_KEYCAP}|\U0001f3f4{tags}|{one}(?:{_JOINER}{loose})*)"


def _set(characters: set[str]) -> str:
    """A character class of ranges."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in ranges) + "]"


def words(texts: pa.StringArray) -> Words:
    """The words of every text, in order, lower-cased."""
    lower = pc.utf8_lower(texts)
    if not pc.all(pc.string_is_ascii(lower), min_count=0).as_py():
        lower = pc.replace_substring_regex(lower, f"([{UNSPACED}])", r" \1 ")
    lists = pc.split_pattern_regex(lower, _GAP)
    flat, rows = lists.flatten(), pc.list_parent_indices(lists)
    keep = pc.not_equal(flat, "")
    flat, rows = flat.filter(keep), rows.filter(keep)
    codes = flat.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return Words(codes, rows.to_numpy(zero_copy_only=False).astype(np.int64), len(texts))


def repetition(found: Words, gram: int = _GRAM) -> FloatArray:
    """Share of a text's word sequences of length `gram` that occurred in it before; 0 for a text too short for two."""
    if len(found.codes) < gram:
        return np.zeros(found.texts)
    length = len(found.codes) - gram + 1
    inside = found.rows[:length] == found.rows[gram - 1 :]
    with np.errstate(over="ignore"):
        hashed = _mixed(found.rows[:length].astype(np.uint64))
        for offset in range(gram):
            hashed = _mixed(hashed ^ found.codes[offset : offset + length].astype(np.uint64))
    rows = found.rows[:length][inside]
    first = np.unique(hashed[inside], return_index=True)[1]
    total = np.bincount(rows, minlength=found.texts)
    distinct = np.bincount(rows[first], minlength=found.texts)
    return np.where(total > 1, 1 - distinct / np.maximum(total, 1), 0.0)


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A one-to-one scramble of 64 bits, so that small numbers that are combined don't meet."""
    values = (values + _MIX) * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(31)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(29))


def tail_repeats(symbols: list[int] | str, repeats: int, length: int) -> bool:
    """Whether a sequence ends in at least `repeats` copies of one part, together at least `length` long.

    The prefix function of the reversed sequence gives the shortest period of every suffix in linear time.
    """
    backwards = symbols[::-1]
    prefix = [0] * len(backwards)
    for at in range(1, len(backwards)):
        border = prefix[at - 1]
        while border and backwards[at] != backwards[border]:
            border = prefix[border - 1]
        border += backwards[at] == backwards[border]
        prefix[at] = border
        size = at + 1
        if size >= length and (size - border) * repeats <= size:
            return True
    return False


def loops(
    texts: pa.StringArray, found: Words, repeated: FloatArray, repeats: int, least_words: int, least_characters: int
) -> BoolArray:
    """Whether every text ends by repeating itself (Table 7, infinity loop); the cut-off last word may break the run.

    `repeated` is the texts' `repetition`: without any there is no loop of words.
    """
    result = np.zeros(found.texts, bool)
    sizes = np.bincount(found.rows, minlength=found.texts)
    ends = np.cumsum(sizes)
    suspects = (sizes >= least_words) & (repeated > 0)
    for row in np.flatnonzero(suspects):
        codes = found.codes[ends[row] - sizes[row] : ends[row]].tolist()
        result[row] = tail_repeats(codes, repeats, least_words) or tail_repeats(codes[:-1], repeats, least_words)
    letters = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    dense = (letters >= least_characters) & (letters > 12 * np.maximum(sizes, 1)) & ~result
    for row in np.flatnonzero(dense):
        tail = texts[int(row)].as_py()[-4 * least_characters :]
        result[row] = tail_repeats(tail, repeats, least_characters)
    return result
