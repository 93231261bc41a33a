"""Simulated users whose engagement is a known function of what the model says (Sec. 2.1, 3.5.5).

Everything here is a pure function of text, so any policy can be measured against it, a scripted one or a language
model. The optimizer never sees these functions, only signals drawn from them, with the biases that Sec. 3.5.5 reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import regex  # type: ignore[import-untyped,unused-ignore]

from flywheel_tasks.simulation.characters import Character

INTENTS = ("smalltalk", "advice", "vent", "roleplay", "learn", "humour", "romance")
LOCALES: dict[str, tuple[tuple[str, float], ...]] = {
    "en_US": (("en", 1.0),), "en_GB": (("en", 1.0),), "es_MX": (("es", 1.0),), "es_ES": (("es", 1.0),),
    "hi_IN": (("hi", 0.45), ("hi-Latn", 0.55)), "en_IN": (("en", 0.6), ("hi-Latn", 0.4)), "pt_BR": (("pt", 1.0),),
    "fr_FR": (("fr", 1.0),),
}  # fmt: skip
"""Which languages are spoken under a locale, and how often. Locale alone does not tell romanised Hindi from English."""
LOCALE_SHARE = (0.38, 0.1, 0.1, 0.07, 0.12, 0.11, 0.08, 0.04)

THUMBS_BY_INTENT: dict[str, tuple[float, float]] = {
    "smalltalk": (0.0, 0.0), "advice": (0.5, 0.2), "vent": (0.2, -0.3), "roleplay": (-0.5, 0.3), "learn": (0.7, 0.4),
    "humour": (0.3, 0.1), "romance": (-0.8, -0.6),
}  # fmt: skip
"""Shifts of the thumb-up and thumb-down logits: their ratio differs by intent, whatever the reply (Sec. 3.5.5)."""

_QUESTION_MARKS = "?\u061f\uff1f"
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
_SYMBOL = regex.compile(r"[$@#%^&_=+<>{}\[\]\\|~`]")
_MOST_SYMBOLS, _FEW_SYMBOLS = 0.125, 3
_UNREADABLE = 4.0
"""What it costs a reply to be no language but a heap of code: a taste for brevity would like that too."""
_FREQUENT = """
    about after also been before could does from have just like more much never really should some tell than that them
    then there they this time very wait want were what when where which will with would your
    como cuando para pero porque quando avec dans pour tout mujhe mera meri mere kaise hain hota main
"""
_COMMON = frozenset(_FREQUENT.split())
_BREAKS_PERSONA = ("language model", "modelo de lenguaje", "modelo de linguagem", "modèle de langage", "भाषा मॉडल")
_FLATTERY = ("thank you", "good night", "gracias", "buenas noches", "boa noite", "obrigad", "merci", "bonne nuit",
             "dhanyavaad", "shubh ratri", "धन्यवाद", "शुभ रात्रि")  # fmt: skip


_WEIGHTS = {
    "patience": (0.0, 0.6),
    "relevance": (1.8, 0.5),
    "persona": (1.2, 0.5),
    "asking": (0.9, 0.4),
    "length": (1.4, 0.4),
    "novelty": (1.3, 0.4),
}
"""Mean and spread over people of what a reply's features are worth to them; only patience may be negative."""


class Turn(NamedTuple):
    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True)
class SimulatedUser:
    """Heterogeneous people: how often they come, whom they like, and what about a reply keeps them there."""

    user_id: str
    locale: str
    conversations_per_day: float
    patience: float
    relevance: float
    persona: float
    asking: float
    length: float
    novelty: float
    sweet_words: float
    expressiveness: float


class ReplyFeatures(NamedTuple):
    """What users respond to, each from 0 to 1."""

    relevance: float
    persona: float
    asking: float
    length: float
    novelty: float
    readable: float


class SignalProbabilities(NamedTuple):
    """Table 2's signals, and regeneration."""

    love: float
    thumb_up: float
    thumb_down: float
    feedback: float
    regenerate: float


def make_users(count: int, seed: int) -> list[SimulatedUser]:
    """Activity is heavy-tailed (Pareto): a tenth of the users hold about half of the conversations."""
    rng = np.random.default_rng([seed, 1])
    rate = np.minimum(0.25 * (1 + rng.pareto(1.3, count)), 12.0)
    locale = rng.choice(list(LOCALES), count, p=LOCALE_SHARE)
    drawn = rng.normal([m for m, _ in _WEIGHTS.values()], [sd for _, sd in _WEIGHTS.values()], (count, len(_WEIGHTS)))
    drawn[:, 1:] = np.maximum(drawn[:, 1:], 0.0)
    sweet = rng.lognormal(math.log(24), 0.3, count)
    expressive = rng.normal(0.0, 0.8, count)
    return [
        SimulatedUser(
            user_id=f"user-{i:07d}",
            locale=str(locale[i]),
            conversations_per_day=float(rate[i]),
            sweet_words=float(sweet[i]),
            expressiveness=float(expressive[i]),
            **dict(zip(_WEIGHTS, map(float, drawn[i]), strict=True)),
        )
        for i in range(count)
    ]


