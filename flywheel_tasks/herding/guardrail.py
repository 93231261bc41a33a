"""Guardrails of RL (Sec. 2.5.1, 3.1.2): how far the policy has come from where it began, and when that is far enough.

On held-out prompts the current policy's responses are set against those of the policy it began as: win-rates by the
pointwise and by the pairwise preference model (a tie is half a win), the mean KL, length, emoji, lists, entropy. A
reward model is right about responses like those it learned from. A win-rate of some 60 % is as far as it can be
trusted; the version that reached 70.7 % by it was the one that users left (V12). So the run ends at the ideal, and
no checkpoint at or beyond the hard limit, or that was not measured, is handed out. The higher of the two win-rates
decides, and a judge that could read too few of the responses ends the run like one that was won over: the rest may be
what it was won by.

A policy can also become worse than it began. Where every judge is certain of that, its whole interval below one half,
the run ends too, and that checkpoint is not handed out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.stats.winrate import WinRate, outcomes, win_rate
from flywheel_tasks.style import features

if TYPE_CHECKING:
    from flywheel_tasks.models.chat import Card
    from flywheel_tasks.models.score import PairRow

Floats = NDArray[np.float64]
PREFIX = "guard/"
_JUDGES = ("pointwise", "pairwise")
_EVEN = 0.5


class GuardrailConfig(StageConfig):
    """When the policy is measured against its start, and where it stops."""

    every: int = Field(10, ge=1, description="steps between two measurements, each with a published checkpoint")
    prompts: int = Field(256, ge=1, description="held-out prompts that are answered at most")
    ideal: float = Field(
        0.60, gt=0.5, lt=1, description="win-rate over the start at which the run ends; the output is nearest to it"
    )
    hard: float = Field(0.65, gt=0.5, le=1, description="win-rate from which a checkpoint is never the output (V12)")
    coverage: float = Field(
        0.9, gt=0, le=1, description="share of the prompts that each judge must have compared, or the run ends"
    )
    alpha: float = Field(0.05, gt=0, lt=1, description="level of the intervals")
    draws: int = Field(500, ge=200, le=100_000, description="bootstrap draws over characters")

    @model_validator(mode="after")
    def _ordered(self) -> GuardrailConfig:
        if not self.ideal < self.hard:
            raise ValueError(f"guardrail.ideal {self.ideal} must be below guardrail.hard {self.hard}")
        return self


class Style(NamedTuple):
    """What a set of responses looks like: mean tokens, and shares."""

    tokens: float
    emoji: float
    lists: float
    unfinished: float


class Guard(NamedTuple):
    """The policy after `step` steps, beside the one it began as. A win-rate is None where that judge is absent, and not
    a number where it read too little."""

    step: int
    pointwise: WinRate | None
    pairwise: WinRate | None
    now: Style
    start: Style
    kl: float | None
    entropy: float | None
    n: int

    @property
    def rates(self) -> dict[str, float]:
        return {name: found.rate for name, found in self._judged.items()}

    @property
    def highs(self) -> dict[str, float]:
        return {name: found.high for name, found in self._judged.items()}

    @property
    def _judged(self) -> dict[str, WinRate]:
        judged = {"pointwise": self.pointwise, "pairwise": self.pairwise}
        return {name: found for name, found in judged.items() if found is not None}

    def metrics(self) -> dict[str, float]:
        """What is logged at this step."""
        known = self.rates and not _unread(self)
        found: dict[str, float] = {"prompts": self.n, "win_rate": _highest(self) if known else math.nan}
        for name, rate in self._judged.items():
            found |= {
                f"n_{name}": rate.n, f"win_rate_{name}": rate.rate,
                f"win_rate_{name}_low": rate.low, f"win_rate_{name}_high": rate.high,
            }  # fmt: skip
        found |= self.now._asdict() | {f"start_{name}": value for name, value in self.start._asdict().items()}
        found |= {name: value for name, value in (("kl", self.kl), ("entropy", self.entropy)) if value is not None}
        return {PREFIX + name: float(value) for name, value in found.items() if math.isfinite(value)}


class Level(NamedTuple):
    """As much of a measurement as decides: its step, and of each judge the win-rate and its interval's upper end."""

    step: int
    rates: Mapping[str, float]
    highs: Mapping[str, float]


