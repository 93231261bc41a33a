"""The judge behind Table 4's judged metrics: one interface to the embedded rules, an endpoint, or a model in process.

A judgement has a name made of everything it depends on, so it is asked for once and remembered. What a judge did not
answer in time and in form is missing, with a reason; it is never guessed. Where too much is missing because the judge
was not there, the stage stops, so that a later try asks for the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, model_validator

from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.evaluation import rubric
from flywheel_tasks.evaluation.rubric import Item, Message, Verdicts
from flywheel_tasks.style.features import Exchange, measure

Kind = Literal["rules", "http", "vllm"]
_OF_THE_RESPONSE = frozenset(
    ("empty_response", "too_long", "cut_off", "empty_answer", "prose", "wrong_fields", "wrong_value")
)
"""Why a judge that is there gives no judgement: to ask again would give none again."""
_REFUSED = frozenset(("http_400", "http_413", "http_422"))
"""What an endpoint says to a request that is too long for its model; to every request, where it can't do as asked."""


class JudgeConfig(StageConfig):
    kind: Kind = Field(
        "rules",
        description="rules: the embedded refusal patterns, for false refusal and cooperation alone; http: an "
        "OpenAI-compatible endpoint; vllm: a judge model in this process",
    )
    url: str | None = Field(None, description="http: base URL of the endpoint, such as http://judge:8000/v1")
    model: str | None = Field(None, description="http: the served model's name; vllm: a folder or package:NAME")
    key_variable: str = Field(
        "FLYWHEEL_JUDGE_KEY", description="http: environment variable with the endpoint's key, if it wants one"
    )
    context_turns: int = Field(8, ge=0, le=256, description="turns before the response that the judge sees")
    most_characters: int = Field(24_000, ge=2_000, description="longest request; older turns are left out first")
    max_tokens: int = Field(200, ge=16, le=4096, description="longest answer")
    request_timeout_s: float = Field(30, gt=0, description="http: time for one try", json_schema_extra=Operational)
    retries: int = Field(3, ge=0, le=20, description="http: further tries of a request", json_schema_extra=Operational)
    deadline_s: float = Field(
        3600, gt=0, description="time for all requests; what is left then is missing", json_schema_extra=Operational
    )
    parallel: int = Field(16, ge=1, le=512, description="http: requests at once", json_schema_extra=Operational)
    least_agreement: float = Field(
        0.6, ge=-1, le=1, description="lower end of the interval of Cohen's kappa with people, below which a metric of "
        "this judge can't gate",
    )  # fmt: skip
    most_missing: float = Field(
        0.05, ge=0, le=1, description="share of missing judgements above which a metric can't gate"
    )

    @model_validator(mode="after")
    def _complete(self) -> JudgeConfig:
        if self.kind == "http" and not (self.url or "").startswith(("http://", "https://")):
            raise ValueError("an http judge needs url, an http:// or https:// address")
        if self.kind != "rules" and not self.model:
            raise ValueError(f"a judge of kind {self.kind} needs model")
        return self

    def name(self) -> str:
        """The judge as it is printed beside its numbers."""
        return "rules" if self.kind == "rules" else f"{self.kind}:{self.model} rubric {rubric.load().version}"


class Answer(NamedTuple):
    """What came back for a request (by its place): the raw answer, or why there is none."""

    request: int
    text: str | None
    missing: str | None


Backend = Callable[[Sequence[list[Message]], JudgeConfig], Iterator[Answer]]


class Judged(NamedTuple):
    """For every item its verdict, or None and the reason; and the judgements by name."""

    verdicts: list[Verdicts | None]
    reasons: list[str | None]
    judgements: dict[str, dict[str, str]]

    @property
    def missing(self) -> Counter[str]:
        """How many verdicts are missing, by reason."""
        return Counter(reason for reason in self.reasons if reason)