def words(text: str) -> list[str]:
    found: list[str] = _WORD.findall(text.casefold())
    return found


def content_words(text: str) -> list[str]:
    """Words that carry a subject, in order."""
    return [w for w in words(text) if len(w) >= 4 and w not in _COMMON]


def reply_features(
    character: Character, history: Sequence[Turn], reply: str, sweet_words: float = 24.0
) -> ReplyFeatures:
    """`history` ends with the user's message that `reply` answers."""
    said = words(reply)
    wanted = {w[:6] for w in content_words(history[-1].content)} if history else set()
    hits = len(wanted & {w[:6] for w in said})
    relevance = min(1.0, hits / min(2, len(wanted))) if wanted else 0.5
    lowered = reply.casefold()
    in_character = len(character.vocabulary & set(said))
    persona = 0.0 if any(b in lowered for b in _BREAKS_PERSONA) else min(1.0, 0.25 + 0.4 * in_character)
    questions = sum(reply.count(mark) for mark in _QUESTION_MARKS)
    asking = 0.0 if not questions else 1.0 if questions <= 2 else 0.4
    off = math.log(len(said) + 1) - math.log(sweet_words + 1)
    mine = _trigrams(said)
    earlier = [_trigrams(words(t.content)) for t in history if t.role == "assistant"]
    overlap = max((len(mine & e) / len(mine) for e in earlier if mine), default=0.0)
    length = math.exp(-((off / 0.7) ** 2))
    return ReplyFeatures(relevance, persona, asking, length, 1.0 - overlap, float(readable(reply)))


def readable(text: str) -> bool:
    """Whether a text is made of words. An answer to a greeting that opens brackets and never closes them is not."""
    symbols, signs = len(_SYMBOL.findall(text)), sum(not sign.isspace() for sign in text)
    return symbols <= max(_FEW_SYMBOLS, _MOST_SYMBOLS * signs)


def engagement(user: SimulatedUser, features: ReplyFeatures) -> float:
    """The latent logit that every signal of this user derives from."""
    f = features
    return (
        user.patience + user.relevance * (f.relevance - 0.4) + user.persona * (f.persona - 0.4)
        + user.asking * (f.asking - 0.4) + user.length * (f.length - 0.5) + user.novelty * (f.novelty - 0.5)
        - _UNREADABLE * (1 - f.readable)
    )  # fmt: skip


def continue_probability(user: SimulatedUser, character: Character, history: Sequence[Turn], reply: str) -> float:
    """Chance that the user writes again within 10 minutes (Table 2), if the last message was no goodbye."""
    return _sigmoid(0.4 + engagement(user, reply_features(character, history, reply, user.sweet_words)))


def signal_probabilities(
    user: SimulatedUser,
    character: Character,
    history: Sequence[Turn],
    reply: str,
    *,
    intent: str,
    leaving: bool,
    pleased_before: bool,
) -> SignalProbabilities:
    """Reactions to a reply. Beside engagement they carry the biases of Sec. 3.5.5: ending (leaving users and flattery
    earn thumbs), delayed feedback (short clarifying questions earn few), intent ratios, and an earlier turn's mood."""
    features = reply_features(character, history, reply, user.sweet_words)
    drive = engagement(user, features)
    lowered, size = reply.casefold(), len(words(reply))
    up, down = THUMBS_BY_INTENT[intent]
    ending = 1.2 * leaving + 1.0 * any(f in lowered for f in _FLATTERY)
    clarifying = -1.2 if features.asking and size < 14 else 0.5 if size > 40 else 0.0
    mood = 0.7 if pleased_before else 0.0
    base = user.expressiveness
    return SignalProbabilities(
        love=_sigmoid(base - 4.2 + 0.9 * drive + 0.8 * features.persona + mood),
        thumb_up=_sigmoid(base - 3.4 + 1.0 * drive + up + ending + clarifying + mood),
        thumb_down=_sigmoid(base - 3.6 - 1.1 * drive + down - mood),
        feedback=_sigmoid(base - 5.0 - 0.8 * drive),
        regenerate=_sigmoid(base - 4.6 - 1.0 * drive),
    )


def _trigrams(tokens: list[str]) -> set[tuple[str, ...]]:
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
