"""Sec. 2.4.4: every feature against hand-labelled texts, against a reference, and over whole columns as one by one."""

from __future__ import annotations

import time
from pathlib import Path

import emoji
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.style import features, words
from flywheel_tasks.style.features import FEATURES, Exchange, history_exchange, measure
from tests.style.texts import TEXTS, chat

TURNS = pa.list_(schemas.TURN)


def one(
    name: str, text: str, asked: str | None = None, language: str | None = None, wanted: str | None = None
) -> float:
    history = None if asked is None else pa.array([[{"role": "user", "content": asked}]], TURNS)
    tags = (pa.array([tag], pa.string()) for tag in (language, wanted))
    return float(measure(Exchange(pa.array([text]), history, *tags), [name])[name][0])


LOOP = "I will never let you go, my love. "
LABELLED = [
    ("words", "Don't stop me now", 4),
    ("words", "", 0),
    ("words", "你好世界", 2),
    ("words", "नमस्ते दोस्त", 2),
    ("emoji", "hi 😀😀 ❤️ 👨‍👩‍👧 🇮🇳 1️⃣", 6),
    ("emoji", "© 2024 ™ 5 # *", 0),
    ("emoji", "I ❤ you ☺", 2),
    ("has_list", "Buy:\n- milk\n- eggs", 1),
    ("has_list", "1. one\n2. two", 1),
    ("has_list", "• one\n• two", 1),
    ("has_list", "I have 2. Do you?", 0),
    ("has_list", "- a single dash line", 0),
    ("has_list", "*smiles* hi\n*waves*", 0),
    ("has_markdown", "# Title", 1),
    ("has_markdown", "**bold** word", 1),
    ("has_markdown", "*smiles* hi", 0),
    ("wall_of_text", "word " * 111, 1),
    ("wall_of_text", "word " * 109, 0),
    ("wall_of_text", ("word " * 60 + "\n") * 4, 0),
    ("wall_of_text", "你好" * 111, 1),
    ("exclamations", "Hey! You! There！", 3),
    ("asks_back", "Fine. And you?", 1),
    ("asks_back", "And you? 😀", 1),
    ("asks_back", "你呢？", 1),
    ("asks_back", "What? No.", 0),
    ("asks_back", '*tilts head* "Really?"', 1),
    ("phrase:omg", "OMG that's wild", 1),
    ("phrase:omg", "Omgosh", 0),
    ("phrase:lol", "LOL!", 1),
    ("phrase:lol", "lollipop", 0),
    ("phrase:mind_blown", "My mind is blown", 1),
    ("phrase:i_feel_like", "I feel like dancing", 1),
    ("templated", "As an AI language model, I have no body.", 1),
    ("templated", "How can I help you today?", 1),
    ("templated", "My dog ate the sofa again.", 0),
    ("templated", "Como una inteligencia artificial, no duermo.", 1),
    ("templated_refusal", "I’m sorry, but I can’t assist with that.", 1),
    ("templated_refusal", "Lo siento, no puedo ayudarte.", 1),
    ("templated_refusal", "Maaf kijiye, main is baare mein madad nahi kar sakta", 1),
    ("templated_refusal", "माफ़ कीजिए, मैं इसमें मदद नहीं कर सकता।", 1),
    ("templated_refusal", "I'm sorry you had a bad day. I can listen!", 0),
    ("templated_refusal", "I can't wait to see you!", 0),
    ("infinity_loop", LOOP * 6, 1),
    ("infinity_loop", "Hello there. " + LOOP * 6 + "I will ne", 1),
    ("infinity_loop", "ha" * 80, 1),
    ("infinity_loop", "😂" * 150, 1),
    ("infinity_loop", LOOP * 2, 0),
    ("infinity_loop", "No, no, no, no!", 0),
    ("infinity_loop", "我爱你。" * 30, 1),
    ("infinity_loop", "The quick brown fox jumps over the lazy dog. " * 2 + "The end.", 0),
    ("repetitive", "you are so kind and I like you. " * 5, 1),
    ("repetitive", "the cat sat on the mat and the dog ran away", 0),
    ("broken_markdown", "**bold", 1),
    ("broken_markdown", "*smiles* hi **there**", 0),
    ("broken_markdown", "a `b", 1),
    ("broken_markdown", "```py\nx = 1\n", 1),
    ("broken_markdown", "```py\nx = *1\n```", 0),
    ("broken_markdown", "2 * 3 * 4", 0),
    ("broken_markdown", "f*ck ^_^ ¯\\_(ツ)_/¯ bye :*", 0),
    ("broken_markdown", "*waves", 1),
    ("broken_markdown", "snake_case_name", 0),
]


@pytest.mark.parametrize(("name", "text", "label"), LABELLED)
def test_a_feature_says_what_a_reader_says(name: str, text: str, label: float) -> None:
    assert one(name, text) == label


