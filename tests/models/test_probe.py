"""The probe tells a stale engine from bfloat16's rounding."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.probe import drift, probe
from tests.models.engines import logprobs, prompt
from tests.tiny_llama import build_tiny_llama

PROMPTS = [prompt(number, 50) for number in range(6)]


def test_an_engine_with_the_trainers_weights_passes(engine: Engine, tiny_model: Path) -> None:
    found = probe(engine, PROMPTS, lambda asked, drawn: logprobs(tiny_model, asked, drawn))
    assert 0 < found.mean < found.most < 0.3
    assert found.tokens > 50
    assert found.metrics() == {"probe/drift_max": found.most, "probe/drift_mean": found.mean}


def test_a_stale_engine_is_caught(engine: Engine, tmp_path: Path) -> None:
    """The trainer has learned; nobody told the engine."""
    learned = build_tiny_llama(tmp_path / "learned", seed=21)
    with pytest.raises(FlywheelError, match="does not run the trainer's weights"):
        probe(engine, PROMPTS, lambda asked, drawn: logprobs(learned, asked, drawn))


def test_a_trainer_that_answers_nan_is_caught(engine: Engine) -> None:
    with pytest.raises(FlywheelError, match="inf"):
        probe(engine, PROMPTS, lambda asked, drawn: [[math.nan] * len(tokens) for tokens in drawn])


def test_a_trainer_that_answers_for_other_tokens_is_caught(engine: Engine) -> None:
    with pytest.raises(FlywheelError, match="other tokens than the engine drew"):
        probe(engine, PROMPTS, lambda asked, drawn: [[0.0] for _ in drawn])


def test_a_prompt_the_engine_refuses_is_named(engine: Engine) -> None:
    with pytest.raises(FlywheelError, match="probe-0: empty_prompt"):
        probe(engine, [[]], lambda asked, drawn: [])


@given(st.lists(st.lists(st.floats(-50, 0), min_size=1, max_size=5), min_size=1, max_size=5), st.floats(0, 3))
def test_drift_is_the_largest_and_the_mean_distance(rows: list[list[float]], shift: float) -> None:
    found = drift(rows, [[value - shift for value in row] for row in rows])
    assert found.most == pytest.approx(shift, abs=1e-9)
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.tokens == sum(map(len, rows))
