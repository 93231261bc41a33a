"""The reward of a response in RL (Sec. 2.4.3, Table 7): what the pointwise preference model says of it, less penalties.

Every component is brought to a scale of its own before it is weighed, and stays apart so that it can be logged.

- `preference`: the model's r(x, y) in standard deviations *within a prompt*, of the responses with which the run
  begins. A preference model fixes no scale across prompts (Sec. 3.5.4), so the spread between prompts says nothing
  about the choice between two responses to one; and a spread that followed the policy would make the same difference
  dearer as responses become alike, until the penalties no longer count. So it is measured once and kept.
- `long`, `repetition`, `language`, `format`: the failures of Table 7, each between 0 (none) and 1.

A weight is therefore the number of standard deviations that a failure costs. Two of them put the best of eight
responses (1.4 above the mean) below the middle of its group: a failure does not win because the model likes it.

User signals never enter (Sec. 3.5.5): they favour verbose answers and flattery at the end, and a policy finds that at
once. They may help to rank rejection sampling (Sec. 2.4.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig, StageConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.stats import within
from flywheel_tasks.style import features, rules
from flywheel_tasks.style.linter import Language

if TYPE_CHECKING:
    from flywheel_tasks.models.chat import Card
    from flywheel_tasks.models.score import Scorer

Floats = NDArray[np.float64]
PENALTIES = ("long", "repetition", "language", "format")
COMPONENTS = ("preference", *PENALTIES)
REFUSED = "user signals never reward RL (Sec. 3.5.5): rank rejection sampling by them (rejection-sample.signals)"
_SIGNALS = frozenset({field.name for field in schemas.SIGNALS} | {"continue", "signal", "signals", "thumb", "thumbs"})


class RewardConfig(StageConfig):
    """What each component of the reward weighs, in standard deviations of the preference reward."""

    preference: float = Field(1.0, gt=0, description="weight of the pointwise preference model's reward")
    long: float = Field(2.0, ge=0, description="what a response costs that does not end before the token limit")
    repetition: float = Field(2.0, ge=0, description="what a response costs that repeats itself or loops")
    language: float = Field(
        2.0, ge=0, description="what a response costs in another language than the user's, or translated unasked"
    )
    format: float = Field(1.0, ge=0, description="what broken markdown or an empty response costs")
    long_from: float = Field(
        0.75, ge=0, lt=1, description="share of the token limit from which a response begins to be long"
    )
    model: ModelConfig | None = Field(
        None, description="another pointwise preference model than this cycle's; its tokenizer may be another too"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_signal(cls, values: Any) -> Any:
        return without_signals(values)

    @field_validator("model")
    @classmethod
    def _no_signal_model(cls, model: ModelConfig | None) -> ModelConfig | None:
        if model is not None and "signal-rm" in re.split(r"[/\\]", model.path):
            raise ValueError(f"{model.path} is a user-signal model: {REFUSED}")
        return model


class Scale(NamedTuple):
    """The preference reward of the policy with which a run begins: its mean, and its spread within a prompt."""

    mean: float
    spread: float


class Rewards(NamedTuple):
    """One number a response, and what it is made of; NaN where the response has no reward."""

    total: Floats
    components: dict[str, Floats]


def without_signals(values: Any) -> Any:
    """The keys of a section as they are, unless one of them names a user signal: a ValueError that says why not."""
    for name in values if isinstance(values, dict) else ():
        if is_signal(str(name)):
            raise ValueError(f"'{str(name)[:40]}' can't be a reward: {REFUSED}")
    return values


def is_signal(name: str) -> bool:
    """Whether a name means a user signal, however it is written: p(continue), thumb_up, P-Thumbs, love_weight."""
    return bool(_SIGNALS & set(re.split(r"[^a-z]+", name.lower()))) or _words(name) in _SIGNALS


def _words(name: str) -> str:
    return "_".join(word for word in re.split(r"[^a-z]+", name.lower()) if word not in ("", "p"))


# -- the preference model


def preference_scorer(path: str | Path) -> Scorer:
    """The pointwise preference model in that folder, ready to score texts.

    It reads texts, not the policy's tokens: its own tokenizer and template encode them again, so the two may differ.
    """
    return _scorer(path, "pointwise")


def pairwise_scorer(path: str | Path) -> Scorer:
    """The pairwise preference model in that folder: the guardrail's second judge."""
    return _scorer(path, "pairwise")


def _scorer(path: str | Path, kind: str) -> Scorer:
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.models.score import Scorer

    folder = local_folder(str(path))
    refuse_other_heads(folder, kind)
    scorer = Scorer(folder)
    rows, tokens = scorer.model.model.get_input_embeddings().num_embeddings, len(scorer.template.tokenizer)
    if tokens > rows:
        raise InputError(
            f"reward model {folder}: its tokenizer has {tokens} tokens, its weights know {rows}: they do not belong "
            "together; fetch the whole checkpoint again"
        )
    return scorer