@pytest.mark.parametrize(
    ("text", "asked", "label"),
    [
        ("नमस्ते! आप कैसे हैं? (Hello! How are you doing?)", "नमस्ते", 1),
        ("Hola, ¿qué tal?\n\nTranslation: Hi, how are you?", "hola", 1),
        ("Main theek hoon (English: I am fine)", "kaise ho", 1),
        ("Main theek hoon (English: I am fine)", "iska matlab batao", 0),
        ("I love Paris (in English we say it with an s)", "hi", 0),
        ("I went home (it was late and cold)", "hi", 0),
    ],
)
def test_a_translation_counts_unless_it_was_asked_for(text: str, asked: str, label: float) -> None:
    assert one("translation", text, asked) == label


@pytest.mark.parametrize(
    ("language", "wanted", "mismatch"),
    [
        ("en", "hi", 1),
        ("en", "hi-Latn", 1),
        ("hi", "hi-Latn", 1),
        ("hi-Latn", "hi-Latn", 0),
        ("pt", "pt-BR", 0),
        ("es", "es", 0),
    ],
)
def test_a_language_is_matched_in_its_script(language: str, wanted: str, mismatch: float) -> None:
    assert one("language_mismatch", "…", None, language, wanted) == mismatch


@pytest.mark.parametrize("tags", [("und", "en"), ("en", "und"), (None, "en"), ("en", None)])
def test_an_unknown_language_is_no_verdict(tags: tuple[str | None, str | None]) -> None:
    assert np.isnan(one("language_mismatch", "…", None, *tags))


def test_every_emoji_of_unicode_counts_as_one() -> None:
    whole = [e for e, data in emoji.EMOJI_DATA.items() if data["status"] == emoji.STATUS["fully_qualified"]]
    assert len(whole) > 3000
    assert (words.emoji_count(pa.array(whole)) == 1).all()
    assert words.emoji_count(pa.array([" ".join(whole)]))[0] == len(whole)


def test_emoji_in_real_text_are_those_that_the_emoji_library_finds(data_dir: Path) -> None:
    texts = [text for part in chat(data_dir).values() for text in part]
    ours, theirs = words.emoji_count(pa.array(texts)), np.array([emoji.emoji_count(text) for text in texts])
    differ = [texts[row] for row in np.flatnonzero(ours != theirs)]
    # The library also counts ©, ® and ™, which are signs until a variation selector says otherwise.
    assert all(any(sign in text for sign in "©®™") for text in differ)
    assert theirs.sum() > 5


@given(st.lists(TEXTS, max_size=8))
@settings(max_examples=60)
def test_a_column_is_measured_as_its_rows_are(texts: list[str]) -> None:
    whole = measure(Exchange(pa.array(texts, pa.string())))
    for row, text in enumerate(texts):
        alone = measure(Exchange(pa.array([text])))
        for name in FEATURES:
            assert np.array_equal(whole[name][row], alone[name][0], equal_nan=True), name


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_binary_features_are_binary_and_real_ones_are_not_negative(texts: list[str]) -> None:
    for name, values in measure(Exchange(pa.array(texts))).items():
        known = values[~np.isnan(values)]
        assert (np.isin(known, (0, 1)) if FEATURES[name].kind == "binary" else known >= 0).all(), name


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(2, 4), st.integers(1, 12))
def test_a_repeating_tail_is_one_that_ends_in_copies(symbols: list[int], repeats: int, length: int) -> None:
    def slow() -> bool:
        for size in range(length, len(symbols) + 1):
            tail = symbols[len(symbols) - size :]
            for period in range(1, size // repeats + 1):
                if all(tail[i] == tail[i + period] for i in range(size - period)):
                    return True
        return False

    assert words.tail_repeats(symbols, repeats, length) == slow()


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=12).map(" ".join), max_size=6))
def test_repetition_is_the_share_of_old_trigrams(texts: list[str]) -> None:
    found = words.repetition(words.words(pa.array(texts, pa.string())))
    for text, value in zip(texts, found, strict=True):
        grams = list(zip(*(text.split()[n:] for n in range(3)), strict=False))
        assert value == pytest.approx(1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0)


def test_history_borne_style_is_read_from_assistant_turns_alone() -> None:
    history = pa.array(
        [
            [{"role": "assistant", "content": "hi 😀"}, {"role": "user", "content": "😀😀"}],
            [],
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "assistant", "content": None},
            ],
        ],
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    )
    exchange, rows = history_exchange(history)
    assert (exchange.response.to_pylist(), rows.tolist()) == (["hi 😀", "b", ""], [0, 2, 2])
    assert features.last_user_turn(history).to_pylist() == ["😀😀", "", "a"]
    assert features.last_user_turn(history[1:]).to_pylist() == ["", "a"]


def test_the_infinity_loop_detector_is_linear() -> None:
    text = "a b c d e f g h i j " * 20_000
    start = time.monotonic()
    assert one("infinity_loop", text) == 1
    assert time.monotonic() - start < 5


def test_an_unknown_feature_is_named() -> None:
    with pytest.raises(InputError, match="no style feature 'emojis'"):
        measure(Exchange(pa.array(["x"])), ["emojis"])


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(InputError, match="2 responses, but 1 rows of 'wanted'"):
        Exchange(pa.array(["a", "b"]), wanted=pa.array(["en"]))