class Verdict(NamedTuple):
    """go: train on. soft: the ideal is reached. hard: the policy is past what the judges can be trusted with. lost: it
    is certainly worse than it began."""

    level: Literal["go", "soft", "hard", "lost"]
    reason: str


# -- measures


def measure(
    step: int,
    current: pa.Table,
    start: pa.Table,
    *,
    pointwise: tuple[Floats, Floats] | None,
    pairwise: Floats | None,
    config: GuardrailConfig,
    kl: float | None = None,
    entropy: float | None = None,
    seed: int = 0,
) -> Guard:
    """Both policies' responses (schema `completion`, row i of both to the same prompt) compared. `pointwise` holds the
    scores of the current and of the first policy, `pairwise` P(the current one is preferred) in both orders averaged.

    A policy that did not answer has lost; where neither did, or a judge could not read one, the row says nothing.
    """
    if current["prompt_id"].to_pylist() != start["prompt_id"].to_pylist():
        raise InputError(
            f"{current.num_rows} responses of the current policy and {start.num_rows} of the first are not to the same "
            "prompts: they can't be compared"
        )
    lost, won = _failed(current), _failed(start)
    judged: dict[str, Floats] = {}
    if pointwise is not None:
        judged["pointwise"] = outcomes(pointwise[0], pointwise[1], lost, won)
    if pairwise is not None:
        judged["pairwise"] = outcomes(pairwise, 1 - pairwise, lost, won)
    if not judged:
        raise InputError("no judge: the guardrails need the pointwise or the pairwise preference model, or both")
    rates = {name: _rate(outcome, current, config, seed) for name, outcome in judged.items()}
    return Guard(
        step, rates.get("pointwise"), rates.get("pairwise"), style(current), style(start), kl, entropy, current.num_rows
    )


def style(completions: pa.Table) -> Style:
    """Length, emoji, lists and responses that did not end, over the responses that came."""
    answered = completions.filter(pa.array(~_failed(completions)))
    if not answered.num_rows:
        return Style(math.nan, math.nan, math.nan, math.nan)
    found = features.measure(features.Exchange(answered["text"].combine_chunks()), ("has_emoji", "has_list"))
    tokens = answered["tokens"].to_numpy(zero_copy_only=False)
    unfinished = np.asarray(answered["finish"].to_pylist()) == "length"
    return Style(
        float(tokens.mean()), float(found["has_emoji"].mean()), float(found["has_list"].mean()),
        float(unfinished.mean()),
    )  # fmt: skip


def mean_kl(completions: pa.Table, start_logprob: Floats) -> float:
    """KL(current || start) in nats per token, on the current policy's own responses: the mean of
    log pi(y|x) - log pi_start(y|x) over all their tokens. `start_logprob` is each response's sum under the start."""
    own = np.asarray(completions["logprob"].to_numpy(zero_copy_only=False), dtype=np.float64)
    tokens = completions["tokens"].to_numpy(zero_copy_only=False).astype(np.float64)
    known = np.isfinite(own) & np.isfinite(start_logprob) & (tokens > 0)
    if not known.any():
        raise InputError("no response has log-probabilities under both policies: their divergence is unknown")
    return float((own - start_logprob)[known].sum() / tokens[known].sum())


def pairwise_rows(current: pa.Table, start: pa.Table, cards: Mapping[str, Card]) -> list[PairRow]:
    """What the pairwise model reads: the current policy's response as y0, the first one's as y1."""
    from flywheel_tasks.models.chat import card_of
    from flywheel_tasks.models.score import PairRow

    columns = [current[name].to_pylist() for name in ("turns", "text", "character_id")]
    return [
        PairRow(turns, y0, y1, card_of(cards, character))
        for turns, y0, character, y1 in zip(*columns, start["text"].to_pylist(), strict=True)
    ]


# -- decisions


def of_metrics(step: int, metrics: Mapping[str, float]) -> Level | None:
    """What a step's logged metrics say of its measurement; None where none was taken. The win-rate of a judge that read
    too little is not a number, so it was not logged: how many rows it read was."""
    judges = [judge for judge in _JUDGES if f"{PREFIX}n_{judge}" in metrics]
    rates, highs = (
        {judge: metrics.get(f"{PREFIX}win_rate_{judge}{end}", math.nan) for judge in judges} for end in ("", "_high")
    )
    return Level(step, rates, highs) if rates else None


