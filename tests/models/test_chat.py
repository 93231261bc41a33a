"""What a model reads: control tokens come from the template alone, and only what an assistant said is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card, Template, TooLong, load_tokenizer
from tests.models.small import CONTROL, template, turns

KINDS = ("llama3", "chatml")
CARD = Card("Ada", "a poet of the sea", ("kind", "dry"), "never rhyme", "Ahoy!")
words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20)
hostile = st.lists(st.one_of(st.sampled_from([*CONTROL, "\ue0000\ue001", "{{ 7*7 }}", "\n\n", "system"]), words),
                   min_size=1, max_size=5).map("".join)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def chats(request: pytest.FixtureRequest, tiny_model: Path) -> Template:
    return template(tiny_model, request.param)


@given(texts=st.lists(hostile, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1), reply=hostile)
def test_nothing_typed_becomes_a_control_token(chats: Template, texts: list[str], reply: str) -> None:
    control = set(chats.tokenizer.added_tokens_decoder)
    said = chats.chat(turns(*texts), response=reply)
    harmless = chats.chat(turns(*("a" for _ in texts)), response="a")
    found, wanted = ([i for i in chat.ids.tolist() if i in control] for chat in (said, harmless))
    assert found == wanted
    decoded = chats.tokenizer.decode(said.ids)
    assert all(text.strip() in decoded for text in [*texts, reply])


@given(texts=st.lists(hostile, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1), reply=hostile)
def test_only_the_response_and_its_end_are_trained(chats: Template, texts: list[str], reply: str) -> None:
    chat = chats.chat(turns(*texts), card=CARD, response=reply)
    words, end = chat.ids[chat.trained & ~chat.eot], chat.ids[chat.eot]
    assert chats.tokenizer.decode(words) == reply.strip()
    assert end.tolist() == [chats.eot_id]
    assert chat.trained[-1]
    assert chat.eot[-1]


@given(texts=st.lists(hostile, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1), reply=hostile)
def test_the_model_continues_the_very_tokens_it_is_asked_with(chats: Template, texts: list[str], reply: str) -> None:
    asked = chats.chat(turns(*texts), card=CARD)
    answered = chats.chat(turns(*texts), card=CARD, response=reply)
    assert answered.ids[: len(asked.ids)].tolist() == asked.ids.tolist()
    assert not asked.trained.any()
    assert answered.trained[len(asked.ids) :].all()


@given(texts=st.lists(words, min_size=1, max_size=5).filter(lambda t: len(t) % 2 == 1))
def test_a_prompt_reads_as_the_tokenizer_itself_renders_it(chats: Template, texts: list[str]) -> None:
    """Up to the boundary kept before an assistant's words, which only generation has."""
    messages = [{"role": t["role"], "content": t["content"].strip()} for t in turns(*texts)]
    rendered = chats.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chats.tokenizer.decode(chats.chat(turns(*texts)).ids) == rendered
    if len(texts) == 1:
        assert chats.chat(messages).ids.tolist() == chats.tokenizer(rendered, add_special_tokens=False).input_ids


def test_in_an_example_exactly_the_marked_turns_are_trained(chats: Template) -> None:
    messages = turns("one", "two", "three", "four", "five", "six")
    messages[1]["trained"] = messages[5]["trained"] = True
    messages[2]["trained"] = True
    chat = chats.chat([{"role": "system", "content": "Be brief."}, *messages])
    assert chats.tokenizer.decode(chat.ids[chat.trained & ~chat.eot]) == "twosix"
    assert chat.eot.sum() == 2


@given(texts=st.lists(words, min_size=1, max_size=9).filter(lambda t: len(t) % 2 == 1), spare=st.integers(0, 120))
@settings(max_examples=60)
def test_history_is_cut_by_turns_from_the_left_and_nothing_else_is(
    chats: Template, texts: list[str], spare: int
) -> None:
    history = turns(*texts)
    least = len(chats.chat(history[-1:], card=CARD, response="I said so.").ids)
    chat = chats.chat(history, card=CARD, response="I said so.", max_tokens=least + spare)
    assert len(chat.ids) <= least + spare
    kept = history[chat.dropped_turns :]
    assert kept[0]["role"] == "user"
    assert chat.ids.tolist() == chats.chat(kept, card=CARD, response="I said so.").ids.tolist()
    if chat.dropped_turns:
        longer = chats.chat(history[chat.dropped_turns - 2 :], card=CARD, response="I said so.")
        assert len(longer.ids) > least + spare


def test_what_may_not_be_cut_and_does_not_fit_is_refused(chats: Template) -> None:
    with pytest.raises(TooLong, match=r"take \d+ tokens of 50"):
        chats.chat(turns("short", "reply", "so?"), card=CARD, response="word " * 60, max_tokens=50)


def test_an_empty_response_is_its_end_of_turn(chats: Template) -> None:
    chat = chats.chat(turns("well?"), response="")
    assert chat.ids[chat.trained].tolist() == [chats.eot_id]


def test_a_pair_shares_its_history_and_holds_both_responses(chats: Template) -> None:
    one, other = (chats.pair(turns("Hello"), *y, card=CARD) for y in (("first", "second"), ("second", "first")))
    text = chats.tokenizer.decode(one.ids)
    assert text.index("first") < text.index("second")
    assert sorted(one.ids.tolist()) == sorted(other.ids.tolist())
    prompt = len(chats.chat(turns("Hello"), card=CARD).ids)
    assert one.ids[:prompt].tolist() == other.ids[:prompt].tolist()


def test_the_card_says_all_that_makes_the_character(chats: Template) -> None:
    row = {"name": "Ada", "description": "a poet", "traits": ["kind", "dry"], "instructions": "never rhyme",
           "greeting": "Ahoy!", "character_id": "c1", "review_status": "approved"}  # fmt: skip
    text = chats.tokenizer.decode(chats.chat(turns("Hi"), card=Card.of(row)).ids)
    assert all(part in text for part in ("Ada", "a poet", "kind, dry", "never rhyme"))
    hostile = Card("{{ 7 * 7 }}", "<|eot_id|><|im_end|>")
    ids = chats.chat(turns("Hi"), card=hostile).ids.tolist()
    assert ids.count(chats.eot_id) == chats.chat(turns("Hi"), card=CARD).ids.tolist().count(chats.eot_id)
    assert "{{ 7 * 7 }}" in chats.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"role": "narrator", "content": "x"}], "role 'narrator' is unknown"),
        ([{"role": "system", "content": "x"}, *turns("y")], "beside a character card"),
    ],
)
def test_what_no_template_can_render_is_named(chats: Template, conversation: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chats.chat(conversation, card=CARD)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no chat template"),
        (
            "{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}",
            "once",
        ),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "ends no assistant turn"),
        ("{{ raise_exception('no system role') }}", "no system role"),
    ],
)
def test_a_template_that_would_train_or_read_nonsense_is_refused(tiny_model: Path, source: str, message: str) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = source or None
    with pytest.raises(InputError, match=message):
        Template(tokenizer)


def test_a_date_in_the_template_does_not_change_with_the_day(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y %H:%M:%S.%f') %}{% endif %}"
    tokenizer.chat_template = dated + "{{ date_string }}" + tokenizer.chat_template
    first, second = (Template(tokenizer).chat(turns("Hi")).ids for _ in range(2))
    assert np.array_equal(first, second)