def refuse_other_heads(folder: Path, kind: str) -> None:
    """Nothing but a preference head may reward or judge; a user-signal head is named as what it is."""
    about = folder / "head.json"
    if not about.is_file():
        raise InputError(f"model {folder} has no scoring head: give a checkpoint of preference-{kind}")
    try:
        body = json.loads(about.read_text())
        found, names = str(body["kind"]), [str(name) for name in body["names"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{about} is damaged: {error!r}: fetch the checkpoint again") from error
    if found == "signals" or any(map(is_signal, names)):
        raise InputError(f"model {folder} is a user-signal model ({', '.join(names)}): {REFUSED}")
    if found != kind:
        raise InputError(f"model {folder} is a {found} model: this needs a checkpoint of preference-{kind}")


def preference(scorer: Scorer, completions: pa.Table, cards: Mapping[str, Card]) -> Floats:
    """r(x, y) of every response; NaN where there is none, or where the model cannot read it whole."""
    from flywheel_tasks.models.chat import card_of
    from flywheel_tasks.models.score import ScoreRow

    raw = np.full(completions.num_rows, np.nan)
    answered = _answered(completions)
    rows = completions.select(["turns", "text", "character_id"]).filter(pa.array(answered)).to_pylist()
    raw[answered] = scorer.pointwise(
        [ScoreRow(row["turns"], row["text"], card_of(cards, row["character_id"])) for row in rows]
    )
    return raw


def scale_of(prompt_ids: pa.ChunkedArray | pa.Array, raw: Floats) -> Scale:
    """The scale of a run, from the first policy's scores: pooled over prompts, each around its own mean."""
    known = np.isfinite(raw)
    ids, scores = np.asarray(prompt_ids.to_pylist(), object).astype(str)[known], raw[known]
    _, at = np.unique(ids, return_inverse=True)
    spread = within.spread(at, scores)
    if not spread > 1e-6 * max(1.0, float(np.abs(scores).max(initial=0.0))):
        repeated = np.bincount(at, minlength=1).max() > 1
        why = "the responses to each prompt score the same" if repeated else "no prompt has two of them: raise k"
        raise InputError(f"the reward model tells no scored response from another ({why}): there is nothing to learn")
    return Scale(float(scores.mean()), spread)


# -- the reward


def reward(
    completions: pa.Table,
    raw: Floats,
    config: RewardConfig,
    scale: Scale,
    *,
    limit: int,
    language: Language | None = None,
) -> Rewards:
    """Eq. 8's reward of every row of `completions` (schema `completion`). `limit` is the token limit they were
    generated under, `language` tells the language of texts; without it no response is in the wrong one."""
    if len(raw) != completions.num_rows:
        raise InputError(f"{completions.num_rows} responses, but {len(raw)} scores of the reward model")
    if not scale.spread > 0:
        raise InputError(f"the reward's scale has spread {scale.spread}: it must be positive")
    found = _found(completions, language)
    tokens = completions["tokens"].to_numpy(zero_copy_only=False).astype(np.float64)
    components = {
        "preference": (raw - scale.mean) / scale.spread,
        "long": _long(tokens, _finish(completions) == "length", config.long_from * limit, limit),
        "repetition": found["repeated"],
        "language": np.maximum(np.nan_to_num(found["language_mismatch"]), found["translation"]),
        "format": np.maximum(found["broken_markdown"], found["empty"]),
    }
    total = config.preference * components["preference"]
    for name in PENALTIES:
        total = total - getattr(config, name) * components[name]
    unknown = ~np.isfinite(total) | ~_answered(completions)
    total[unknown] = np.nan
    return Rewards(total, {name: np.where(unknown, np.nan, values) for name, values in components.items()})


_ROWS = 1 << 13
_FEATURES = ("repetition", "infinity_loop", "language_mismatch", "translation", "broken_markdown", "empty")


def means(rewards: Rewards) -> dict[str, float]:
    """What a step logs: the mean of the total and of every component."""
    known = np.isfinite(rewards.total)
    columns = {"total": rewards.total, **rewards.components}
    return {f"reward/{name}": float(values[known].mean()) for name, values in columns.items() if known.any()}


def _long(tokens: Floats, unfinished: NDArray[np.bool_], start: float, limit: int) -> Floats:
    """0 up to `start` tokens, 1 at the limit: the policy feels the limit before it runs into it."""
    rise = np.clip((tokens - start) / (limit - start), 0.0, 1.0)
    return np.where(unfinished, 1.0, rise)


def _repetition(found: Mapping[str, Floats], words: NDArray[np.int64]) -> Floats:
    """The share of repeated phrases as a part of what the linter calls repetitive, or 1 in a loop."""
    limits = rules.load().limits
    share = np.where(words >= limits.repetition_words, np.nan_to_num(found["repetition"]) / limits.repetition, 0.0)
    return np.maximum(np.clip(share, 0.0, 1.0), found["infinity_loop"])


def _found(completions: pa.Table, language: Language | None) -> dict[str, Floats]:
    """The features that penalties look at. Batch by batch: a conversation stands here once for each response to it, and
    together they may be more text than one column holds."""
    read = completions.select(["text", "turns", "language"])
    parts = []
    for batch in read.to_batches(max_chunksize=_ROWS) or [pa.RecordBatch.from_pylist([], read.schema)]:
        exchange = _exchange(batch, language)
        found = features.measure(exchange, _FEATURES)
        parts.append(found | {"repeated": _repetition(found, exchange.word_counts)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _exchange(batch: pa.RecordBatch, language: Language | None) -> features.Exchange:
    """Responses with their language and the one the user writes in: that of the last turn, or of the conversation
    where the turn is too short to tell."""
    text, turns = batch["text"], batch["turns"]
    if language is None:
        return features.Exchange(text, turns)
    spoken = pa.array(list(language(text)), pa.string())
    asked = pa.array(list(language(features.last_user_turn(turns))), pa.string())
    return features.Exchange(text, turns, spoken, pc.coalesce(asked, batch["language"]))


def _finish(completions: pa.Table) -> NDArray[np.str_]:
    return np.asarray(completions["finish"].to_pylist(), dtype=np.str_)


def _answered(completions: pa.Table) -> NDArray[np.bool_]:
    return np.asarray(_finish(completions) != "error", dtype=np.bool_)
