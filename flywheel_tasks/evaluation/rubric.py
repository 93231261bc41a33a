"""The questions a judge model is asked, how they are put, and how an answer is read (Table 4, LLM-as-a-judge)."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

Message = dict[str, str]
Verdicts = dict[str, bool]
_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL)
_LONGEST_ANSWER = 4096


class Item(NamedTuple):
    """One response to judge: the character's card, the turns before it as (role, content), and the response."""

    card: str
    turns: tuple[tuple[str, str], ...]
    response: str


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(_Part):
    ask: str
    values: dict[str, str]


class Reading(_Part):
    """A metric is true of a response when the question was answered with one of these values."""

    question: str
    values: tuple[str, ...]


class Rubric(_Part):
    version: int
    instructions: str
    questions: dict[str, Question]
    metrics: dict[str, Reading]

    @model_validator(mode="after")
    def _fits(self) -> Rubric:
        for name, reading in self.metrics.items():
            question = self.questions.get(reading.question)
            if question is None or not set(reading.values) <= set(question.values):
                raise ValueError(f"metric '{name}' reads a question or a value that the rubric does not have")
        return self


@cache
def load() -> Rubric:
    """The rubric that ships with the package."""
    return Rubric.model_validate(yaml.safe_load(_text()))


@cache
def digest() -> str:
    """Which rubric it is: another wording is another judge."""
    return hashlib.sha256(_text().encode()).hexdigest()[:16]


def messages(item: Item, context_turns: int, most_characters: int) -> list[Message]:
    """What is sent: instructions, then the material as JSON, so that nothing in it can look like an instruction.

    Old turns are left out first; the response is never cut, so one that is too long is not judged at all.
    """
    rubric = load()
    asked = {
        name: {"question": question.ask, "answers": dict(question.values)}
        for name, question in rubric.questions.items()
    }
    shown = item.turns[-context_turns:] if context_turns else ()
    turns = [{"role": role, "content": content} for role, content in shown]
    while True:
        material = {"card": item.card, "turns": turns, "response": item.response}
        body = json.dumps({"questions": asked, "material": material}, ensure_ascii=False)
        if len(body) <= most_characters or not turns:
            break
        turns = turns[1:]
    if len(body) > most_characters:
        raise ValueError("too_long")
    return [{"role": "system", "content": rubric.instructions.strip()}, {"role": "user", "content": body}]


def schema() -> dict[str, Any]:
    """The JSON schema of an answer: choices only, so an answer holds none of the user's words."""
    questions = load().questions
    return {
        "type": "object",
        "properties": {name: {"type": "string", "enum": list(question.values)} for name, question in questions.items()},
        "required": list(questions),
        "additionalProperties": False,
    }


def parse(answer: str | None) -> dict[str, str]:
    """The choices in an answer, or ValueError with why it is none. Nothing is guessed from prose."""
    if not answer or len(answer) > _LONGEST_ANSWER:
        raise ValueError("empty_answer" if not answer else "prose")
    fenced = _FENCED.fullmatch(answer)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        raise ValueError("prose") from None
    questions = load().questions
    if not isinstance(found, dict) or set(found) != set(questions):
        raise ValueError("wrong_fields")
    if any(not isinstance(value, str) or value not in questions[name].values for name, value in found.items()):
        raise ValueError("wrong_value")
    return found


def verdicts(choices: dict[str, str]) -> Verdicts:
    """What the choices say of every metric."""
    return {name: choices[reading.question] in reading.values for name, reading in load().metrics.items()}


def _text() -> str:
    return (resources.files("flywheel_tasks.evaluation") / "rubric.yaml").read_text(encoding="utf-8")
