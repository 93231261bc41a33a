"""An exported checkpoint is held against the module it came from, through the engine that serves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models import witness
from flywheel_tasks.models.chat import load_tokenizer
from flywheel_tasks.models.engine import Engine, Request
from flywheel_tasks.models.load import load_policy
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.training import policy
from tests.models.engines import logprobs, prompt, started


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose adapters say something, written as training writes it."""
    folder = tmp_path_factory.mktemp("exported")
    module = load_policy(tiny_model, lora=Lora(rank=4, alpha=8, dropout=0.1), seed=3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(5))
    assert module.training
    policy.save(tiny_model, module, folder)
    assert module.training
    return folder


def served(folder: Path) -> witness.Drift:
    with started(folder) as engine:
        return witness.check(engine, folder)


def test_the_engine_scores_given_tokens_as_transformers_does(engine: Engine, tiny_model: Path) -> None:
    asked = [Request(f"r{n}", prompt(n, 20 + n)) for n in range(40)]
    found = engine.score(asked)
    expected = logprobs(tiny_model, [r.tokens[:1] for r in asked], [r.tokens[1:] for r in asked])
    assert [len(row) for row in found] == [len(r.tokens) - 1 for r in asked]
    apart = [abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(apart) < 0.3
    assert sum(apart) / len(apart) < 0.07


def test_tokens_that_cannot_be_scored_are_named(engine: Engine) -> None:
    with pytest.raises(FlywheelError, match="b can't be scored: bad_token"):
        engine.score([Request("a", prompt(0)), Request("b", [5, 10**6])])
    assert len(engine.score([Request("a", prompt(0))])[0]) == 39


def test_a_whole_export_agrees_with_its_trainer(exported: Path) -> None:
    found = served(exported)
    assert 0 < found.mean < found.most < 0.3
    assert found.tokens > 100


@pytest.mark.parametrize("damage", ["adapters_lost", "head_lost"])
def test_an_export_that_is_not_what_was_trained_is_refused(
    exported: Path, tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    """One that forgot to merge, and one whose head is another model's."""
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    right, base = load_file(exported / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    wrong = base if damage == "adapters_lost" else right | {"lm_head.weight": right["lm_head.weight"].roll(1, 0)}
    wrong = {name: tensor.to(torch.bfloat16) for name, tensor in wrong.items()}
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FlywheelError, match="does not give its trainer's logprobs when it is served"):
        served(tmp_path)


def test_an_export_without_its_trainers_word_is_refused(engine: Engine, tiny_model: Path) -> None:
    with pytest.raises(FlywheelError, match=r"no trainer_logprobs\.json"):
        witness.check(engine, tiny_model)


def test_the_word_is_that_of_the_response_alone(exported: Path) -> None:
    said = json.loads((exported / witness.FILE).read_text())
    tokenizer = load_tokenizer(exported)
    for (asked, answer), ids, marks in zip(witness.SENTENCES, said["tokens"], said["trained"], strict=True):
        text = tokenizer.decode([ids[i] for i in marks])
        assert answer in text
        assert asked not in text
