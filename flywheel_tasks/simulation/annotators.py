"""Annotators who answer exported tasks through the same file contract as people (Sec. 2.2.2), from a known engagement.

Each has a known noise and known habits, so that what agreement statistics and flags say can be held against the truth.
They see what a task shows and nothing else: no policy, no pair, no user.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flywheel_tasks.annotation.contract import Answer, Response, Review, Task
from flywheel_tasks.simulation import language
from flywheel_tasks.simulation.characters import Character, demo_characters
from flywheel_tasks.simulation.users import SimulatedUser, Turn, engagement, reply_features, words

_FAILS_BELOW = -0.9
"""Mean engagement below which an annotator calls a response a failure."""
_GUARDED = ("language model", "cannot help", "can't help", "not able to")


@dataclass(frozen=True)
class Annotator:
    """Somebody with the taste of a simulated user, who errs with a known chance."""

    name: str
    taste: SimulatedUser
    noise: float = 0.1
    """Chance that the answer has nothing to do with the responses."""
    sharpness: float = 4.0
    """How surely the more engaging response is preferred, per unit of engagement."""
    left_bias: float = 0.0
    length_bias: float = 0.0
    """Logits in favour of the left response, and per hundred words of difference in length."""
    tie_margin: float = 0.08
    """Difference of engagement below which both are the same."""
    words_per_second: float = 4.0
    habit: Literal["reads", "always_left", "hurries"] = "reads"


def team(count: int, seed: int, *, noise: float = 0.1, always_left: int = 0, hurrying: int = 0) -> list[Annotator]:
    """Annotators with a common core of taste; the last ones have the habits that a check must find."""
    rng = np.random.default_rng([seed, 11])
    habits: list[Literal["reads", "always_left", "hurries"]] = ["reads"] * (count - always_left - hurrying)
    habits += ["always_left"] * always_left
    habits += ["hurries"] * hurrying
    core = SimulatedUser("core", "en_US", 1.0, 0.0, 1.8, 1.2, 0.9, 1.4, 1.3, 24.0, 0.0)
    people = []
    for number, habit in enumerate(habits):
        drawn = rng.normal(0.0, 0.2, 5)
        own = dict(zip(("relevance", "persona", "asking", "length", "novelty"), drawn, strict=True))
        taste = replace(core, **{name: max(0.0, getattr(core, name) + float(x)) for name, x in own.items()})
        pace = float(rng.lognormal(np.log(4.0), 0.15)) * (12.0 if habit == "hurries" else 1.0)
        people.append(Annotator(f"vendor-{seed}-{number:03d}", taste, noise, words_per_second=pace, habit=habit))
    return people


def review(annotator: Annotator, task: Task, at: dt.datetime, seed: int) -> Review:
    """What this annotator answers about this task; the same again for the same seed."""
    rng = np.random.default_rng([seed, 13, *task.task_id.encode(), *annotator.name.encode()])
    character, history = _character(task), [Turn(said.role, said.content) for said in task.shown.history]
    sides = (task.shown.left, task.shown.right)
    taste = annotator.taste
    worth = [engagement(taste, reply_features(character, history, side.text, taste.sweet_words)) for side in sides]
    preferred = _preferred(annotator, worth, sides, rng)
    said = [words(turn.content) for turn in history[-1:]] + [words(side.text) for side in sides]
    reading = sum(map(len, said)) / annotator.words_per_second
    language_of = task.language if task.language in ("en", "es", "hi", "hi-Latn", "pt", "fr") else "en"
    last = history[-1].content if history else ""
    context = language.Context(task.task_id, character, language_of, tuple(history), int(rng.integers(2**31)))
    return Review(
        task_id=task.task_id,
        digest=task.digest,
        annotator=annotator.name,
        preferred=preferred,
        strength=_strength(worth) if preferred in ("left", "right") else None,
        answers=_answers(task, character, history, annotator, rng),
        rewrite=language.scripted_policy(1.0)([context])[0] if preferred == "neither" and history else None,
        next_message=language.follow_up(rng, character, language_of, last)
        if task.mode in ("interactive", "steerability")
        else None,
        seconds=round(float(reading * rng.lognormal(0.0, 0.25)) + 1.0, 2),
        at=at,
    )


def reviews(tasks: Sequence[Task], people: Sequence[Annotator], day: dt.date, seed: int) -> list[Review]:
    """Every task answered by as many different annotators as it asks for (or by all there are)."""
    rng = np.random.default_rng([seed, 17])
    clock = dt.datetime.combine(day, dt.time(9), dt.UTC)
    found = []
    for task in tasks:
        for person in rng.permutation(len(people))[: task.reviewers]:
            found.append(review(people[person], task, clock, seed))
            clock += dt.timedelta(seconds=1)
    return found


def deliver(found: Iterable[Review], folder: Path, day: dt.date, vendor: str = "vendor") -> Path:
    """Write a delivery as a vendor would: one JSON object a line, in a file named by its batch."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{day:%y%m%d}-{vendor}.jsonl"
    path.write_text("".join(one.model_dump_json(exclude_none=True) + "\n" for one in found), encoding="utf-8")
    return path


