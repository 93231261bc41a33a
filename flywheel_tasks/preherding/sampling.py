"""Rejection sampling at work: route, generate, score while the engine goes on, choose (Sec. 2.4.1, Algorithm 1)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.prompts import at_most
from flywheel_tasks.core.quarantine import quarantined
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.models import generate
from flywheel_tasks.models.chat import Card, card_of
from flywheel_tasks.models.engine import STATS, open_engine
from flywheel_tasks.models.resolve import artifact_folder
from flywheel_tasks.models.score import Scorer, ScoreRow, while_or_after
from flywheel_tasks.preherding import router, selection
from flywheel_tasks.preherding.rejection_config import RejectionConfig
from flywheel_tasks.preherding.router import Earned
from flywheel_tasks.preherding.selection import NONE
from flywheel_tasks.stats.within import Floats
from flywheel_tasks.style import monitor

SOURCE = {"internal": "internal_rjs", "production": "user_rjs"}


_BLOCK, _TOGETHER = 1 << 28, 4096
"""Bytes of completions, and examples, that are one piece."""
_SCORING = ("scoring_seconds", "too_long", "dropped_turns")


@dataclass(frozen=True)
class Sampled:
    accepted: int


@dataclass
class Judges:
    """The reward that decides and the signals that help to rank, on one chunk of completions at a time."""

    reward: Scorer
    signals: Scorer
    cards: dict[str, Card]
    names: tuple[str, ...]
    seconds: float = 0.0

    def scores(self, completions: pa.Table) -> dict[str, Floats]:
        began = time.monotonic()
        answered = np.array(completions["finish"].to_pylist(), object) != "error"
        rows = [
            ScoreRow(row["turns"], row["text"], card_of(self.cards, row["character_id"]))
            for row in completions.select(["turns", "text", "character_id"]).filter(pa.array(answered)).to_pylist()
        ]
        found = {"reward": self.reward.pointwise(rows)}
        if self.names:
            found |= {name: values for name, values in self.signals.signals(rows).items() if name in self.names}
        self.seconds += time.monotonic() - began
        scores = {name: np.full(len(answered), np.nan) for name in found}
        for name, values in found.items():
            scores[name][answered] = values
        return scores


@dataclass
class Drawn:
    """Everything that was generated and what it scored, chunk by chunk."""

    tables: list[pa.Table] = field(default_factory=list)
    scores: list[dict[str, Floats]] = field(default_factory=list)
    stats: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*STATS, *_SCORING), 0.0))


def run(prompts: pa.Table, inputs: Inputs, config: RejectionConfig, out: Output) -> Sampled:
    """Algorithm 1 over all prompts; writes every output of the stage."""
    prompts, skipped = at_most(prompts, config.most_prompts, out.seed)
    out.reject(quarantined(skipped, "prompt_id", "not_drawn"))
    pool = _pool(config)
    before = inputs.json("before") or {"earned": []}
    segments = router.segment_names({name: prompts[name].to_pylist() for name in config.segments}, prompts.num_rows)
    chosen, by_chance = router.route(
        prompts["prompt_id"].to_pylist(), segments, list(pool), before["earned"], explore=config.explore, seed=out.seed
    )
    characters = generate.cards(inputs["characters"].read())
    judges = Judges(
        Scorer(artifact_folder(*inputs.artifact("reward"))),
        Scorer(artifact_folder(*inputs.artifact("signals"))),
        characters,
        tuple(config.signals),
    )
    drawn = Drawn()
    for place, (name, model) in enumerate(pool.items()):
        mine = prompts.filter(pa.array([policy == name for policy in chosen]))
        made = _generated(name, f"policy-{place}", model, mine, characters, config, out, drawn, prompts.num_rows)
        for table in while_or_after(made, judges.reward):
            drawn.tables.append(table)
            drawn.scores.append(judges.scores(table))
    drawn.stats |= {
        "scoring_seconds": judges.seconds, "too_long": judges.reward.too_long,
        "dropped_turns": judges.reward.dropped_turns,
    }  # fmt: skip
    return _choose(prompts, segments, chosen, by_chance, before["earned"], drawn, config, out)


def _generated(
    name: str,
    pieces: str,
    model: ModelConfig,
    prompts: pa.Table,
    characters: dict[str, Card],
    config: RejectionConfig,
    out: Output,
    drawn: Drawn,
    total: int,
) -> Iterator[pa.Table]:
    """The policy's completions as they get ready; the engine goes on while a chunk is scored."""
    if not prompts.num_rows:
        return
    done = sum(table.num_rows for table in drawn.tables) // config.sampling.k
    sampling = config.sampling.seeded(out.seed)
    with open_engine(model, config.engine) as engine:
        template = generate.template_of(engine)
        encode = generate.encoder(template, characters, generate.prompt_room(engine, sampling))
        chunks = generate.complete(
            engine, template, prompts, encode, sampling, name,
            partial=out.partial, name=pieces, chunk=config.chunk, deadline=config.deadline_s,
        )  # fmt: skip
        for chunk in chunks:
            yield chunk.table
            done += chunk.table.num_rows // config.sampling.k
            out.progress(done, total, "prompts")
        for key, value in engine.stats().items():
            drawn.stats[key] += value


