"""Table 1, "locale and language": romanised Hindi is told from English, short turns are not guessed, mixing flagged."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.curation import labelled
from flywheel_tasks.curation.language import LanguageConfig, detect, of_conversations


def languages(*texts: str) -> list[str]:
    return detect(pa.array(list(texts), pa.string()), LanguageConfig()).language.tolist()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("hello, how are you doing today?", "en"),
        ("mujhe aaj bahut acha lag raha hai yaar", "hi-Latn"),
        ("mujhe aaj bahut acha lag raha hai yaar 😂😂 http://x.example/long/english/words", "hi-Latn"),
        ("मुझे आज बहुत अच्छा लग रहा है", "hi"),
        ("hoy me siento muy bien, gracias por preguntar", "es"),
        ("je ne sais pas ce que tu veux dire", "fr"),
        ("今日はとても楽しかったです", "ja"),
        ("你好，今天在做什么？", "zh"),
        ("안녕하세요 반갑습니다", "ko"),
        ("สวัสดีครับ", "th"),
        ("привет, как дела сегодня", "ru"),
        ("كيف حالك اليوم يا صديقي", "ar"),
    ],
)
def test_a_turn_has_the_language_it_is_written_in(text: str, language: str) -> None:
    assert languages(text) == [language]


@pytest.mark.parametrize(
    "text", ["", "😀😀😀", "ok", "?!", "12345 67", "[EMAIL]", "https://example.org/hello/my/friend", "\u200b\u200b"]
)
def test_too_little_text_is_undetermined(text: str) -> None:
    assert languages(text) == ["und"]


def test_a_null_turn_is_undetermined() -> None:
    assert detect(pa.array([None], pa.string()), LanguageConfig()).language.tolist() == ["und"]


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        ("are you free this weekend, mera movie ka plan hai with friends", True),
        ("mere liye ek naya reminder set karo please", True),
        ("मुझे yesterday बहुत अच्छा time मिला", True),
        ("mujhe aaj bahut acha lag raha hai", False),
        ("hello, how are you doing today?", False),
        ("मुझे आज बहुत अच्छा लग रहा है", False),
    ],
)
def test_code_mixing_is_flagged(text: str, mixed: bool) -> None:
    assert detect(pa.array([text]), LanguageConfig()).mixed.tolist() == [mixed]


def test_a_conversation_has_the_language_of_most_of_its_letters() -> None:
    found = detect(pa.array(["hola, qué tal estás hoy amiga", "I am fine", "muy bien", "😀"]), LanguageConfig())
    assert of_conversations(found, np.array([0, 0, 0, 1]), 3) == ["es", "und", "und"]
    assert of_conversations(detect(pa.array([], pa.string()), LanguageConfig()), np.array([], np.int64), 0) == []


def test_romanised_hindi_on_the_half_never_trained_on(data_dir: Path) -> None:
    """Accuracy ≥ 0.95 through the whole detector, for Hindi and for English each."""
    items = [i for i in labelled.romanised_hindi(data_dir) if labelled.half_of(i) == "test"]
    items = [i for i in items if i.source.startswith(("hinglish", "hatecheck"))]
    found = detect(pa.array([i.text for i in items]), LanguageConfig()).language
    positive = np.array([i.positive for i in items])
    assert ((found == "hi-Latn") == positive).mean() >= 0.95
    assert (found[positive] == "hi-Latn").mean() >= 0.95
    assert (found[~positive] != "hi-Latn").mean() >= 0.95


def test_the_halves_share_no_sentence(data_dir: Path) -> None:
    halves: dict[str, set[str]] = {"train": set(), "test": set()}
    for item in labelled.romanised_hindi(data_dir):
        if item.source.startswith("hinglish"):
            halves[labelled.half_of(item)].add(item.group)
    assert halves["train"]
    assert not halves["train"] & halves["test"]


@pytest.mark.parametrize(("name", "least"), [("en", 0.95), ("es", 0.95), ("fr", 0.95), ("pt", 0.93), ("hi", 0.9)])
def test_sentences_of_other_languages(data_dir: Path, name: str, least: float) -> None:
    lines = (data_dir / f"lingua_testdata/{name}.txt").read_text(encoding="utf-8").splitlines()
    found = detect(pa.array([line for line in lines if line.strip()]), LanguageConfig()).language
    assert (found == name).mean() >= least


def test_a_megabyte_of_mixed_scripts_has_an_answer() -> None:
    assert languages("नमस्ते hello 你好 " * 60_000)[0] != ""
