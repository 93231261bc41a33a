from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.simulation.characters import demo_characters
from flywheel_tasks.simulation.users import (
    INTENTS,
    THUMBS_BY_INTENT,
    SimulatedUser,
    Turn,
    continue_probability,
    make_users,
    readable,
    reply_features,
    signal_probabilities,
)

MIRA = next(c for c in demo_characters() if c.name == "Mira")
AVERAGE = SimulatedUser("u", "en_US", 1.0, 0.0, 1.8, 1.2, 0.9, 1.4, 1.3, 24.0, 0.0)
ASKED = [Turn("user", "my bicycle was stolen at the harbour, what now?")]
GOOD = (
    "A bicycle and a harbour, both wet by now. The lamp saw somebody near the sea wall. Who knew where it was locked?"
)


@given(reply=st.text(max_size=300), last=st.text(max_size=80), seed=st.integers(0, 50))
def test_any_text_gives_probabilities(reply: str, last: str, seed: int) -> None:
    user, history = make_users(1, seed)[0], [Turn("user", last)]
    p = continue_probability(user, MIRA, history, reply)
    assert 0.0 < p < 1.0
    assert p == continue_probability(user, MIRA, list(history), reply)
    assert all(0.0 <= f <= 1.0 for f in reply_features(MIRA, history, reply))
    for intent in INTENTS:
        chances = signal_probabilities(user, MIRA, history, reply, intent=intent, leaving=False, pleased_before=False)
        assert all(0.0 < x < 1.0 for x in chances)


@pytest.mark.parametrize(
    ("worse", "feature"),
    [
        (GOOD.replace("bicycle", "river").replace("harbour", "castle"), "relevance"),
        (GOOD.replace("saw", "as a language model saw"), "persona"),
        (GOOD.replace("Who", "Somebody").rstrip("?") + ".", "asking"),
        ("Bicycle, harbour, sea, lamp?", "length"),
        (GOOD + " " + "Let it sit for a while and see. " * 12, "length"),
    ],
)
def test_each_feature_moves_the_user(worse: str, feature: str) -> None:
    better, lower = reply_features(MIRA, ASKED, GOOD), reply_features(MIRA, ASKED, worse)
    assert getattr(lower, feature) < getattr(better, feature)
    assert continue_probability(AVERAGE, MIRA, ASKED, worse) < continue_probability(AVERAGE, MIRA, ASKED, GOOD)
    indifferent = dataclasses.replace(AVERAGE, **{feature: 0.0})  # type: ignore[arg-type]
    gain = continue_probability(AVERAGE, MIRA, ASKED, GOOD) - continue_probability(AVERAGE, MIRA, ASKED, worse)
    blunted = continue_probability(indifferent, MIRA, ASKED, GOOD) - continue_probability(
        indifferent, MIRA, ASKED, worse
    )
    assert blunted < gain, "the weight on the feature must be what carries the difference"


def test_repeating_oneself_costs() -> None:
    again = [*ASKED, Turn("assistant", GOOD), Turn("user", ASKED[0].content)]
    assert continue_probability(AVERAGE, MIRA, again, GOOD) < continue_probability(AVERAGE, MIRA, ASKED, GOOD)


def test_relevance_is_seen_in_devanagari() -> None:
    history = [Turn("user", "मेरी साइकिल खो गई")]
    on, off = (reply_features(MIRA, history, r).relevance for r in ("साइकिल कहाँ थी?", "मौसम अच्छा है"))
    assert on > off


def test_thumbs_carry_the_biases_of_section_3_5_5() -> None:
    def up(reply: str = GOOD, intent: str = "smalltalk", leaving: bool = False, pleased: bool = False) -> float:
        return signal_probabilities(
            AVERAGE, MIRA, ASKED, reply, intent=intent, leaving=leaving, pleased_before=pleased
        ).thumb_up

    flattery, plain = "The lamp is yours too. Thank you, good night.", "The lamp is yours too. So long, for now then."
    assert up(leaving=True) > up()
    assert up(flattery) > up(plain)
    assert up(pleased=True) > up()
    verbose = "The harbour keeps a bicycle. " + "The lamp turns and the sea answers slowly. " * 5
    short_question = "Which bicycle, and which harbour?"
    ratio = up(short_question) / up(verbose)
    fair = continue_probability(AVERAGE, MIRA, ASKED, short_question) / continue_probability(
        AVERAGE, MIRA, ASKED, verbose
    )
    assert ratio < fair, "thumbs favour verbose answers over clarifying questions more than engagement does"
    assert up(intent="learn") > up(intent="romance")
    assert set(THUMBS_BY_INTENT) == set(INTENTS)


def test_activity_is_heavy_tailed_and_people_differ() -> None:
    people = make_users(4000, 3)
    rates = sorted((u.conversations_per_day for u in people), reverse=True)
    assert 0.3 < sum(rates[:400]) / sum(rates) < 0.7
    assert min(rates) > 0
    assert len({u.user_id for u in people}) == len({u.sweet_words for u in people}) == 4000
    assert people == make_users(4000, 3)
    assert people != make_users(4000, 4)


@pytest.mark.parametrize(
    "reply",
    [
        "class Solution(thread((class(Template(Sub(${$($($(${$($$(${$($($($${$",
        "struct(_((_(proj(((_(<{$($(${$($(${$($obj($($${$",
        "<div><span>{{}}</span></div>",
    ],
)
def test_nobody_answers_a_heap_of_code(reply: str) -> None:
    short = dataclasses.replace(AVERAGE, sweet_words=6.0, length=4.0)
    assert not readable(reply)
    assert continue_probability(short, MIRA, ASKED, reply) < 0.1


@pytest.mark.parametrize(
    "reply",
    [
        GOOD, "", "$5 :)", "*smiles* “Really?” — ¿de verdad? …", "😂😂😂 ❤️", "नमस्ते। क्या हुआ?",
        "1. tea\n2. **milk**\n3. [sugar]", "it's 20% off @ the harbour & free",
    ],
)  # fmt: skip
def test_what_people_write_is_readable(reply: str) -> None:
    assert readable(reply)
