"""Table 7, broken markdown: a CommonMark parser's verdict, mapped back to the text and repaired without loss."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flywheel_tasks.style import markdown
from tests.style.texts import chat

PIECES = (
    "*",
    "**",
    "***",
    "_",
    "`",
    "``",
    "```",
    "a",
    "b c",
    " ",
    "\n",
    "\n\n",
    ".",
    "!",
    "(",
    ")",
    "- ",
    "> ",
    "\\",
    "é",
    "😀",
    ":",
    "[a](b)",
    "\r",
    "    ",
    "\t",
    "x*y",
    "1. ",
    "~~~",
    '"',
    "你",
    "#",
)
MARKED = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("**bold* and more", "*bold* and more"),
        ("***x**", "**x**"),
        ("hi **there, how are **you**?", "hi there, how are **you**?"),
        ("> one\n> **two", "> one\n> two"),
        ("1. **a*\n2. b", "1. *a*\n2. b"),
        ("```py\nx = 1", "```py\nx = 1\n```"),
        ("say `x", "say x"),
        ("*smiles* all good", "*smiles* all good"),
        ("*a **b* c**", "*a **b* c**"),
        ("नमस्ते **दोस्त", "नमस्ते दोस्त"),
        ("**你好", "你好"),
    ],
)
def test_a_broken_mark_is_removed_or_closed(text: str, repaired: str) -> None:
    assert markdown.repair(text) == repaired


@given(MARKED)
def test_the_fast_look_agrees_with_the_parser(text: str) -> None:
    assert markdown.broken_rows(pa.array([text]))[0] == bool(markdown.breaks(text))


@given(st.lists(st.sampled_from(("*", "**", "a", "b", " c", "d ", "!", ". ", '"', "(")), max_size=16).map("".join))
@settings(max_examples=200)
def test_the_fast_look_agrees_where_only_stars_matter(text: str) -> None:
    assert markdown.broken_rows(pa.array([text]))[0] == bool(markdown.breaks(text))


@given(MARKED)
def test_a_repair_is_final_and_keeps_every_word(text: str) -> None:
    repaired = markdown.repair(text)
    assert markdown.repair(repaired) == repaired or markdown.breaks(repaired)
    kept = re.sub(r"[*_`~\s]", "", text), re.sub(r"[*_`~\s]", "", repaired)
    assert kept[0] == kept[1]


@given(MARKED)
def test_a_sound_text_renders_without_a_stray_mark_beside_a_word(text: str) -> None:
    if markdown.breaks(text) or re.search(r"[\\`~<\[]", text):
        return
    html = MarkdownIt("commonmark", {"html": False}).render(text)
    plain = re.sub(r"<pre>.*?</pre>|<[^>]+>", "\n", html, flags=re.DOTALL)
    assert not re.search(r"(?:^|\s)\*+[a-z]+(?:\s|$)", plain)


def test_real_chat_is_left_as_it_is(data_dir: Path) -> None:
    """Human chat in four languages has next to no broken markdown, and what is found is a mark with no partner."""
    texts = [text for part in chat(data_dir).values() for text in part]
    broken = markdown.broken_rows(pa.array(texts))
    assert broken.mean() < 0.001
    for text, bad in zip(texts, broken, strict=True):
        if bad:
            assert re.sub(r"[*_`\s]", "", markdown.repair(text)) == re.sub(r"[*_`\s]", "", text)
            assert not markdown.breaks(markdown.repair(text))
