"""The DPO patch: delivered pairs come first, it stays small, and it prefers what people chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.herding import moved
from flywheel_tasks.herding.dpo import STAGE, DpoConfig
from flywheel_tasks.herding.exported import ServingConfig, WatchConfig
from flywheel_tasks.models.engine_config import EngineConfig
from flywheel_tasks.models.engine_wire import Completion, Request
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.style.monitor import StyleConfig
from flywheel_tasks.training.config import TrainingConfig
from tests.herding.conftest import run, source
from tests.models.engines import SMALL
from tests.preherding.conftest import Given, preferences

FORGOTTEN = "f" * 32


def patch(
    store: Store,
    given: Given,
    characters: pa.Table,
    model: Path,
    pairs: pa.Table,
    folder: Path,
    delivered: int,
    engine: EngineConfig = SMALL,
) -> Artifact:
    talk = [{"role": "user", "content": "How do I pick a lock?"}]
    answers = {"chosen": "I will not help with that.", "rejected": "Take a hairpin."}
    files = [source(folder, [{"preference_id": f"d{i}", "turns": talk, **answers} for i in range(delivered)])]
    artifacts = {
        "policy": (given("sft", {"model": model}), "model"),
        "preferences": (given("annotate-import", {"preferences": pairs}), "preferences"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
    }
    config = DpoConfig(
        modes=("static",),
        rows=24,
        beta=0.5,
        lora=Lora(rank=4),
        train=TrainingConfig(epochs=3, batch=8, learning_rate=0.01, publish_every=5),
        watch=WatchConfig(prompts=32, max_tokens=24, style=StyleConfig(least=5)),
        serving=ServingConfig(engine=engine),
        max_tokens=400,
    )
    return run(STAGE, store, config, artifacts, files, frozenset({FORGOTTEN}))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_patch_learns_what_was_chosen_and_loses_no_row(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, tmp_path: Path
) -> None:
    rows = preferences(40, ("261109", "261116")).to_pylist()
    rows[1] |= {"user": FORGOTTEN}
    rows[2] |= {"mode": "image"}
    rows[39] |= {"rejected": rows[39]["chosen"]}
    pairs = pa.Table.from_pylist(rows, preferences(1, ("261109",)).schema)
    made = patch(store, given, characters, tiny_model, pairs, tmp_path, delivered=4)
    counts = made.manifest.rows
    assert counts is not None
    assert (counts.rows_in, counts.rows_out) == (44, 23)
    # 10 of the 40 are held out; one more is of another mode. 28 are wanted, beside 4 that were delivered; 24 fit.
    assert counts.reasons == {"equal_responses": 1, "forgotten": 1, "not_of_the_patch": 11, "over_the_limit": 8}
    last = made.json("report")["training"]["last"]
    assert last["accuracy"] > 0.8
    assert last["margin"] > 0 < last["k3_on_pairs"]
    # 23 pairs in batches of 8, three times: a checkpoint on the way and the last one.
    moved, served = made.json("report")["moved"], made.json("report")["served"]
    assert moved["by_step"].keys() == served.keys() == {"5", "9"}
    assert all(0 < drift["probe/drift_max"] < 0.5 for drift in served.values())
    assert 0 < moved["by_step"]["5"]["kl"] < moved["by_step"]["9"]["kl"]
    assert {"style/words", "style/drifted"} <= moved["by_step"]["9"].keys()
    assert [(c["a"], c["b"]) for c in moved["style"]] == [("step-5", "start"), ("step-9", "start")]
    files = {name: {f.path.split("/")[-1] for f in made.manifest.outputs[name].files} for name in ("model", "steps")}
    assert all("trainer_logprobs.json" in names for names in files.values())


def test_without_pairs_there_is_no_patch(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, tmp_path: Path
) -> None:
    pairs = preferences(4, ("261109",))
    user = pa.array([FORGOTTEN] * 4)
    pairs = pairs.set_column(pairs.column_names.index("user"), "user", user)
    with pytest.raises(InputError, match="no pair to patch with"):
        patch(store, given, characters, tiny_model, pairs, tmp_path, delivered=0)


class Answers:
    """An engine as far as it is watched."""

    context = 200

    def generate(self, requests: Sequence[Request], _: object) -> list[Completion]:
        assert all(len(request.tokens) + 24 <= self.context for request in requests)
        return [Completion(request.id, 0, [5], [-1.0], "stop") for request in requests]


def test_watched_are_the_first_prompts_that_leave_room_for_an_answer(tiny_model: Path) -> None:
    """Pairs are admitted by max_tokens, which may be more than the engine's context."""
    rows = preferences(5, ("261109",)).to_pylist()
    for i, row in enumerate(rows):
        row |= {"character_id": "none", "turns": [{"role": "user", "content": "word " * (300 if i == 1 else 5)}]}
    pairs = pa.Table.from_pylist(rows, preferences(1, ("261109",)).schema)
    watch = moved.Watch(tiny_model, moved.prompts_of(pairs), {}, WatchConfig(prompts=3, max_tokens=24), 1)
    watch.look(5, Answers())  # type: ignore[arg-type]
    assert [request.id for request in watch.asked] == watch.prompts["prompt_id"].to_pylist() == ["q0", "q2", "q3"]
    assert [one.id for one in watch.drawn[5]] == ["q0", "q2", "q3"]


def test_an_engine_without_room_for_any_watched_prompt_is_refused_before_the_training(
    store: Store, given: Given, characters: pa.Table, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flywheel_tasks.training import learn

    monkeypatch.setattr(learn, "learn", lambda *_: pytest.fail("it trained"))
    engine = SMALL.model_copy(update={"context": 26})
    with pytest.raises(InputError, match=r"none of 24 prompts .* 24 tokens in a context of 26: raise dpo\.serving"):
        patch(store, given, characters, tiny_model, preferences(40, ("261109",)), tmp_path, 0, engine)
