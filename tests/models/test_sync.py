"""New weights for a running engine: served at once, whole, and by its successors too."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.probe import Drift, ProbeConfig, probe
from flywheel_tasks.models.sync import SharedWeights
from tests.models.engines import logprobs, prompt, requests, shared
from tests.tiny_llama import build_tiny_llama

PROMPTS = [prompt(number, 70) for number in range(8)]
"""Longer than two cache blocks: old keys and values would be found."""


def drift(engine: Engine, folder: Path) -> Drift:
    return probe(engine, PROMPTS, lambda asked, drawn: logprobs(folder, asked, drawn), check=False)


def agrees(found: Drift) -> bool:
    return found.most < ProbeConfig().most and found.mean < ProbeConfig().mean


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights after an update, far from those before."""
    return build_tiny_llama(tmp_path_factory.mktemp("learned"), seed=11)


@pytest.fixture
def restored(engine: Engine, tiny_model: Path) -> Iterator[Engine]:
    yield engine
    engine.update(tiny_model)


def test_an_updated_engine_is_the_new_model(restored: Engine, tiny_model: Path, learned: Path) -> None:
    assert agrees(drift(restored, tiny_model))
    stale = drift(restored, learned)
    assert stale.most > 10 * ProbeConfig().most
    restored.update(learned)
    assert agrees(drift(restored, learned))
    assert drift(restored, tiny_model).most > 10 * ProbeConfig().most


def test_a_tied_head_gets_the_update_too(tmp_path: Path) -> None:
    tied_model = build_tiny_llama(tmp_path / "tied", seed=5, tied=True)
    engine = shared(tied_model)
    learned = build_tiny_llama(tmp_path / "learned", seed=12, tied=True)
    assert agrees(drift(engine, tied_model))
    engine.update(learned)
    assert agrees(drift(engine, learned))
    engine.update(tied_model)
    assert agrees(drift(engine, tied_model))


def test_tensors_are_served_like_the_file_they_would_make(restored: Engine, learned: Path) -> None:
    restored.update(learned / "model.safetensors")
    from_file = restored.generate(requests(4), Sampling(max_tokens=8))
    restored.update(load_file(learned / "model.safetensors").items())
    assert restored.generate(requests(4), Sampling(max_tokens=8)) == from_file


def test_half_a_model_is_refused_and_the_engine_keeps_its_weights(
    engine: Engine, learned: Path, tmp_path: Path
) -> None:
    before = engine.generate(requests(4), Sampling(max_tokens=8))
    tensors = load_file(learned / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"missing .*k_proj"):
        engine.update(tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="no safetensors"):
        engine.update(tmp_path / "absent")
    assert engine.generate(requests(4), Sampling(max_tokens=8)) == before


def test_weights_wait_for_the_end_of_a_round(engine: Engine, learned: Path) -> None:
    stream = engine.stream(requests(20), Sampling(max_tokens=8))
    next(stream)
    with pytest.raises(FlywheelError, match="updated between rounds"):
        engine.update(learned)
    stream.close()


@pytest.mark.slow
def test_the_successor_of_a_dead_engine_has_the_new_weights(restored: Engine, tiny_model: Path, learned: Path) -> None:
    restored.update(load_file(learned / "model.safetensors"))
    os.kill(restored.pids[0], signal.SIGKILL)
    assert agrees(drift(restored, learned))
    assert restored.stats()["deaths"] >= 1


def test_shared_weights_hold_one_update(learned: Path) -> None:
    files = SharedWeights()
    tensors = load_file(learned / "model.safetensors")
    first, second = files.write(tensors), files.write(tensors.items())
    assert set(load_file(first)) == set(tensors)
    files.keep_only(second)
    assert os.path.exists(second)
    assert not os.path.exists(first)
    files.close()
    assert not os.path.exists(second)