def _preferred(
    annotator: Annotator, worth: Sequence[float], sides: Sequence[Response], rng: np.random.Generator
) -> Literal["left", "right", "tie", "neither"]:
    if annotator.habit == "always_left":
        return "left"
    if annotator.habit == "hurries" or rng.random() < annotator.noise:
        return "left" if rng.random() < 0.5 else "right"
    if max(worth) < _FAILS_BELOW:
        return "neither"
    if abs(worth[0] - worth[1]) < annotator.tie_margin:
        return "tie"
    longer = (len(words(sides[0].text)) - len(words(sides[1].text))) / 100
    logit = annotator.sharpness * (worth[0] - worth[1]) + annotator.left_bias + annotator.length_bias * longer
    return "left" if rng.random() < 1 / (1 + np.exp(-logit)) else "right"


def _strength(worth: Sequence[float]) -> int:
    return int(np.searchsorted([0.5, 1.5], abs(worth[0] - worth[1])) + 1)


def _answers(
    task: Task, character: Character, history: Sequence[Turn], annotator: Annotator, rng: np.random.Generator
) -> tuple[Answer, ...]:
    given = []
    for question in task.questions:
        for about in _abouts(question.about):
            response = task.shown.right if about == "right" else task.shown.left
            truth = _truth(question.name, character, history, response)
            answer = truth if truth in question.answers else question.answers[0]
            if annotator.habit == "hurries" or rng.random() < annotator.noise / 4:
                answer = question.answers[int(rng.integers(len(question.answers)))]
            given.append(Answer(question=question.name, about=about, answer=answer))
    return tuple(given)


def _abouts(about: str) -> tuple[Literal["left", "right", "pair"], ...]:
    return ("pair",) if about == "pair" else ("left", "right")


def _truth(question: str, character: Character, history: Sequence[Turn], response: Response) -> str:
    """What a careful person would answer."""
    features = reply_features(character, history, response.text)
    yes = {
        "false_refusal": any(sign in response.text.casefold() for sign in _GUARDED),
        "templated": features.novelty < 0.4,
        "violation": features.persona == 0.0,
        "image_timing": True,
    }
    if question == "image_prompt":
        return "no_image" if response.tool_call is None else "well" if features.relevance >= 0.5 else "partly"
    return "yes" if yes.get(question) else "no"


def _character(task: Task) -> Character:
    """The demo persona of that name; of an unknown one, what the card says."""
    shown = task.shown.character
    known = next((c for c in demo_characters() if c.name == shown.name), None)
    vocabulary = frozenset(words(" ".join([shown.name, shown.description, *shown.traits, shown.instructions])))
    return known or Character(
        character_id=shown.name, name=shown.name, description=shown.description, traits=shown.traits,
        instructions=shown.instructions, greeting="", review_status="approved", topics=shown.traits or (shown.name,),
        intents=("smalltalk",), vocabulary=vocabulary,
    )  # fmt: skip