def verdict(found: Guard | Level, config: GuardrailConfig) -> Verdict:
    """Whether to go on. The higher win-rate decides: a policy that games one judge is past it, whatever the other says.

    A win-rate that is not a number stops the run: what can't be measured can't be guarded.
    """
    if not found.rates or _unread(found):
        judges = "".join(
            f" ({name} compared less than {config.coverage:.0%} of the prompts)" for name in _unread(found)
        )
        return Verdict("hard", f"hard stop at step {found.step}: no win-rate over the start could be measured{judges}")
    rate, shown = _highest(found), ", ".join(f"{name} {rate:.3f}" for name, rate in found.rates.items())
    if rate >= config.hard:
        return Verdict(
            "hard",
            f"hard stop at step {found.step}: win-rate over the start ({shown}) is at or above {config.hard:g}, where "
            "it no longer means that people prefer it (V12)",
        )
    if rate >= config.ideal:
        return Verdict("soft", f"soft stop at step {found.step}: win-rate over the start ({shown}) is at its ideal")
    if all(high < _EVEN for high in found.highs.values()):
        return Verdict(
            "lost",
            f"stop at step {found.step}: the policy is certainly worse than its start, win-rates over it ({shown}) are "
            "below one half by their whole intervals",
        )
    return Verdict("go", f"step {found.step}: win-rate over the start ({shown}) is below {config.ideal:g}")


def nearest(guards: Sequence[Guard | Level], published: Sequence[int], config: GuardrailConfig) -> int:
    """The step of the published checkpoint whose win-rate is nearest to the ideal; of equals the earlier. A checkpoint
    at or above the hard limit, one that certainly lost, or one that was not measured, is never chosen."""
    known = trusted(guards, published, config)
    if not known:
        why = {
            "certainly lost to the start": [f.step for f in guards if verdict(f, config).level == "lost"],
            f"had a judge that compared less than {config.coverage:.0%} of the prompts: raise max_tokens of the "
            "preference models, or lower rl.guardrail.coverage": [f.step for f in guards if _unread(f)],
        }
        reasons = "".join(f" (steps {', '.join(map(str, at))} {what})" for what, at in why.items() if at)
        raise FlywheelError(
            f"no published checkpoint (steps {', '.join(map(str, published)) or 'none'}) is below the hard limit of "
            f"{config.hard:g} and no certain loss{reasons}: the policy runs away from its start; lower "
            "rl.train.learning_rate, raise the KL weight, look at the weights of rl.reward, or measure more often "
            "(rl.guardrail.every)"
        )
    return min(known, key=lambda step: (round(abs(known[step] - config.ideal), 12), step))


def trusted(guards: Sequence[Guard | Level], published: Sequence[int], config: GuardrailConfig) -> dict[int, float]:
    """Step and win-rate of the published checkpoints that may be handed out: those measured below the hard limit, and
    not certain to have lost."""
    found = {found.step: _highest(found) for found in guards if verdict(found, config).level in ("go", "soft")}
    return {step: found[step] for step in sorted(set(found) & set(published))}


def _highest(found: Guard | Level) -> float:
    return max(found.rates.values())


def _unread(found: Guard | Level) -> list[str]:
    return [name for name, rate in found.rates.items() if not math.isfinite(rate)]


def _rate(outcome: Floats, current: pa.Table, config: GuardrailConfig, seed: int) -> WinRate:
    known = np.isfinite(outcome)
    if not known.any() or known.mean() < config.coverage:
        return WinRate(math.nan, math.nan, math.nan, int(known.sum()), 0, 0, 0, 0)
    characters = np.asarray(current["character_id"].to_pylist(), object)[known]
    return win_rate(outcome[known], characters.tolist(), alpha=config.alpha, draws=config.draws, seed=seed)


def _failed(completions: pa.Table) -> NDArray[np.bool_]:
    return np.asarray(np.asarray(completions["finish"].to_pylist(), dtype=np.str_) == "error", dtype=np.bool_)
