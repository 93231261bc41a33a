"""Phase I, safety (Sec. 2.2.1, 2.6): a classifier reads every prompt and every response, and fails closed.

A classifier is any function from turns to the probability that each is unsafe. A turn that it could not judge is NaN,
and a conversation with such a turn is rejected: it never passes unread.
"""

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, model_validator

from flywheel_tasks.core.config import StageConfig

FloatArray = npt.NDArray[np.float64]

SAFE_SHARE: Final = 0.9
"""A guard's requests end within this share of a batch's time: its answers are in before the batch is given up."""


class Turns(NamedTuple):
    """Turns of whole conversations in order; `first[i]` is the index at which turn i's conversation begins."""

    content: pa.StringArray
    role: pa.StringArray
    first: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> "Turns":
        """Turns [start, stop); a conversation cut in two keeps what lies inside."""
        first = np.maximum(self.first[start:stop] - start, 0)
        return Turns(self.content[start:stop], self.role[start:stop], first)


Classifier = Callable[[Turns], FloatArray]


class SafetyConfig(StageConfig):
    """Which classifier judges the turns, and from which probability on a turn is unsafe."""

    classifier: Literal["linear", "guard-http", "guard-vllm"] = Field(
        "linear",
        description="linear: the small embedded default; guard-http: a guard model behind an OpenAI-style endpoint; "
        "guard-vllm: a guard model in this process",
    )
    weights: str = Field(
        "safety", description="linear: name of packaged weights, or a safetensors file written by curation.fit"
    )
    threshold: float | None = Field(
        None, gt=0, lt=1, description="a turn at or above it is unsafe (default: the weights' own)"
    )
    guard_url: str | None = Field(
        None, description="guard-http: base URL of the endpoint, such as http://guard:8000/v1"
    )
    guard_model: str | None = Field(
        None, description="guard: the served model's name, or for guard-vllm its local folder"
    )
    guard_key_variable: str = Field(
        "FLYWHEEL_GUARD_KEY", description="environment variable with the endpoint's key, if it wants one"
    )
    guard_context: int = Field(4, ge=1, le=64, description="guard: turns of context it sees, the judged one included")
    guard_allowed: tuple[str, ...] = Field(
        (), description="guard: hazard categories (S1, S2 …) that alone do not make a turn unsafe"
    )
    guard_parallel: int = Field(16, ge=1, le=512, description="guard-http: requests under way at once")
    request_timeout_s: float = Field(20.0, gt=0, description="guard-http: time for one request")
    batch_turns: int = Field(
        4096, ge=1,
        description="turns per call of the classifier; guard-http takes no more than its requests, each as slow as "
        "request_timeout_s allows, can answer within timeout_s",
    )  # fmt: skip
    timeout_s: float = Field(
        120.0, gt=0, description="time for one batch; past it every turn of the batch counts as not judged"
    )

    @model_validator(mode="after")
    def _complete(self) -> "SafetyConfig":
        if self.classifier == "guard-http" and not (self.guard_url or "").startswith(("http://", "https://")):
            raise ValueError("guard-http needs guard_url, an http:// or https:// address")
        if self.classifier != "linear" and not self.guard_model:
            raise ValueError(f"{self.classifier} needs guard_model")
        return self

    def turns_per_call(self) -> int:
        """A batch that the classifier can judge in time, however slow its answers."""
        if self.classifier != "guard-http":
            return self.batch_turns
        rounds = int(SAFE_SHARE * self.timeout_s / self.request_timeout_s)
        return min(self.batch_turns, self.guard_parallel * max(1, rounds))


def judge(classifier: Classifier, turns: Turns, batch_turns: int, timeout_s: float) -> FloatArray:
    """Probabilities for all turns, NaN where the classifier raised, ran out of time, or gave no probability."""
    parts = [
        _judge_batch(classifier, turns.part(start, stop), timeout_s) for start, stop in _batches(turns, batch_turns)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def linear(weights: str) -> Classifier:
    """The embedded default: hashed n-grams with the packaged weights, or weights of one's own."""
    from flywheel_tasks.curation import ngrams

    model = ngrams.load(weights)
    return lambda turns: ngrams.probabilities(model, turns.content)


@cache
def classifier_and_threshold(config: SafetyConfig) -> tuple[Classifier, float]:
    """The configured classifier, loaded once per process."""
    if config.classifier == "linear":
        from flywheel_tasks.curation import ngrams

        return linear(config.weights), config.threshold or ngrams.load(config.weights).threshold
    from flywheel_tasks.curation import guard

    make = guard.over_http if config.classifier == "guard-http" else guard.in_process
    return make(config), config.threshold or 0.5


def _batches(turns: Turns, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole conversations of about `size` turns; one conversation is never cut."""
    starts = np.append(np.unique(turns.first), len(turns.content))
    begin = 0
    while begin < len(turns.content):
        reach = int(np.searchsorted(starts, begin + size, side="right")) - 1
        end = int(max(starts[reach], starts[np.searchsorted(starts, begin, side="right")]))
        yield begin, end
        begin = end


def _judge_batch(classifier: Classifier, turns: Turns, timeout_s: float) -> FloatArray:
    """One bad turn must not reject its neighbours: a batch that raises is halved; one that hangs is given up."""
    unknown = np.full(len(turns.content), np.nan)
    scores = _within(classifier, turns, timeout_s)
    if isinstance(scores, TimeoutError):
        return unknown
    if isinstance(scores, Exception):
        starts = np.unique(turns.first)
        if len(starts) < 2:
            return unknown
        middle = int(starts[len(starts) // 2])
        halves = turns.part(0, middle), turns.part(middle, len(turns.content))
        return np.concatenate([_judge_batch(classifier, half, timeout_s) for half in halves])
    if not isinstance(scores, np.ndarray) or scores.shape != unknown.shape:
        return unknown
    return np.where((scores >= 0) & (scores <= 1), scores, np.nan)


def _within(classifier: Classifier, turns: Turns, timeout_s: float) -> FloatArray | Exception:
    """What the classifier returns or raises, or TimeoutError when it is not done in time."""
    outcome: list[FloatArray | Exception] = []

    def call() -> None:
        try:
            outcome.append(classifier(turns))
        except Exception as error:
            outcome.append(error)

    # A daemon thread, because a pool would wait for a hung classifier when the process ends.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return outcome[0] if outcome else TimeoutError(f"no answer in {timeout_s} s")
