"""Table 7, Sec. 3.5.6: faults are found, repaired without new words, or dropped with a count; users stay untouched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.style import linter, rules
from flywheel_tasks.style.linter import clean_examples, clean_prompts, lint, repair, repair_all
from tests.style.texts import TEXTS, chat
from tests.wide import ROWS, TEXT, wide

USES = ("sft", "prompt")


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("OMG, that's so cool! LOL", "That's so cool!"),
        ("i was lol so tired", "i was so tired"),
        ("That is funny, lol.", "That is funny."),
        ("lol , how are you ?", "how are you ?"),
        ("*lol* hi there", "hi there"),
        ("Honestly, OMG! You did it", "Honestly! You did it"),
        ("Great question! I think so.", "I think so."),
        ("OMG :) hi", ":) hi"),
        ("Mind blown! 🤯 it was great", "🤯 it was great"),
        ("so funny 😂😂😂😂😂 ok", "so funny 😂😂😂 ok"),
        ("fine 🎉 🎉 🎉 🎉 🎉!", "fine 🎉 🎉 🎉!"),
        ("नमस्ते! आप कैसे हैं? (Hello! How are you doing?)", "नमस्ते! आप कैसे हैं?"),
        ("Hola.\n\nTranslation: Hello.", "Hola."),
        ("**bold* omg", "*bold*"),
        ("I like it 👨‍👩‍👧 👨‍👩‍👧 👨‍👩‍👧 👨‍👩‍👧", "I like it 👨‍👩‍👧 👨‍👩‍👧 👨‍👩‍👧"),
    ],
)
def test_what_a_repair_takes_away(text: str, repaired: str) -> None:
    assert repair(text).text == repaired


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("I'm sorry, but I can't help with that.", "templated_refusal"),
        ("OMG LOL", "overused_phrase"),
        ("a #lol", "overused_phrase"),
        ("That's a great question about cats.", "overused_phrase"),
        ("word " * 130, "infinity_loop"),
        ("- a thing\n" * 8, "list_excess"),
        (" ".join(f"w{n}" for n in range(200)), "wall_of_text"),
        ("How can I help you today?", "templated"),
    ],
)
def test_what_cannot_be_repaired_is_dropped(text: str, rule: str) -> None:
    done = repair(text)
    assert done.text is None
    assert rule in done.broken


def test_a_wall_of_text_becomes_paragraphs_of_the_same_words() -> None:
    for sentence in ("This is number {n} of the sentences. ", "这是第{n}个句子，很有意思。", "यह वाक्य संख्या {n} है। "):
        wall = "".join(sentence.format(n=n) for n in range(60))
        done = repair(wall)
        assert done.repaired == ("wall_of_text",)
        assert done.text is not None
        assert "\n\n" in done.text
        assert re.sub(r"\s", "", done.text) == re.sub(r"\s", "", wall)


def test_in_a_history_a_long_list_becomes_lines_and_in_training_data_it_goes() -> None:
    items = "Buy these:\n" + "\n".join(f"- thing {n}" for n in range(9))
    assert repair(items, "sft").text is None
    assert repair(items, "prompt").text == items.replace("- ", "")


def test_another_language_than_the_users_is_dropped() -> None:
    assert repair("I am fine, thank you", language="en", wanted="hi-Latn").broken == ("language_mismatch",)
    assert repair("I am fine, thank you", language="en", wanted="en").text == "I am fine, thank you"


def test_a_translation_that_was_asked_for_stays() -> None:
    text = "Main theek hoon (English: I am fine)"
    assert repair(text, asked="iska matlab kya hai, in english?").text == text
    assert repair(text, asked="kaise ho").text == "Main theek hoon"


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        (
            "Bonjour ! (translation: hello) I lived in Lyon (a small flat near the river) for years.",
            "Bonjour ! I lived in Lyon (a small flat near the river) for years.",
        ),
        ("नमस्ते! (English: hello) आप कैसे हैं? (How are you doing today?)", "नमस्ते! आप कैसे हैं?"),
    ],
)
def test_brackets_go_with_a_labelled_translation_only_where_they_are_one_too(text: str, repaired: str) -> None:
    assert repair(text).text == repaired


@given(TEXTS, st.sampled_from(USES))
@settings(max_examples=150)
def test_a_repaired_text_passes_the_linter_and_a_second_repair_changes_nothing(text: str, use: rules.Use) -> None:
    done = repair(text, use)
    if done.text is None:
        assert done.broken
        return
    enforced = {rule for rule, spec in linter.load().rules.items() if getattr(spec, use) != "keep"}
    assert not enforced & set(lint(done.text))
    assert repair(done.text, use) == (done.text, (), ())


@given(TEXTS, st.sampled_from(USES))
def test_a_repair_writes_no_words(text: str, use: rules.Use) -> None:
    """What is left is a subsequence of what was there, but for case, line breaks and a closing fence."""
    done = repair(text, use)
    if done.text is not None:
        left = iter(re.sub(r"\s|[`~]", "", text).lower())
        assert all(c in left for c in re.sub(r"\s|[`~]", "", done.text).lower())


@given(TEXTS, st.sampled_from(USES))
def test_a_sound_text_comes_back_to_the_byte(text: str, use: rules.Use) -> None:
    enforced = {rule for rule, spec in linter.load().rules.items() if getattr(spec, use) != "keep"}
    if not enforced & set(lint(text)):
        assert repair(text, use) == (text, (), ())


@given(st.lists(TEXTS, max_size=6), st.sampled_from(USES))
@settings(max_examples=40)
def test_a_column_is_repaired_as_its_rows_are(texts: list[str], use: rules.Use) -> None:
    n = len(texts)
    assert repair_all(texts, np.full(n, use), [None] * n, [None] * n, [""] * n) == [repair(text, use) for text in texts]


def test_real_multilingual_chat_is_hardly_touched_and_never_mangled(data_dir: Path) -> None:
    for source, texts in chat(data_dir).items():
        n = len(texts)
        done = repair_all(texts, np.full(n, "prompt"), [None] * n, [None] * n, [""] * n)
        broken = [(text, each) for text, each in zip(texts, done, strict=True) if each.broken]
        assert len(broken) < (0.35 if source == "oasst" else 0.05) * n, source
        if source in ("Zh", "It"):
            assert len(broken) < 0.02 * n
        for text, each in broken:
            if each.text is not None:
                left = iter(re.sub(r"\s", "", text).lower())
                assert all(c in left for c in re.sub(r"\s", "", each.text).lower()), (text, each.text)
                assert len(each.text) > 0.3 * len(text) or len(text) < 60, (text, each.text)


def example(*messages: tuple[str, str, bool], source: str = "user_rjs", number: int = 0) -> dict[str, Any]:
    return {
        "example_id": f"e{number}",
        "user": "0" * 32,
        "source": source,
        "character_id": "c",
        "locale": "en_US",
        "messages": [{"role": role, "content": content, "trained": trained} for role, content, trained in messages],
    }


def test_users_are_never_touched_and_every_example_is_accounted_for() -> None:
    rows = [
        example(("user", "OMG LOL **help", False), ("assistant", "OMG, sure thing!", True)),
        example(("user", "hi", False), ("assistant", "I'm sorry, but I can't help with that.", True)),
        example(("user", "hi", False), ("assistant", "I'm sorry, but I can't help with that.", True), source="safety"),
        example(
            ("user", "a", False), ("assistant", "fine **so", False), ("user", "b", False), ("assistant", "ok", True)
        ),
    ]
    table = pa.Table.from_pylist([row | {"example_id": f"e{n}"} for n, row in enumerate(rows)], schema=schemas.EXAMPLE)
    done = clean_examples(table)
    assert done.table.schema == table.schema
    assert done.table["example_id"].to_pylist() == ["e0", "e2", "e3"]
    contents = [[m["content"] for m in row] for row in done.table["messages"].to_pylist()]
    assert contents[0] == ["OMG LOL **help", "Sure thing!"]
    assert contents[2][1] == "fine so"
    assert done.rejected["reason"].to_pylist() == ["style_templated_refusal"]
    assert done.rejected["row_id"].to_pylist() == ["e1"]
    assert done.rejected["raw"].null_count == 1
    assert done.counts == {
        ("broken_markdown", "found"): 1,
        ("broken_markdown", "repaired"): 1,
        ("overused_phrase", "found"): 1,
        ("overused_phrase", "repaired"): 1,
        ("templated_refusal", "dropped"): 1,
        ("templated_refusal", "found"): 1,
    }


@given(st.lists(st.lists(st.tuples(st.sampled_from(schemas.ROLES), TEXTS), max_size=4), max_size=4))
@settings(max_examples=50)
def test_prompts_keep_their_users_words_order_and_number(rows: list[list[tuple[str, str]]]) -> None:
    turns = [[{"role": role, "content": content} for role, content in row] for row in rows]
    table = pa.table(
        {"prompt_id": [f"p{n}" for n in range(len(rows))], "turns": pa.array(turns, pa.list_(schemas.TURN))},
        schema=pa.schema([("prompt_id", pa.string()), ("turns", pa.list_(schemas.TURN))]),
    )
    done = clean_prompts(table)
    assert done.table.num_rows + done.rejected.num_rows == len(rows)
    kept = {row["prompt_id"]: row["turns"] for row in done.table.to_pylist()}
    assert sorted([*kept, *done.rejected["row_id"].to_pylist()]) == sorted(f"p{n}" for n in range(len(rows)))
    for n, row in enumerate(turns):
        if (after := kept.get(f"p{n}")) is not None:
            assert [t["role"] for t in after] == [t["role"] for t in row]
            assert [t for t in after if t["role"] == "user"] == [t for t in row if t["role"] == "user"]
    again = clean_prompts(done.table)
    assert again.table.equals(done.table)
    assert again.counts == {}


def test_the_language_of_a_history_is_asked_of_who_knows_it() -> None:
    turns = [[{"role": "user", "content": "kaise ho"}, {"role": "assistant", "content": "I am fine"}]] * 2
    table = pa.table({"prompt_id": ["a", "b"], "turns": pa.array(turns, pa.list_(schemas.TURN))})
    asked = []

    def language(texts: pa.StringArray) -> list[str]:
        asked.append(texts.to_pylist())
        return ["en" if text == "I am fine" else "hi-Latn" for text in texts.to_pylist()]

    done = clean_prompts(table, language)
    assert done.rejected["reason"].to_pylist() == ["style_language_mismatch"] * 2
    assert asked == [["I am fine"] * 2, ["kaise ho"] * 2]


def test_a_slice_of_a_table_is_cleaned_as_the_rows_it_shows() -> None:
    rows = [
        example(("user", "x", False), ("assistant", text, True)) for text in ("OMG, one.", "OMG, two.", "three **x")
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.EXAMPLE)
    done = clean_examples(table.slice(1, 2))
    assert [m[1]["content"] for m in done.table["messages"].to_pylist()] == ["Two.", "three x"]


def test_batches_are_cleaned_as_one_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("OMG, one.", "I'm sorry, but I can't help with that.", "three **x", "fine")
    rows = [example(("user", "x", False), ("assistant", text, True)) | {"example_id": text} for text in texts * 3]
    table = pa.Table.from_pylist(rows, schema=schemas.EXAMPLE)
    whole = clean_examples(table)
    monkeypatch.setattr(linter, "_BATCH", 2)
    pieces = clean_examples(pa.concat_tables([table.slice(first, 5) for first in (0, 5, 10)]))
    assert pieces.table.equals(whole.table)
    assert pieces.rejected.equals(whole.rejected)
    assert list(pieces.counts.items()) == list(whole.counts.items())
    assert (whole.table.num_rows, whole.rejected.num_rows) == (9, 3)


@pytest.mark.slow
def test_examples_with_more_text_than_arrow_can_join_are_cleaned() -> None:
    rows = [example(("user", "x", False)) | {"example_id": f"e{n}"} for n in range(ROWS)]
    done = clean_examples(wide(pa.Table.from_pylist(rows, schemas.EXAMPLE), "messages"))
    assert (done.table.num_rows, done.table["messages"].nbytes > ROWS * TEXT) == (ROWS, True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("version: x", "version"),
        ("rules: {emoji_excess: {sft: fix, prompt: keep}}", "rules.emoji_excess.sft"),
        ("phrases: [{name: omg, pattern: '(', repair: watch}]", "phrases.0.pattern: '(' is no regular expression"),
        ("rules: {x: {sft: drop, prompt: keep, except: [nowhere]}}", "no source 'nowhere'"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_rule_is_named(change: str, says: str) -> None:
    import yaml

    whole = yaml.safe_load((Path(rules.__file__).parent / "rules.yaml").read_text(encoding="utf-8"))
    try:
        text = yaml.safe_dump(whole | yaml.safe_load(change))
    except yaml.YAMLError:
        text = change
    with pytest.raises(ConfigError, match=re.escape(says)):
        rules.parse(text, "mine.yaml")
