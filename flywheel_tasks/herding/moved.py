"""How far a patch moved the policy, by step: KL to its start on its own samples, and drift of its style (Sec. 2.4.2).

The pairs of a preference set were not drawn by the policy, so what it does to their tokens is no KL. Here each exported
checkpoint answers the same prompts through the engine; the start says how likely it holds those very tokens, and
answers the prompts itself to be compared with in style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.herding.exported import WatchConfig
from flywheel_tasks.models.chat import Card, Template, load_tokenizer
from flywheel_tasks.models.engine import Completion, Engine, Request
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.generate import encoded, encoder
from flywheel_tasks.style import monitor


@dataclass(frozen=True)
class Distance:
    """Metrics of each exported step, and the comparisons of style that they come from."""

    by_step: Mapping[int, Mapping[str, float]]
    style: Sequence[monitor.Comparison]

    def as_json(self) -> dict[str, Any]:
        steps = {str(step): dict(values) for step, values in self.by_step.items()}
        return {"by_step": steps, "style": [comparison.as_json() for comparison in self.style]}


@dataclass
class Watch:
    """The same prompts put to every engine that passes by; at the end, to the start."""

    base: Path
    prompts: pa.Table
    cards: Mapping[str, Card]
    config: WatchConfig
    seed: int
    drawn: dict[int, list[Completion]] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)

    def choose(self, context: int) -> None:
        """The first prompts that leave room for an answer in the engine's context: pairs are trained within another
        limit."""
        encode = encoder(self._template, self.cards, context - self.config.max_tokens)
        rows = []
        for i, row in enumerate(self.prompts.to_pylist()):
            if tokens := encoded(encode, row, {}):
                self.asked.append(Request(row["prompt_id"], tokens))
                rows.append(i)
            if len(rows) == self.config.prompts:
                break
        if not rows:
            raise InputError(
                f"none of {self.prompts.num_rows} prompts of the patch leaves room for an answer of "
                f"{self.config.max_tokens} tokens in a context of {context}: raise dpo.serving.engine.context or "
                "lower dpo.watch.max_tokens"
            )
        self.prompts = self.prompts.take(pa.array(rows))

    def look(self, step: int, engine: Engine) -> None:
        """What the checkpoint of this step answers."""
        self.drawn[step] = self._answers(engine)

    def against(self, start: Engine) -> Distance:
        """Every checkpoint seen, set against the policy it started as."""
        before = self._table(self._answers(start))
        found, comparisons = {}, []
        for step, drawn in sorted(self.drawn.items()):
            style = monitor.between(self._table(drawn), before, f"step-{step}", "start", self.config.style)
            effects = {f"style/{f.name}": f.effect.size for f in style.findings if f.effect.size is not None}
            found[step] = {"kl": kl(start, self.asked, drawn), **effects, "style/drifted": float(len(style.alerts))}
            comparisons.append(style)
        return Distance(found, comparisons)

    def _answers(self, engine: Engine) -> list[Completion]:
        if not self.asked:
            self.choose(engine.context)
        drawn = engine.generate(self.asked, Sampling(max_tokens=self.config.max_tokens, seed=self.seed))
        if failed := next((one for one in drawn if one.finish == "error"), None):
            raise FlywheelError(f"prompt {failed.id} was not answered: {failed.reason}")
        return drawn

    @property
    def _template(self) -> Template:
        return Template(load_tokenizer(self.base))

    def _table(self, drawn: Sequence[Completion]) -> pa.Table:
        decoded = self._template.tokenizer.batch_decode([one.tokens for one in drawn], skip_special_tokens=True)
        return self.prompts.append_column("text", pa.array([text.strip() for text in decoded], pa.string()))


def prompts_of(preferences: pa.Table) -> pa.Table:
    """The prompts of the pairs, each once."""
    ids = np.asarray(preferences["prompt_id"].to_pylist(), object).astype(str)
    first = np.sort(np.unique(ids, return_index=True)[1])
    return preferences.select(["prompt_id", "character_id", "turns"]).take(pa.array(first))


def kl(start: Engine, asked: Sequence[Request], drawn: Sequence[Completion]) -> float:
    """KL(policy || start) per token, without bias on the policy's own samples and never negative: the mean of
    r - 1 - log r with r = p_start / p_policy."""
    pairs = [(prompt.tokens, one) for prompt, one in zip(asked, drawn, strict=True) if one.tokens]
    if not pairs:
        raise FlywheelError("the policy answered every prompt with nothing: there is no distance to measure")
    scored = start.score([Request(one.id, [*tokens, *one.tokens]) for tokens, one in pairs])
    apart = [
        np.subtract(row[len(tokens) - 1 :], one.logprobs) for (tokens, one), row in zip(pairs, scored, strict=True)
    ]
    log_r = np.concatenate(apart)
    return float(np.mean(np.exp(log_r) - 1 - log_r))
