"""What simulated people say, and a scripted policy that answers them with a known quality, in six languages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import regex  # type: ignore[import-untyped,unused-ignore]
import yaml

from flywheel_tasks.simulation.characters import Character
from flywheel_tasks.simulation.users import Turn, content_words

_SLOT = regex.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Context:
    """What a policy sees when it has to answer: the history ends with a user turn."""

    conversation_id: str
    character: Character
    language: str
    turns: tuple[Turn, ...]
    seed: int


Policy = Callable[[Sequence[Context]], list[str]]
"""Answers a batch of contexts, one text each; a language model takes the place of `scripted_policy` as it is."""


@cache
def phrases(language: str) -> dict[str, Any]:
    every = yaml.safe_load(files("flywheel_tasks.simulation").joinpath("phrases.yaml").read_text(encoding="utf-8"))
    return dict(every[language])


def opening(rng: np.random.Generator, character: Character, language: str, intent: str) -> str:
    openers = phrases(language)["open"]
    return fill(rng, pick(rng, openers.get(intent) or openers["any"]), character, language)


def follow_up(rng: np.random.Generator, character: Character, language: str, last: str) -> str:
    text = fill(rng, pick(rng, phrases(language)["more"]), character, language, last)
    if rng.random() < 0.3:
        text += pick(rng, (" :)", "!!", " 😂", "...", " haha", " 🙈", " lol"))
    return text


def goodbye(rng: np.random.Generator, character: Character, language: str) -> str:
    return fill(rng, pick(rng, phrases(language)["bye"]), character, language)


def written_feedback(rng: np.random.Generator, language: str) -> str:
    return pick(rng, phrases(language)["feedback"])


def scripted_policy(quality: float) -> Policy:
    """A policy whose replies are relevant, in persona, asking back and of good length each with chance `quality`."""

    def reply(contexts: Sequence[Context]) -> list[str]:
        return [_scripted_reply(np.random.default_rng([c.seed, len(c.turns), 7]), c, quality) for c in contexts]

    return reply


def _scripted_reply(rng: np.random.Generator, context: Context, quality: float) -> str:
    character, language, last = context.character, context.language, context.turns[-1].content
    parts = phrases(language)["reply"]
    if _says_goodbye(last, language) and rng.random() < 0.8:
        return fill(rng, pick(rng, parts["farewell"]), character, language, last)
    good = rng.random(4) < quality
    said = [pick(rng, parts["echo"] if good[0] else parts["bland"])]
    if good[1]:
        said.append(pick(rng, parts["persona"]))
    want = 2 if good[3] else int(rng.choice((0, 6)))
    said += [pick(rng, parts["filler"]) for _ in range(want)]
    if good[2]:
        said.append(pick(rng, parts["ask"]))
    return " ".join(fill(rng, s, character, language, last) for s in said)


def fill(rng: np.random.Generator, template: str, character: Character, language: str, last: str = "") -> str:
    """`template` with every slot replaced, each occurrence drawn anew."""
    lists = phrases(language)

    def value(match: regex.Match[str]) -> str:
        slot = match[1]
        if slot == "name":
            return character.name
        if slot == "topic":
            return pick(rng, character.topics)
        if slot == "word":
            return pick(rng, content_words(last) or [pick(rng, lists["thing"])])
        return pick(rng, lists[slot])

    return str(_SLOT.sub(value, template))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


@cache
def _goodbyes(language: str) -> frozenset[str]:
    return frozenset(text.split("{")[0].strip() for text in phrases(language)["bye"])


def _says_goodbye(text: str, language: str) -> bool:
    return any(text.startswith(start) for start in _goodbyes(language))