def _choose(
    prompts: pa.Table,
    segments: Sequence[str],
    chosen: Sequence[str],
    by_chance: np.ndarray,
    before: Sequence[Earned],
    drawn: Drawn,
    config: RejectionConfig,
    out: Output,
) -> Sampled:
    place = {prompt_id: number for number, prompt_id in enumerate(prompts["prompt_id"].to_pylist())}
    prompt = np.array([place[name] for table in drawn.tables for name in table["prompt_id"].to_pylist()], np.int64)
    # In the order of the prompts: which chunk is ready first is chance.
    order = np.argsort(prompt, kind="stable")
    completions, prompt = _in_order(drawn.tables, order, config.sampling.k), prompt[order]
    scores = {name: np.concatenate([part[name] for part in drawn.scores])[order] for name in drawn.scores[0]}
    unfit = unusable(completions, config.keep_unfinished)
    reward = np.where([reason is None for reason in unfit], scores["reward"], np.nan)
    top = selection.best(prompt, reward, prompts.num_rows)
    highest = np.where(top == NONE, np.nan, reward[top])
    rule = config.threshold
    by = router.segment_names({name: prompts[name].to_pylist() for name in rule.by}, prompts.num_rows)
    tau = selection.thresholds(highest, by, value=rule.value, quantile=rule.quantile)
    rank = selection.ranking(prompt, reward, scores, config.signals)
    kept = selection.choose(prompt, reward, rank, tau)
    accepted = np.zeros(len(reward), bool)
    accepted[kept[kept != NONE]] = True
    if not accepted.any():
        known = np.sort(highest[np.isfinite(highest)])[::-1][:5]
        seen = ", ".join(f"{value:.3f}" for value in known) or "none: no response was complete and scored"
        raise InputError(
            f"no response reaches its threshold: the best rewards are {seen}; lower rejection-sample.threshold"
        )
    marked = _marked(completions, scores, rank, accepted, reward, tau[prompt], unfit)
    with out.table("completions") as writer:
        writer.write(marked)
    with out.table("examples") as writer:
        writer.write(_examples(prompts, completions, kept, accepted))
    answered = marked.filter(pc.not_equal(marked["finish"], "error"))
    out.json("style", monitor.sampling(answered, config.style).as_json())
    why = _reasons(unfit, prompt, kept, highest)
    lost = np.flatnonzero(kept == NONE)
    nothing = prompts.select(["prompt_id", "user"]).take(lost)
    out.reject(quarantined(nothing, "prompt_id", [why[number] for number in lost]))
    report = _report(segments, chosen, by_chance, before, completions, reward, kept, highest, tau, drawn, config)
    out.json("report", report)
    for name, value in {"acceptance": report["acceptance"], **_pace(drawn.stats)}.items():
        out.metric(f"sample/{name}", value)
    for k, value in enumerate(report["best_of_k"], start=1):
        out.metric("sample/best_of_k", value, step=k)
    return Sampled(int(accepted.sum()))


def _pool(config: RejectionConfig) -> dict[str, ModelConfig]:
    """The policies by what they are: a place in the pool is another model's in the next cycle."""
    return {model.path: model for model in (config.policy, *config.candidates)}


def _in_order(tables: Sequence[pa.Table], order: np.ndarray, k: int, block: int = _BLOCK) -> pa.Table:
    """The rows of all tables in this order, which keeps the k of a prompt together, in blocks of about so many bytes:
    each row repeats its history, and as one piece those of a week pass what Arrow addresses."""
    starts = np.cumsum([0, *(table.num_rows for table in tables)])
    firsts = order[::k]
    where = np.searchsorted(starts, firsts, side="right") - 1
    runs = [tables[at].slice(row, k) for at, row in zip(where.tolist(), (firsts - starts[where]).tolist(), strict=True)]
    piece = np.cumsum([run.nbytes for run in runs]) // block
    together = [list(runs_of) for _, runs_of in groupby(range(len(runs)), piece.__getitem__)]
    return pa.concat_tables([pa.concat_tables([runs[n] for n in some]).combine_chunks() for some in together])


def unusable(completions: pa.Table, keep_unfinished: bool) -> list[str | None]:
    """Why a response may teach nobody, whatever it scores; what was cut would teach the policy not to stop."""

    def reason(finish: str, text: str, known: str | None) -> str | None:
        if finish == "error":
            return known or "failed"
        if not text.strip():
            return "empty_response"
        return "infinity_loop" if finish == "length" and not keep_unfinished else None

    columns = (completions[name].to_pylist() for name in ("finish", "text", "reason"))
    return [reason(*row) for row in zip(*columns, strict=True)]


