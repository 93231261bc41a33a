"""Which prompts RL learns from (Sec. 2.4.3, 3.5.2, 3.5.4, 3.5.6).

Near-policy prompts of this cycle only; the assistant's turns in their histories are cleaned, because a policy mimics
the turns before it whatever the reward says; and of what is left the prompts whose k responses differ most in the
preference model's score come first. Penalties are no part of it: a prompt whose responses run into the token limit is
not harder for it. A low mean score is offered as a measure too, so that its bias can be seen: it follows the length of
a conversation and its style, not how hard the prompt is.

A prompt on which every response earns the same, penalties and all, teaches nothing, and is left out in either case.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.prompts import at_most, near_policy
from flywheel_tasks.core.quarantine import quarantined, without
from flywheel_tasks.herding.reward import Rewards
from flywheel_tasks.stats import difficulty
from flywheel_tasks.style import linter
from flywheel_tasks.style.linter import Language

Floats = NDArray[np.float64]
DISTRIBUTIONS = ("jtbd", "depth")
_NONE = "none"
_OTHER: dict[str, Literal["variance", "mean"]] = {"variance": "mean", "mean": "variance"}
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class SelectionConfig(StageConfig):
    """How many prompts are scored, and which of them are kept."""

    by: Literal["variance", "mean"] = Field(
        "variance",
        description="highest variance of the preference model's score within a prompt; or its lowest mean, which "
        "follows style (Sec. 3.5.4)",
    )
    share: float = Field(0.5, gt=0, le=1, description="share of the scored prompts that is kept, the hardest first")
    most: int | None = Field(None, ge=1, description="prompts that are kept at most (empty: the whole share)")
    candidates: int | None = Field(None, ge=1, description="prompts that are scored at most, by hash (empty: all)")
    older_versions: bool = Field(
        False,
        description="also learn from prompts that another model version than the champion answered (Sec. 3.5.2 "
        "measured 10.6 % less engagement depth)",
    )


class Candidates(NamedTuple):
    """Prompts to generate responses for, the quarantine of those that were refused, and what the linter did."""

    prompts: pa.Table
    rejected: pa.Table
    style: list[list[Any]]
    rows_in: int


class Selected(NamedTuple):
    """The prompts to learn from, hardest first; the quarantine of all others; and the report."""

    prompts: pa.Table
    rejected: pa.Table
    report: dict[str, Any]


def candidates(
    prompts: pa.Table,
    forgotten: Iterable[str],
    config: SelectionConfig,
    *,
    seed: int,
    language: Language | None = None,
) -> Candidates:
    """The training prompts (schema `prompt`) that may be used, their histories cleaned, at most so many."""
    learn = prompts.filter(pc.equal(prompts["split"], "train"))
    known, gone = without(learn, forgotten, "prompt_id")
    near, older = near_policy(known, config.older_versions)
    drawn, left = at_most(near, config.candidates, seed)
    cleaned = linter.clean_prompts(drawn, language)
    refused = {"older_version": older, "not_drawn": left}
    rejected = [quarantined(table, "prompt_id", reason) for reason, table in refused.items()]
    rejected = [gone, *rejected, cleaned.rejected]
    if not cleaned.table.num_rows:
        raise InputError(
            f"no prompt to learn from: of {learn.num_rows} training prompts {gone.num_rows} are of forgotten users, "
            f"{older.num_rows} of other model versions (selection.older_versions), and the linter dropped "
            f"{cleaned.rejected.num_rows}"
        )
    style = [[*key, count] for key, count in sorted(cleaned.counts.items())]
    return Candidates(cleaned.table, pa.concat_tables(rejected), style, learn.num_rows)


def held_out(
    prompts: pa.Table, forgotten: Iterable[str], config: SelectionConfig, *, most: int
) -> tuple[pa.Table, int]:
    """Evaluation prompts for the guardrails, with histories as users have them, in the order of the table; and of how
    many they are.

    `respond` takes the lowest hashes of these, the guardrails the highest: as long as there are enough of both, the
    checkpoint is not chosen on the prompts that it is judged by.
    """
    evaluation = prompts.filter(pc.equal(prompts["split"], "eval"))
    near, _ = near_policy(without(evaluation, forgotten, "prompt_id")[0], config.older_versions)
    if not near.num_rows:
        raise InputError(
            f"none of {prompts.num_rows} curated prompts is held out and near the policy: the guardrails need some; "
            "raise ingest.eval_share, or curate more traffic"
        )
    ranks = [hashlib.sha256(prompt.encode()).digest() for prompt in near["prompt_id"].to_pylist()]
    order = sorted(range(near.num_rows), key=ranks.__getitem__, reverse=True)
    chosen = np.zeros(near.num_rows, bool)
    chosen[order[:most]] = True
    return near.filter(pa.array(chosen)).combine_chunks(), near.num_rows


def select(found: Candidates, completions: pa.Table, rewards: Rewards, config: SelectionConfig) -> Selected:
    """The hardest prompts by what the preference model says of their responses. `rewards` are those of the rows of
    `completions` (schema `completion`, k rows a prompt); NaN is no reward. Their total, penalties and all, decides only
    whether there is anything to learn."""
    if completions.num_rows != len(rewards.total):
        raise InputError(f"{completions.num_rows} responses, but {len(rewards.total)} rewards")
    prompts = found.prompts
    preference = np.where(np.isfinite(rewards.total), rewards.components["preference"], np.nan)
    totals, scored = (
        difficulty.by_prompt(completions["prompt_id"], pa.chunked_array([pa.array(values, pa.float64())]))
        for values in (rewards.total, preference)
    )
    responses, _, earned = _aligned(prompts, totals)
    _, mean, variance = _aligned(prompts, scored)
    reason = np.full(prompts.num_rows, "", object)
    reason[~(earned > 0)] = "no_variance"
    reason[responses == 1] = "one_score"
    reason[responses == 0] = "no_response"
    usable = np.flatnonzero(reason == "")
    if not usable.size:
        counts = ", ".join(f"{name} ({n})" for name, n in sorted(Counter(reason.tolist()).items()))
        raise InputError(
            f"none of {prompts.num_rows} prompts has responses of different reward: {counts}; RL needs k of 2 or more "
            "and a reward that tells responses apart"
        )
    count = min(max(1, round(config.share * usable.size)), config.most or usable.size)
    chosen = _ranked(prompts, scored, usable, count, config.by)
    other = _ranked(prompts, scored, usable, count, _OTHER[config.by])
    keep = np.zeros(prompts.num_rows, bool)
    keep[chosen] = True
    reason[(reason == "") & ~keep] = "not_hard"
    lost = prompts.filter(pa.array(~keep))
    rejected = pa.concat_tables([found.rejected, quarantined(lost, "prompt_id", reason[~keep].tolist())])
    report = {
        "by": config.by,
        "prompts": {"in": found.rows_in, "scored": prompts.num_rows, "usable": int(usable.size), "selected": count},
        "refused": dict(sorted(Counter(rejected["reason"].to_pylist()).items())),
        "style": found.style,
        "variance": {"usable": _quantiles(variance[usable]), "selected": _quantiles(variance[chosen])},
        "mean": {"usable": _quantiles(mean[usable]), "selected": _quantiles(mean[chosen])},
        f"also_by_{_OTHER[config.by]}": len(set(chosen.tolist()) & set(other.tolist())) / count,
        "distributions": {name: _distribution(prompts[name], keep) for name in DISTRIBUTIONS},
        f"distributions_by_{_OTHER[config.by]}": {
            name: _distribution(prompts[name], np.isin(np.arange(prompts.num_rows), other)) for name in DISTRIBUTIONS
        },
    }
    return Selected(prompts.take(pa.array(chosen)), rejected, report)


def _aligned(prompts: pa.Table, scored: pa.Table) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Scored responses, mean and variance of every prompt; 0 and NaN where nothing was scored."""
    row = pc.index_in(prompts["prompt_id"], scored["prompt_id"].combine_chunks())
    found = scored.select(["responses", "quality", "difficulty"]).take(row)
    counts = pc.fill_null(found["responses"], 0).to_numpy().astype(np.int64)
    mean, variance = (pc.fill_null(found[name], np.nan).to_numpy() for name in ("quality", "difficulty"))
    return counts, mean, variance


def _ranked(
    prompts: pa.Table, scored: pa.Table, usable: NDArray[np.int64], count: int, by: Literal["variance", "mean"]
) -> NDArray[np.int64]:
    """Rows of the `count` hardest among the usable prompts."""
    names = prompts["prompt_id"].take(pa.array(usable))
    among = scored.filter(pc.is_in(scored["prompt_id"], names.combine_chunks()))
    hardest = difficulty.hardest(among, count, by)
    return np.asarray(pc.index_in(hardest, prompts["prompt_id"].combine_chunks()), dtype=np.int64)


def _distribution(column: pa.ChunkedArray, chosen: NDArray[np.bool_]) -> dict[str, dict[str, float]]:
    """Every value's share among all and among the chosen, and how far it is over-represented."""
    groups = np.asarray(pc.fill_null(column, _NONE).to_pylist(), object)
    ratio = difficulty.over_representation(groups, chosen)
    before, after = Counter(groups.tolist()), Counter(groups[chosen].tolist())
    return {
        name: {"before": before[name] / len(groups), "after": after[name] / int(chosen.sum()), "ratio": ratio[name]}
        for name in ratio
    }


def _quantiles(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.quantile(values, _QUANTILES)]
