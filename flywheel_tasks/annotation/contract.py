"""The file contract with annotation tools (Sec. 2.2.2): tasks go out, reviews come back, one JSON object a line.

These classes are the contract; the JSON Schema files beside them are made from them (`schema`) and tested to agree. A
task names nobody: its id is keyed (nobody without the key can tell which pair or user is behind it), the policies are
blind, and which response stands left is a keyed coin.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

Mode = Literal["static", "interactive", "steerability", "image"]
_LONGEST = 20_000
_Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
_Short = Annotated[str, StringConstraints(min_length=1, max_length=128)]
_Text = Annotated[str, StringConstraints(max_length=_LONGEST)]
_Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Said(_Line):
    role: Literal["user", "assistant"]
    content: str


class Character(_Line):
    """What annotators see of a character: name, description, traits and instructions."""

    name: str
    description: str
    traits: tuple[str, ...]
    instructions: str


class Response(_Line):
    text: str
    tool_call: str | None = Field(None, description="the call of a tool, such as image generation, as JSON text")


class Shown(_Line):
    """Everything a judgement rests on; the digest is over exactly this."""

    character: Character
    history: tuple[Said, ...]
    left: Response
    right: Response


class Question(_Line):
    """One structured question; about `response` it is asked of the left one and of the right one."""

    name: _Name
    about: Literal["response", "pair"] = "response"
    text: str = Field(min_length=1, max_length=500)
    answers: tuple[_Name, ...] = Field(("no", "yes"), min_length=2, max_length=9)
    required: bool = False
    modes: tuple[Mode, ...] = Field(
        ("static", "interactive", "steerability", "image"), description="the modes it is asked in"
    )


class Task(_Line):
    """One pair to judge, for `reviewers` different people."""

    contract: Literal["flywheel.task/1"] = "flywheel.task/1"
    task_id: _Short
    mode: Mode
    reviewers: int = Field(ge=1, le=99)
    locale: str
    language: str | None
    shown: Shown
    questions: tuple[Question, ...]
    digest: _Digest = Field(description="sha256 of `shown`, to be sent back with every review")


class Answer(_Line):
    question: _Name
    about: Literal["left", "right", "pair"]
    answer: _Name


class Review(_Line):
    """What one person answered about one task."""

    contract: Literal["flywheel.annotation/1"] = "flywheel.annotation/1"
    task_id: _Short
    digest: _Digest = Field(description="the digest of the task that was judged")
    shown: Shown | None = Field(None, description="what was on the screen, where the tool can tell; it is compared")
    annotator: _Short = Field(description="the tool's name for the person; it is hashed when it comes in")
    preferred: Literal["left", "right", "tie", "neither"] = Field(description="which response is more engaging")
    strength: int | None = Field(None, ge=1, le=3, description="1 slightly, 2 clearly, 3 much better")
    answers: tuple[Answer, ...] = ()
    rewrite: _Text | None = Field(None, description="a better response, where both fail")
    next_message: _Text | None = Field(None, description="interactive modes: what the person says next")
    seconds: float | None = Field(None, ge=0, le=86_400, allow_inf_nan=False, description="time on the task")
    at: AwareDatetime = Field(description="when it was submitted, with a time zone")


CONTRACTS: dict[str, type[_Line]] = {"task": Task, "annotation": Review}


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of a line of tasks or of annotations."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"flywheel.{name}/1"}
    return head | CONTRACTS[name].model_json_schema()


def schema_text(name: str) -> str:
    """The schema as its file in this package holds it."""
    return json.dumps(schema(name), indent=1, ensure_ascii=False) + "\n"


def page() -> str:
    """The contract in words, as it goes out with every export."""
    return files("flywheel_tasks.annotation").joinpath("CONTRACT.md").read_text(encoding="utf-8")


def digest(shown: Shown) -> str:
    """sha256 of what was shown: UTF-8 JSON with sorted keys and no spaces, so that any tool can compute it."""
    text = json.dumps(shown.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def task_id(pair_id: str, key: bytes) -> str:
    """Stable for a pair, and meaningless to whoever does not hold the key."""
    return "t" + hmac.digest(key, f"annotation task {pair_id}".encode(), "sha256").hex()[:24]


def left(pair_id: str, seed: int, key: bytes) -> str:
    """Which response stands left: a coin that a reader of the export can't work out from ids and seed."""
    return f"y{hmac.digest(key, f'annotation left {seed} {pair_id}'.encode(), 'sha256')[0] & 1}"


def annotator_id(name: str, key: bytes) -> str:
    """The stable stand-in for an annotator."""
    return "a" + hmac.digest(key, f"annotator {name}".encode(), "sha256").hex()[:15]


def core_questions() -> tuple[Question, ...]:
    """The package's questions: the two core ones for every mode, and what a mode mandates."""
    text = files("flywheel_tasks.annotation").joinpath("questions.yaml").read_text(encoding="utf-8")
    return tuple(Question.model_validate(row) for row in yaml.safe_load(text))


def questions_of(report: Mapping[str, Any]) -> dict[str, Question]:
    """What is asked at present, as an export's report states it, by name."""
    return {row["name"]: Question.model_validate(row) for row in report["questions"]}


def asked(questions: tuple[Question, ...], mode: str) -> tuple[Question, ...]:
    return tuple(question for question in questions if mode in question.modes)


def shown(pair: Mapping[str, Any], character: Character, at_left: str) -> Shown:
    """A pair as an annotator sees it, `at_left` (y0 or y1) on the left."""
    sides = [Response(text=pair[y], tool_call=pair[f"tool_call{y[1]}"]) for y in ("y0", "y1")]
    first, second = sides if at_left == "y0" else sides[::-1]
    history = tuple(Said(role=turn["role"], content=turn["content"]) for turn in pair["turns"])
    return Shown(character=character, history=history, left=first, right=second)