def _marked(
    completions: pa.Table,
    scores: dict[str, Floats],
    rank: Floats,
    accepted: np.ndarray,
    reward: Floats,
    tau: Floats,
    unfit: Sequence[str | None],
) -> pa.Table:
    """The completions with their scores, and why each one was not kept."""
    named = {**scores, "rank": rank}
    listed = [
        [{"name": name, "value": float(values[row])} for name, values in named.items() if np.isfinite(values[row])]
        for row in range(len(reward))
    ]
    reasons = [
        known
        or (None if ok else "not_scored" if not np.isfinite(r) else "below_threshold" if r < t else "not_the_best")
        for known, ok, r, t in zip(unfit, accepted, reward, tau, strict=True)
    ]
    columns = {name: completions[name] for name in completions.column_names}
    columns["scores"] = pa.array(listed, schemas.COMPLETION.field("scores").type)
    columns["accepted"] = pa.array(accepted)
    columns["reason"] = pa.array(reasons, pa.string())
    return pa.table([columns[field.name] for field in schemas.COMPLETION], schema=schemas.COMPLETION)


def _examples(prompts: pa.Table, completions: pa.Table, kept: np.ndarray, accepted: np.ndarray) -> pa.Table:
    """One SFT example for each accepted response, in the order of the prompts."""
    contexts = prompts.select(["source", "user", "character_id", "locale", "turns"]).filter(pa.array(kept != NONE))
    answers = completions.select(["completion_id", "text"]).filter(pa.array(accepted))
    starts = range(0, answers.num_rows, _TOGETHER)
    return pa.concat_tables([_taught(contexts.slice(at, _TOGETHER), answers.slice(at, _TOGETHER)) for at in starts])


def _taught(contexts: pa.Table, answers: pa.Table) -> pa.Table:
    """Each context and, alone to be trained, its response."""
    made = [
        {
            "example_id": answer["completion_id"],
            "user": row["user"],
            "source": SOURCE[row["source"]],
            "character_id": row["character_id"],
            "locale": row["locale"],
            "messages": [
                *({**turn, "trained": False} for turn in row["turns"]),
                {"role": "assistant", "content": answer["text"], "trained": True},
            ],
        }
        for row, answer in zip(contexts.to_pylist(), answers.to_pylist(), strict=True)
    ]
    return pa.Table.from_pylist(made, schemas.EXAMPLE)


def _reasons(unfit: Sequence[str | None], prompt: np.ndarray, kept: np.ndarray, highest: Floats) -> dict[int, str]:
    """Why a prompt gave nothing: what was wrong with its first response if no other one could be chosen either, or that
    none was good enough."""
    first: dict[int, str | None] = {}
    for number, reason in zip(prompt, unfit, strict=True):
        first.setdefault(int(number), reason)

    def short(reason: str | None) -> str:
        return (reason or "not_scored").partition(":")[0]

    return {
        int(number): "below_threshold" if np.isfinite(highest[number]) else short(first.get(int(number)))
        for number in np.flatnonzero(kept == NONE)
    }


def _report(
    segments: Sequence[str],
    chosen: Sequence[str],
    by_chance: np.ndarray,
    before: Sequence[Earned],
    completions: pa.Table,
    reward: Floats,
    kept: np.ndarray,
    highest: Floats,
    tau: Floats,
    drawn: Drawn,
    config: RejectionConfig,
) -> dict[str, Any]:
    accepted = kept != NONE
    rows = [
        {"segment": segment, "policy": policy, "accepted": bool(ok)}
        for segment, policy, ok in zip(segments, chosen, accepted, strict=True)
    ]
    explored = np.flatnonzero(by_chance)
    finish = Counter(completions["finish"].to_pylist())
    finite = tau[np.isfinite(tau)]
    return {
        "prompts": len(segments),
        "accepted": int(accepted.sum()),
        "acceptance": float(accepted.mean()),
        "by_segment": _shares(rows, "segment"),
        "by_policy": _shares(rows, "policy"),
        "threshold": {"lowest": float(finite.min()), "highest": float(finite.max())} if finite.size else None,
        "best_of_k": selection.best_of(reward, config.sampling.k),
        "finish": dict(finish),
        "infinity_loops": finish["length"],
        "tokens": pc.sum(completions["tokens"]).as_py(),
        "too_long": int(drawn.stats["too_long"]),
        "dropped_turns": int(drawn.stats["dropped_turns"]),
        "earned": router.learn(
            [chosen[n] for n in explored],
            [segments[n] for n in explored],
            [float(highest[n]) for n in explored],
            before,
        ),
    }


def _pace(stats: dict[str, float]) -> dict[str, float]:
    """How fast this attempt was, for tracking alone: the next one may find half of the chunks made."""
    seconds = max(stats["seconds"], 1e-9)
    waited = min(stats["waiting_seconds"] / seconds, 1.0)
    return {
        "tokens_per_second": stats["tokens"] / seconds, "waiting_share": waited,
        "scoring_seconds": stats["scoring_seconds"],
    }  # fmt: skip


def _shares(rows: list[dict[str, Any]], by: str) -> dict[str, dict[str, float]]:
    total, kept = Counter(row[by] for row in rows), Counter(row[by] for row in rows if row["accepted"])
    return {name: {"prompts": n, "accepted": kept[name], "acceptance": kept[name] / n} for name, n in total.items()}
