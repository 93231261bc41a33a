"""What the gate decides on (Sec. 2.5.1, 2.6, 3.1.2): one JSON document, checked to the last field.

A field that is not known, a number that is none, a rate outside [0, 1] or a rate of nothing is refused, because what
is not read can't guard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from flywheel_tasks.core import problems
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.stats.winrate import Interval, wilson

Percentage = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53, strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]

REWARD_MODELS = ("pointwise_internal", "pointwise_user", "pairwise_user")
MAX_BYTES = 16 << 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Rate(_Part):
    """A proportion of n rows; `low` and `high` are its interval where rows are clustered, else Wilson's is used."""

    rate: Percentage
    n: Annotated[int, Field(ge=1, le=2**53, strict=True)]
    low: Percentage | None = None
    high: Percentage | None = None

    @model_validator(mode="after")
    def _brackets(self) -> Rate:
        if (self.low is None) != (self.high is None):
            raise ValueError("give both low and high, or neither")
        if self.low is not None and self.high is not None and not self.low <= self.rate <= self.high:
            raise ValueError(f"the interval [{self.low:g}, {self.high:g}] does not hold the rate {self.rate:g}")
        return self

    def bounds(self, alpha: float) -> Interval:
        if self.low is not None and self.high is not None:
            return self.low, self.high
        return wilson(self.rate, self.n, alpha)


class WinRates(_Part):
    """How often each reward model prefers the candidate over the champion."""

    pointwise_internal: Rate | None = None
    pointwise_user: Rate | None = None
    pairwise_user: Rate | None = None


class Judge(_Part):
    """How far the judge behind a metric agrees with human labels (Cohen's kappa)."""

    name: Name
    kappa: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
    n: Annotated[int, Field(ge=1)]


class Change(_Part):
    """One metric of both models on the same prompts."""

    candidate: Rate
    champion: Rate
    judge: Judge | None = None
    unusable: str | None = None
    """Why the number may be looked at but can't decide."""


class Metrics(_Part):
    """Table 4's metrics that guard a release: shares of responses that fail."""

    instruction_violation: Change | None = None
    false_refusal_internal: Change | None = None
    false_refusal_user: Change | None = None


class Drift(_Part):
    """How far a style feature moved from the champion's distribution, as a standardised distance (0 is no move)."""

    distance: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] | None = None
    n: Count
    alert: Annotated[bool, Field(strict=True)] = False
    """The style monitor's own alarm: the move is certain and beyond its bound."""
    unusable: str | None = None
    """Why the distance, where there is one, is no more than noise."""

    @model_validator(mode="after")
    def _measured(self) -> Drift:
        if self.unusable is None and (self.distance is None or self.n < 1):
            raise ValueError("give a distance over at least one response, or say in 'unusable' why there is none")
        return self


class Safety(_Part):
    """The share of the candidate's responses that a safety evaluation flags."""

    suite: Name
    unsafe: Change


class RedTeam(_Part):
    """The sign-off of the red-teaming review of this candidate (Sec. 2.6)."""

    candidate: Name
    signed_off: Annotated[bool, Field(strict=True)]
    by: Name
    at: AwareDatetime
    open_findings: Count = 0


class Loss(_Part):
    """How much of the earlier version's accuracy on an old batch the new one lost, on the same pairs (Table 8)."""

    batch: Annotated[str, Field(pattern=r"^\d{6}$")]
    mode: Name = "static"
    n: Annotated[int, Field(ge=1)]
    drop: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
    low: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
    high: Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class RewardModel(_Part):
    """The preference model that judged: its accuracy on held-out pairs, and what it lost on old batches."""

    version: Name
    accuracy: Rate
    lost_on_old_batches: tuple[Loss, ...] = ()


class Overlap(_Part):
    """How many evaluation prompts also occur in training data, by hash."""

    prompts: Annotated[int, Field(ge=1)]
    leaked: Count
    examples: tuple[Name, ...] = ()


class Evidence(_Part):
    """Everything known about a candidate."""

    candidate: Name | None = None
    champion: Name | None = None
    candidate_made_at: AwareDatetime | None = None
    rm_win_rate: WinRates | None = None
    human_win_rate: Rate | None = None
    metrics: Metrics | None = None
    style_drift: dict[Name, Drift] | None = Field(None, min_length=1)
    safety: Safety | None = None
    red_team: RedTeam | None = None
    benchmarks: dict[Name, Change] | None = Field(None, min_length=1)
    reward_models: dict[Literal["pointwise", "pairwise"], RewardModel] | None = Field(None, min_length=1)
    overlap: Overlap | None = None
    measured_at: dict[str, AwareDatetime] | None = Field(None, min_length=1)
    unmeasured: dict[Name, str] = {}
    """What should have been measured and was not, with the reason: never a silent gap."""

    @model_validator(mode="after")
    def _dates_of_sections(self) -> Evidence:
        unknown = sorted(set(self.measured_at or {}) - set(SECTIONS))
        if unknown:
            raise ValueError(f"measured_at names '{unknown[0]}': legal are {', '.join(SECTIONS)}")
        return self

    def has(self, path: str) -> bool:
        """Whether the section, or the part of it after a dot, is there."""
        found: Any = self
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
            if found is None:
                return False
        return not isinstance(found, WinRates | Metrics) or any(v is not None for v in vars(found).values())


SECTIONS = (
    "rm_win_rate", "human_win_rate", "metrics", "style_drift", "safety", "red_team", "benchmarks", "reward_models",
    "overlap",
)  # fmt: skip
_PARTS: dict[str, tuple[str, ...] | None] = {
    "rm_win_rate": REWARD_MODELS,
    "metrics": tuple(Metrics.model_fields),
    "reward_models": ("pointwise", "pairwise"),
    "benchmarks": None,
    "style_drift": None,
}


def is_requirable(path: str) -> bool:
    """Whether a profile may require this piece of evidence."""
    section, dot, part = path.partition(".")
    if not dot:
        return section in SECTIONS or section in ("measured_at", "candidate", "champion", "candidate_made_at")
    return section in _PARTS and bool(part) and ((legal := _PARTS[section]) is None or part in legal)


def parse(data: bytes, where: str) -> Evidence:
    """The evidence in a JSON document, or one line that says what is wrong with it."""
    if len(data) > MAX_BYTES:
        raise InputError(f"{where}: {len(data):,} bytes; evidence is at most {MAX_BYTES:,}")
    try:
        body = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
        return Evidence.model_validate(body)
    except ValidationError as error:
        at, what = problems.first(error, Evidence)
        raise InputError(f"{where}: {at or 'the document'}: {what}{problems.given(error)}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply to be evidence") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that is given twice has two values, and one of them would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key[:80]}' is given twice")
        found[key] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
