"""The linter's and the features' rules, read from `rules.yaml` (Table 4, Table 7, Sec. 2.4.4)."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flywheel_tasks.core import problems
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.schemas import EXAMPLE_SOURCES

Use = Literal["sft", "prompt"]
Action = Literal["repair", "drop", "keep"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _apostrophes(pattern: str) -> str:
    """Typists and models write several apostrophes; a pattern names one."""
    return pattern.replace("'", "['’ʼ]")


class Phrase(_Part):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    pattern: str
    repair: Literal["interjection", "opener", "sentence", "watch"]

    @field_validator("pattern")
    @classmethod
    def _any_apostrophe(cls, pattern: str) -> str:
        return _compiles(_apostrophes(pattern))


class Limits(_Part):
    emoji: int = Field(ge=0)
    list_items: int = Field(ge=1)
    block_words: int = Field(ge=20)
    paragraph_words: int = Field(ge=10)
    loop_repeats: int = Field(ge=2)
    loop_words: int = Field(ge=4)
    loop_characters: int = Field(ge=20)
    repetition: float = Field(gt=0, le=1)
    repetition_words: int = Field(ge=3)


class Translation(_Part):
    labelled: str
    paragraph: str
    bracketed: str
    asked: str


class Rule(_Part):
    sft: Action
    prompt: Action
    exempt: tuple[str, ...] = Field((), alias="except")

    @field_validator("exempt")
    @classmethod
    def _known(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(sources) - set(EXAMPLE_SOURCES)):
            raise ValueError(f"no source '{unknown[0]}': the sources are {', '.join(EXAMPLE_SOURCES)}")
        return sources


class Rules(_Part):
    version: int
    limits: Limits
    phrases: tuple[Phrase, ...]
    templates: tuple[str, ...]
    refusals: tuple[str, ...]
    translation: Translation
    rules: dict[str, Rule]

    @field_validator("templates", "refusals")
    @classmethod
    def _any_apostrophe(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_compiles(_apostrophes(pattern)) for pattern in patterns)

    @property
    def repaired_phrases(self) -> tuple[Phrase, ...]:
        return tuple(phrase for phrase in self.phrases if phrase.repair != "watch")


def parse(text: str, where: str) -> Rules:
    """Rules from YAML, or which entry of the file is wrong."""
    try:
        return Rules.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        place, what = problems.first(error, Rules)
        raise ConfigError(f"{where}: {place or 'top level'}: {what}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {str(error).splitlines()[0]}") from error


@cache
def load() -> Rules:
    """The rules that ship with the package."""
    return parse(
        (resources.files("flywheel_tasks.style") / "rules.yaml").read_text(encoding="utf-8"), "style/rules.yaml"
    )


def any_of(patterns: tuple[str, ...]) -> str:
    """One pattern that matches where any of them does, whatever the case."""
    return "(?i)" + "|".join(f"(?:{pattern})" for pattern in patterns)


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
    return pattern
