"""How responses are drawn: no key of a stage that changes its artifact's key and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.models.engine_config import Sampling, SamplingConfig
from flywheel_tasks.pipeline import STAGES, load_config


def sections(config: Any, path: str) -> Iterator[tuple[str, SamplingConfig]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, SamplingConfig):
            yield f"{path}.{name}", value
        elif isinstance(value, BaseModel):
            yield from sections(value, f"{path}.{name}")


def test_a_stage_draws_with_the_seed_of_the_run_and_has_none_of_its_own() -> None:
    found = dict(pair for stage in STAGES for pair in sections(stage.config(**_needed(stage.name)), stage.name))
    assert {"constrain.scoring.sampling", "pairs.sampling", "rejection-sample.sampling", "rl.sampling"} < found.keys()
    assert {path for path, sampling in found.items() if "seed" in sampling.model_dump()} == set()
    with pytest.raises(ConfigError, match=r"unknown config key 'rl\.sampling\.seed'"):
        load_config("demo", None, ["rl.sampling.seed=5"])


def _needed(stage: str) -> dict[str, Any]:
    return {"least_policies": 1} if stage == "rejection-sample" else {}


def test_a_seeded_draw_is_the_same_draw_with_another_seed() -> None:
    asked = SamplingConfig(k=3, temperature=0.7, top_p=0.9, max_tokens=12)
    one, other = asked.seeded(5), asked.seeded(6).seeded(5)
    assert one == other == Sampling(k=3, temperature=0.7, top_p=0.9, max_tokens=12, seed=5)
    assert asked.seeded(2**62 + 5) == one


def test_greedy_draws_one() -> None:
    with pytest.raises(ValueError, match="the same response 4 times"):
        SamplingConfig(k=4, temperature=0)
