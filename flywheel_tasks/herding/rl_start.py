"""Before the first step of online RL: which prompts, on which scale rewards are, and what the first policy says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.herding import prompt_selection, reward
from flywheel_tasks.herding.prompt_selection import Selected
from flywheel_tasks.herding.reward import Floats, Scale
from flywheel_tasks.herding.rl_config import RlConfig
from flywheel_tasks.herding.rollouts import Drawn, Setup
from flywheel_tasks.herding.sft import languages
from flywheel_tasks.models import generate
from flywheel_tasks.models.resolve import artifact_folder, local_folder

if TYPE_CHECKING:
    from flywheel_tasks.herding.rl_remote import Asked

_CHUNK = 128
"""Prompts that are committed together: what a killed attempt has scored, the next one reads."""
_RAW = "raw"


@dataclass(frozen=True)
class Start:
    """What the run begins with."""

    selected: Selected
    scale: Scale
    held_out: pa.Table
    held_out_of: int
    """All held-out prompts near the policy, of which these are the guardrails'."""
    responses: Drawn
    """The first policy's responses to the held-out prompts."""


def setup(inputs: Inputs, config: RlConfig, seed: int) -> Setup:
    """What the rollouts' process is told."""
    given = config.reward.model
    reward_model = given.path if given else str(artifact_folder(*inputs.artifact("reward")))
    pairwise_model = artifact_folder(*inputs.artifact("pairwise"))
    for path, kind in ((reward_model, "pointwise"), (str(pairwise_model), "pairwise")):
        reward.refuse_other_heads(local_folder(path), kind)
    return Setup(
        policy=ModelConfig(
            path=str(artifact_folder(*inputs.artifact("policy"))), tensor_parallel=config.tensor_parallel
        ),
        reward_model=reward_model,
        pairwise_model=str(pairwise_model),
        cards=generate.cards(inputs["characters"].read()),
        engine=config.engine,
        sampling=config.sampling,
        room=config.max_tokens,
        reward=config.reward,
        loss=config.loss,
        language=config.language,
        batch=config.train.batch,
        seed=seed,
    )


def prepare(far: Asked, inputs: Inputs, config: RlConfig, out: Output) -> Start:
    """Score the candidates, keep the prompts that teach most, and hand them to the rollouts."""
    language = languages(config.language)
    prompts = inputs["prompts"].read()
    found = prompt_selection.candidates(prompts, inputs.forgotten, config.selection, seed=out.seed, language=language)
    completions, raw = _scored(far, found.prompts, config.sampling.k, "candidates", out)
    scale = reward.scale_of(completions["prompt_id"], raw)
    rewards = reward.reward(completions, raw, config.reward, scale, limit=config.sampling.max_tokens, language=language)
    selected = prompt_selection.select(found, completions, rewards, config.selection)
    held_out, of = prompt_selection.held_out(prompts, inputs.forgotten, config.selection, most=config.guardrail.prompts)
    far.ask("load", selected.prompts, scale)
    start, scores = _scored(far, held_out, 1, "held-out", out)
    return Start(selected, scale, held_out, of, Drawn(start, scores, [], []))


def _scored(far: Asked, prompts: pa.Table, k: int, name: str, out: Output) -> tuple[pa.Table, Floats]:
    """k responses of the first policy to every prompt with their scores, chunk by chunk; an earlier attempt's are
    read."""
    tables = []
    schema = schemas.COMPLETION.append(pa.field(_RAW, pa.float64()))
    for first in range(0, prompts.num_rows, _CHUNK):
        piece = f"{name}-{first:06d}"
        table = out.partial.table(piece, schema)
        if table is None:
            drawn: Drawn = far.ask("respond", prompts.slice(first, _CHUNK), k, name)
            table = drawn.completions.append_column(schema.field(_RAW), pa.array(drawn.raw, pa.float64()))
            out.partial.put_table(piece, table)
        tables.append(table)
        out.progress(min(first + _CHUNK, prompts.num_rows), prompts.num_rows, name)
    whole = pa.concat_tables(tables) if tables else schema.empty_table()
    return whole.drop_columns([_RAW]), whole[_RAW].to_numpy(zero_copy_only=False).astype(np.float64)