def judge(
    items: Sequence[Item],
    config: JudgeConfig,
    known: Mapping[str, Mapping[str, str]] | None = None,
    remember: Callable[[dict[str, dict[str, str]]], None] | None = None,
    backend: Backend | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Judge every item once; equal items share a judgement, and `known` ones are not asked for again.

    `remember` is handed what is new every so often, so that an attempt that dies leaves its judgements behind.
    """
    if config.kind == "rules":
        ruled = by_rules([item.response for item in items])
        return Judged(ruled, [None if verdict else "empty_response" for verdict in ruled], {})
    weights = _weights(config)
    names: list[str] = []
    asked: dict[str, list[Message]] = {}
    missing: dict[str, str] = {}
    for number, item in enumerate(items):
        try:
            messages = rubric.messages(item, config.context_turns, config.most_characters)
            name = judgement_name(messages, config, weights)
            asked.setdefault(name, messages)
        except ValueError as error:
            name = f"unasked-{number}"
            missing[name] = str(error)
        names.append(name)
    found = {name: dict((known or {})[name]) for name in asked if name in (known or {})}
    wanted = [name for name in asked if name not in found]
    new: dict[str, dict[str, str]] = {}
    ask = backend or _backend(config.kind)
    for done, answer in enumerate(ask([asked[name] for name in wanted], config), start=1):
        name = wanted[answer.request]
        try:
            new[name] = rubric.parse(answer.text) if answer.missing is None else _refuse(answer.missing)
        except ValueError as error:
            missing[name] = str(error)
        if remember and len(new) >= _REMEMBER:
            remember(new)
            found |= new
            new = {}
        if progress:
            progress(done, len(wanted))
    if remember and new:
        remember(new)
    found |= new
    verdicts = [rubric.verdicts(found[name]) if name in found else None for name in names]
    reasons = [None if name in found else missing.get(name, "unanswered") for name in names]
    return Judged(verdicts, reasons, found)


_REMEMBER = 256


def refuse_outage(judged: Judged, rows: Sequence[int], what: str, config: JudgeConfig) -> None:
    """Stop where the judge was not there for all of these rows (`what` they are), or for more than may be missing.

    A stage that stops is tried again, and asks only for what is left; what it commits with a hole stays so.
    """
    known = _OF_THE_RESPONSE | _REFUSED if any(judged.verdicts) else _OF_THE_RESPONSE
    lost = Counter(reason for row in rows if (reason := judged.reasons[row]) and reason not in known)
    if lost and (lost.total() == len(rows) or lost.total() > config.most_missing * len(rows)):
        why = ", ".join(f"{reason} {count}" for reason, count in lost.most_common())
        raise FlywheelError(
            f"metrics: the judge {config.name()} gave no answer for {lost.total()} of {len(rows)} {what} ({why}): see "
            "that it runs, or give it more time (metrics.judge.deadline_s, request_timeout_s, retries), and run again; "
            "what it answered is kept"
        )


def judgement_name(messages: Iterable[Message], config: JudgeConfig, weights: str = "") -> str:
    """A digest of all that a judgement depends on: the judge, its rubric, and what it is shown. A judge in this process
    is its weights, wherever they lie; of an endpoint only its address and the model's name are known."""
    whole = {"judge": [config.kind, config.url, weights or config.model, config.max_tokens], "rubric": rubric.digest()}
    body = json.dumps(whole | {"messages": list(messages)}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def by_rules(responses: Sequence[str]) -> list[Verdicts | None]:
    """The embedded judge: a response that declines, by the refusal patterns of the style rules.

    Prompts have passed the safety filter, so to decline one is a false refusal. A linear model over n-grams, trained on
    the labelled completions of one policy, was no better than chance on another policy's; the patterns hold up.
    """
    found = measure(Exchange(pa.array(responses, pa.string())), ["templated_refusal", "empty"])
    return [
        None if empty else {"false_refusal": bool(declines), "cooperative_ratio": not declines}
        for declines, empty in zip(found["templated_refusal"], found["empty"], strict=True)
    ]


def _weights(config: JudgeConfig) -> str:
    if config.kind != "vllm":
        return ""
    from flywheel_tasks.evaluation.weights import digest
    from flywheel_tasks.models.resolve import local_folder

    return digest(local_folder(config.model or ""))


def _refuse(reason: str) -> dict[str, str]:
    raise ValueError(reason)


def _backend(kind: Kind) -> Backend:
    if kind == "http":
        from flywheel_tasks.evaluation import judge_http

        return judge_http.ask
    from flywheel_tasks.evaluation import judge_vllm

    return judge_vllm.ask


def response_format() -> dict[str, Any]:
    """The structured output that is asked for, in the words of the OpenAI protocol."""
    return {"type": "json_schema", "json_schema": {"name": "judgement", "strict": True, "schema": rubric.schema()}}
