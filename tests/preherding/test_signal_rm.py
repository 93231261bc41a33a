"""User-signal models learn a planted signal, and the report says where it came from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Store
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.preherding import responses, signal_rm
from flywheel_tasks.preherding.responses import SIGNALS
from flywheel_tasks.preherding.signal_rm import STAGE, SignalConfig
from flywheel_tasks.training.config import TrainingConfig
from tests.curation.curation_runs import commit, prompts, run
from tests.preherding.conftest import TOPICS, Given
from tests.preherding.test_responses import conversation, turn


def traffic(n: int) -> pa.Table:
    """Users continue after a question, and love a response at random."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        topic, asks = TOPICS[rng.integers(len(TOPICS))], bool(rng.integers(2))
        answer = f"Oh, {topic}! tell me more?" if asks else f"Ok. {topic}. that is it."
        answered = turn("assistant", answer, continued=asks, love=bool(rng.random() < 0.3))
        talk = [turn("user", f"I keep thinking of {topic}"), answered]
        rows.append(conversation(f"c{i}", talk, split="eval" if i % 4 == 0 else "train") | {"character_id": "none"})
    return pa.Table.from_pylist(rows, schemas.CONVERSATION)


def test_a_planted_signal_is_learned_and_noise_is_not(store: Store, given: Given, tiny_model: Path) -> None:
    inputs = {
        "conversations": (given("filter", {"conversations": traffic(240)}), "conversations"),
        "characters": (given("ingest", {"characters": schemas.CHARACTER.empty_table()}), "characters"),
        "prompts": (given("constrain", {"prompts": prompts([{"prompt_id": "c0.0", "jtbd": "story"}])}), "prompts"),
    }
    config = SignalConfig(
        base=ModelConfig(path=str(tiny_model)),
        lora=Lora(rank=8),
        train=TrainingConfig(epochs=3, batch=16, learning_rate=5e-3),
        max_tokens=512,
    )
    made = run(STAGE, store, config, inputs)
    report = made.json("report")["signals"]
    assert set(report) == set(SIGNALS)
    assert report["continue"]["auc"] > 0.85
    assert abs(report["love"]["auc"] - 0.5) < 0.25
    assert report["thumb_up"]["auc"] is None  # nobody ever gave one
    assert report["continue"]["biases"]["jtbd"]["rates"]["story"]["n"] == 1
    rows = made.manifest.rows
    assert rows is not None
    assert (rows.rows_in, rows.rows_out) == (240, 240)


def test_the_size_of_the_pieces_does_not_show(
    store: Store, given: Given, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories come a piece at a time: what is trained on, measured and left out is the same."""
    inputs = {
        "conversations": (given("filter", {"conversations": traffic(60)}), "conversations"),
        "characters": (given("ingest", {"characters": schemas.CHARACTER.empty_table()}), "characters"),
        "prompts": (given("constrain", {"prompts": prompts([{"prompt_id": "c0.0", "jtbd": "story"}])}), "prompts"),
    }
    config = SignalConfig(
        base=ModelConfig(path=str(tiny_model)), lora=Lora(rank=2), train=TrainingConfig(epochs=1, batch=16),
        max_tokens=512, most_responses=30, most_held_out=10,
    )  # fmt: skip
    whole = run(STAGE, store, config, inputs, key="a" * 32)
    monkeypatch.setattr(signal_rm, "_CONVERSATIONS", 7)
    monkeypatch.setattr(responses, "responses", partial(responses.responses, turns=4))
    pieces = run(STAGE, store, config, inputs, key="b" * 32)
    assert pieces.manifest.rows == whole.manifest.rows
    assert whole.manifest.rows is not None
    assert (whole.manifest.rows.rows_out, whole.manifest.rows.reasons) == (40, {"not_drawn": 20})
    one, other = whole.json("report"), pieces.json("report")
    assert other["training"]["rows"] == one["training"]["rows"] == 30
    for name in SIGNALS:
        assert other["signals"][name]["n"] == one["signals"][name]["n"]
        assert (
            other["signals"][name]["biases"]["verbosity"]["label"]
            == one["signals"][name]["biases"]["verbosity"]["label"]
        )
        assert other["signals"][name]["auc"] == pytest.approx(one["signals"][name]["auc"], abs=0.05)


@pytest.mark.parametrize(("forget", "says"), [(False, "12 responses to train on and 0 "), (True, "0 responses")])
def test_without_held_out_or_remembered_responses_nothing_is_trained(
    store: Store, given: Given, forget: bool, says: str
) -> None:
    table = traffic(16)
    table = table.filter(pc.equal(table["split"], "train"))
    inputs = {
        "conversations": (given("filter", {"conversations": table}), "conversations"),
        "characters": (given("ingest", {"characters": schemas.CHARACTER.empty_table()}), "characters"),
        "prompts": (given("constrain", {"prompts": prompts([{"prompt_id": "c0.0", "jtbd": "story"}])}), "prompts"),
    }
    known = Inputs(inputs, {}, frozenset({"0" * 32} if forget else ()))
    with pytest.raises(InputError, match=says):
        commit(store, STAGE.name, STAGE.outputs, lambda out: STAGE.run(known, SignalConfig(), out))
