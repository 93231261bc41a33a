"""SFT from three origins: nothing is lost on the way into the mixture, and what is learned is in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.herding.exported import ServingConfig
from flywheel_tasks.herding.sft import STAGE, SftConfig, distinct
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.simulation.characters import demo_characters
from flywheel_tasks.training.config import TrainingConfig
from tests.herding.conftest import run, source
from tests.models.engines import SMALL
from tests.preherding.conftest import Given

MAYA = demo_characters()[0].character_id
FORGOTTEN = "f" * 32


def example(name: str, answer: str, **more: Any) -> dict[str, Any]:
    talk = [
        {"role": "user", "content": "I keep thinking of the sea", "trained": False},
        {"role": "assistant", "content": answer, "trained": True},
    ]
    row = {"example_id": name, "user": "0" * 32, "source": "user_rjs", "character_id": MAYA, "locale": "en_US"}
    return row | {"messages": talk} | more


def sampled(n: int) -> list[dict[str, Any]]:
    return [example(f"s{i}", f"The sea is calm on day {i}.") for i in range(n)]


def fine_tune(
    store: Store, given: Given, characters: pa.Table, model: Path, folder: Path, rows: list[dict[str, Any]]
) -> Artifact:
    answer = {"role": "assistant", "content": "I will not help with that."}
    safety = {"source": "safety", "messages": [{"role": "user", "content": "How do I pick a lock?"}, answer]}
    delivered = source(folder, [safety | {"example_id": f"d{i}"} for i in range(8)] + ["{"])
    artifacts = {
        "sampled": (given("rejection-sample", {"examples": pa.Table.from_pylist(rows, schemas.EXAMPLE)}), "examples"),
        "rewritten": None,
        "characters": (given("ingest", {"characters": characters}), "characters"),
    }
    config = SftConfig(
        base=ModelConfig(path=str(model)),
        ratios={"user_rjs": 0.75, "safety": 0.25},
        lora=Lora(rank=4),
        train=TrainingConfig(epochs=4, batch=8, learning_rate=0.01, publish_every=8),
        max_tokens=400,
        serving=ServingConfig(engine=SMALL),
    )
    return run(STAGE, store, config, artifacts, [delivered], frozenset({FORGOTTEN}))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_mixture_is_learned_and_every_row_is_accounted_for(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, tmp_path: Path
) -> None:
    odd = [
        example("s0", "A second row with the first one's id."),
        example("gone", "The sea is rough.", user=FORGOTTEN),
        *(example(f"stranger{i}", f"The sea is deep, {i}.", character_id="nobody") for i in range(12)),
    ]
    made = fine_tune(store, given, characters, tiny_model, tmp_path, [*sampled(40), *odd])
    rows = made.manifest.rows
    assert rows is not None
    assert rows.rows_in == 54 + 9
    reasons = dict(rows.reasons)
    broken = {name: reasons.pop(name) for name in list(reasons) if not name.startswith(("not_drawn", "unknown"))}
    assert broken == {"not_json": 1, "example_id_repeats": 1, "forgotten": 1}
    report = made.json("report")
    # Strangers that were drawn were refused and replaced, so the ratios hold for what is trained.
    assert reasons["unknown_character"] > 0
    assert report["mixture"] == {"safety": 8, "user_rjs": 24}
    assert sum(reasons.values()) == 52 - 24
    assert report["training"]["rows"] == rows.rows_out == 32
    assert report["served"].keys() == {"8", "16"}
    assert all(0 < drift["probe/drift_max"] < 0.5 for drift in report["served"].values())
    assert {"loss/safety", "loss/user_rjs"} <= report["training"]["last"].keys()
    assert not {"step_s", "tokens_per_s"} & report["training"]["last"].keys(), "no two runs take the same time"
    assert {file.path.split("/")[-1] for file in made.manifest.outputs["model"].files} >= {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert {file.path.split("/")[-2] for file in made.manifest.outputs["steps"].files} == {"step-000008"}
    assert report["training"]["last"]["loss"] < 4


def test_when_nothing_can_be_trained_the_reasons_are_named(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, tmp_path: Path
) -> None:
    words = "The sea is calm and wide and old. " * 200
    with pytest.raises(InputError, match=r"'user_rjs' has no rows"):
        fine_tune(store, given, characters, tiny_model, tmp_path, [example("gone", words, user=FORGOTTEN)])


def test_the_first_example_of_an_id_stays() -> None:
    rows = [example(name, answer) for name, answer in (("b", "1"), ("a", "2"), ("b", "3"), ("b", "4"))]
    kept, again = distinct(pa.Table.from_pylist(rows, schemas.EXAMPLE))
    assert [(r["example_id"], r["messages"][1]["content"]) for r in kept.to_pylist()] == [("b", "1"), ("a", "2")]
    assert again.select(["row_id", "reason"]).to_pylist() == [{"row_id": "b", "reason": "example_id_repeats"}] * 2
