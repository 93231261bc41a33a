"""The folded view of a text that the identifier rules read (Sec. 2.6, privacy rules).

People hide an address from a filter with zero-width characters, full-width letters, styled digits or combining strokes.
The rules therefore read a folded text; `Folded.source` maps every folded character back, so that a mask lands on the
text as it was written.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58"
_DOTS = "\u3002\u2024\uff61"
_BLANKS = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
# Beyond the basic plane: styled letters and digits, enclosed letters, and the invisible tag characters.
_RANGES = (
    (0, 0xD800), (0xE000, 0x10000), (0x1D400, 0x1D800), (0x1F100, 0x1F1E6), (0x1FBF0, 0x1FBFA), (0xE0000, 0xE01F0),
)  # fmt: skip


class Folded(NamedTuple):
    """A folded text and, for each of its characters, the index of the character it came from."""

    text: str
    source: IntArray | None

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The span [start, end) of the folded text, in the original text."""
        if self.source is None:
            return start, end
        return int(self.source[start]), int(self.source[end - 1]) + 1


def _fold_character(character: str) -> str:
    category = unicodedata.category(character)
    joined = "\u0300" <= character <= "\u036f" or "\ufe00" <= character <= "\ufe0f"
    if category in ("Cf", "Co", "Me") or character in _BLANKS or joined:
        return ""
    if category == "Cc":
        return character if character in "\t\n\r" else ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if character in _DASHES:
        return "-"
    if character in _DOTS:
        return "."
    return "".join(c for c in unicodedata.normalize("NFKC", character) if not "\u0300" <= c <= "\u036f")


@cache
def _tables() -> tuple[npt.NDArray[np.uint8], IntArray, npt.NDArray[np.uint32]]:
    lengths = np.ones(0x110000, np.uint8)
    starts = np.arange(0x110000, dtype=np.int64)
    pool = [np.arange(0x110000, dtype=np.uint32)]
    used = 0x110000
    for low, high in _RANGES:
        for code in range(low, high):
            folded = _fold_character(chr(code))
            if folded != chr(code):
                lengths[code] = len(folded)
                starts[code] = used
                pool.append(np.frombuffer(folded.encode("utf-32-le"), np.uint32))
                used += len(folded)
    return lengths, starts, np.concatenate(pool)


def fold(text: str) -> Folded:
    """The folded text with its map back; linear in the length of the text."""
    if text.isascii() and text.isprintable():
        return Folded(text, None)
    lengths, starts, pool = _tables()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    width = lengths[codes].astype(np.int64)
    ends = np.cumsum(width)
    source = np.repeat(np.arange(len(codes)), width)
    within = np.arange(len(source)) - (ends - width)[source]
    folded = pool[starts[codes][source] + within].tobytes().decode("utf-32-le", "surrogatepass")
    return Folded(folded, source)


def changed_characters() -> str:
    """An RE2 class of the characters that folding removes, or turns into an ASCII letter, digit, mark or blank.

    The emoji variation selector is left out: it stands in every other emoji and hides nothing beside one.
    """
    ranges: list[list[int]] = []
    for low, high in _RANGES:
        for code in range(max(low, 0x80), high):
            folded = _fold_character(chr(code))
            hides = folded != chr(code) and code != 0xFE0F and (not folded or any(" " <= c <= "~" for c in folded))
            if hides and ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            elif hides:
                ranges.append([code, code])
    body = "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in ranges)
    return f"(?-i:[{body}\\x{{0}}-\\x{{8}}\\x{{b}}\\x{{c}}\\x{{e}}-\\x{{1f}}])"
