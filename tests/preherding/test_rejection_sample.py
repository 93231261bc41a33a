"""Rejection sampling with a real engine and real judges: what is kept is the best that reaches the threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.models import generate
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig
from flywheel_tasks.preherding import sampling
from flywheel_tasks.preherding.rejection_config import RejectionConfig, ThresholdConfig
from flywheel_tasks.preherding.rejection_sample import STAGE
from flywheel_tasks.preherding.responses import SIGNALS
from flywheel_tasks.preherding.sampling import unusable
from flywheel_tasks.simulation.characters import demo_characters
from tests.curation.curation_runs import commit, prompts, run
from tests.preherding.conftest import TOPICS, Given
from tests.tiny_llama import SPECIAL, build_tiny_llama

K = 4


@pytest.fixture(scope="module")
def judges(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fresh heads on the tiny model: arbitrary, but fixed, opinions."""
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer
    from flywheel_tasks.models.heads import load_scorer

    folders = {}
    for kind, names in {"pointwise": (), "signals": SIGNALS}.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        scorer = load_scorer(tiny_model, kind=kind, **({"names": names} if names else {}))
        save_scorer(scorer, load_tokenizer(tiny_model), folders[kind])
    return folders


def week(n: int) -> pa.Table:
    cast = demo_characters()
    return prompts(
        [
            {
                "prompt_id": f"c{i}.0",
                "conversation_id": f"c{i}",
                "character_id": cast[i % len(cast)].character_id,
                "locale": "en_US" if i % 2 else "hi_IN",
                "source": "internal" if i % 5 == 0 else "production",
                "near_policy": i % 5 != 0 and i != 7,
                "split": "eval" if i == 3 else "train",
                "turns": [{"role": "user", "content": f"I keep thinking of {TOPICS[i % 6]}"}],
            }
            for i in range(n)
        ]
    )


def sample(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], model: Path, key: str, **changes: Any
) -> Artifact:
    inputs = {
        "prompts": (given("constrain", {"prompts": week(24)}), "prompts"),
        "characters": (given("ingest", {"characters": characters}), "characters"),
        "reward": (given("preference-pointwise", {"model": judges["pointwise"]}), "model"),
        "signals": (given("signal-rm", {"model": judges["signals"]}), "model"),
    }
    config = RejectionConfig(
        policy=ModelConfig(path=str(model)),
        least_policies=1,
        engine=EngineConfig(cache_gib=0.1, context=512),
        sampling=SamplingConfig(k=K, max_tokens=12),
        **{"keep_unfinished": True, **changes},
    )
    return run(STAGE, store, config, inputs, key=key)


def test_the_best_response_that_reaches_the_threshold_is_kept(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], tiny_model: Path
) -> None:
    made = sample(store, given, characters, judges, tiny_model, "a" * 32, signals={})
    rows = made.table("completions").read().to_pylist()
    assert len(rows) == 22 * K  # one prompt is held out, one is from another version
    reward = {row["completion_id"]: {s["name"]: s["value"] for s in row["scores"]}["reward"] for row in rows}
    kept = {row["prompt_id"]: row["completion_id"] for row in rows if row["accepted"]}
    best: dict[str, float] = {}
    for row in rows:
        best[row["prompt_id"]] = max(best.get(row["prompt_id"], -np.inf), reward[row["completion_id"]])
    bar = np.quantile(list(best.values()), 0.5)
    assert set(kept) == {prompt for prompt, value in best.items() if value >= bar}
    assert all(reward[completion] == best[prompt] for prompt, completion in kept.items())
    report = made.json("report")
    assert report["accepted"] == len(kept) == made.manifest.rows.rows_out
    assert report["best_of_k"] == sorted(report["best_of_k"])
    assert 0 < made.manifest.metrics["sample/waiting_share"] <= 1
    assert report["by_policy"].keys() == {str(tiny_model)}
    assert made.manifest.rows.reasons == {"below_threshold": 11, "older_version": 1}
    assert sum(row["n"] for row in report["earned"]) == 22
    examples = made.table("examples").read().to_pylist()
    assert {example["example_id"] for example in examples} == set(kept.values())
    assert {example["source"] for example in examples} <= {"internal_rjs", "user_rjs"}
    assert all([m["trained"] for m in e["messages"]] == [False, True] for e in examples)
    assert {feature["status"] for feature in made.json("style")["features"]} <= {"ok", "drift", "unknown"}


def test_which_chunk_was_ready_first_does_not_show(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    complete = generate.complete
    monkeypatch.setattr(generate, "complete", lambda *given, **named: reversed(list(complete(*given, **named))))
    made = sample(store, given, characters, judges, tiny_model, "c" * 32, chunk=5)
    rows = made.table("completions").read().select(["prompt_id", "sample", "tokens"]).to_pylist()
    wanted = [f"c{i}.0" for i in range(24) if i not in (3, 7)]
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, s) for p in wanted for s in range(K)]
    assert made.json("report")["tokens"] == sum(row["tokens"] for row in rows)


def test_a_threshold_that_nothing_reaches_is_an_error_that_names_the_best(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], tiny_model: Path
) -> None:
    rule = ThresholdConfig(value=1e6, quantile=None)
    with pytest.raises(InputError, match=r"no response reaches its threshold: the best rewards are -?\d"):
        sample(store, given, characters, judges, tiny_model, "b" * 32, threshold=rule)


@pytest.mark.parametrize("signal", ["love", "feedback", "thumb_down"])
def test_signals_that_proved_unreliable_may_not_even_rank(signal: str) -> None:
    with pytest.raises(ValueError, match=r"Sec\. 2\.3\.2"):
        RejectionConfig(signals={signal: 0.1})


def test_a_pool_of_one_is_refused_unless_it_is_meant() -> None:
    small, large = ModelConfig(path="/models/70b"), ModelConfig(path="/models/405b", tensor_parallel=16)
    with pytest.raises(ValueError, match=r"the pool is /models/70b.*larger sibling in models\.candidates"):
        RejectionConfig(policy=small)
    with pytest.raises(ValueError, match="chooses among 2"):
        RejectionConfig(policy=small, candidates=(small,))
    assert RejectionConfig(policy=small, candidates=(large,)).least_policies == 2
    assert RejectionConfig(policy=small, least_policies=1).candidates == ()


def test_a_threshold_is_one_rule() -> None:
    with pytest.raises(ValueError, match=r"threshold\.value or threshold\.quantile"):
        ThresholdConfig(value=1.0, quantile=0.5)
    with pytest.raises(ValueError, match="same in every segment"):
        ThresholdConfig(value=1.0, quantile=None, by=("locale",))


def completions(rows: list[dict[str, Any]]) -> pa.Table:
    plain = {"finish": "stop", "text": "Hello.", "reason": None}
    return pa.Table.from_pylist([plain | row for row in rows])


def test_what_was_cut_is_empty_or_failed_is_never_chosen() -> None:
    table = completions(
        [{}, {"finish": "length"}, {"text": "  "}, {"finish": "error", "text": "", "reason": "too_long: 9 of 8"}]
    )
    assert unusable(table, keep_unfinished=False) == [None, "infinity_loop", "empty_response", "too_long: 9 of 8"]
    assert unusable(table, keep_unfinished=True)[1] is None


def test_histories_are_never_one_piece_but_in_the_order_of_the_prompts(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As one piece, the histories of a large week pass the 2 GiB that Arrow addresses."""
    whole = sample(store, given, characters, judges, tiny_model, "e" * 32, chunk=5)
    in_order, seen = sampling._in_order, []

    def small(tables: Any, order: Any, k: int) -> pa.Table:
        found = in_order(tables, order, k, block=1000)
        seen.append([len(piece) for piece in found["turns"].chunks])
        return found

    monkeypatch.setattr(sampling, "_in_order", small)
    monkeypatch.setattr(sampling, "_TOGETHER", 3)
    pieces = sample(store, given, characters, judges, tiny_model, "f" * 32, chunk=5)
    assert len(seen[0]) > 4
    assert all(rows % K == 0 for rows in seen[0])
    for name in ("completions", "examples", "quarantine"):
        assert pieces.table(name).read().equals(whole.table(name).read())
    assert pieces.json("style") == whole.json("style")
    assert pieces.json("report") == whole.json("report")


@pytest.fixture(scope="module")
def half_stopping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that ends every second response or so within 12 tokens: its end of turn often outweighs all else."""
    from safetensors.torch import load_file, save_file

    folder = build_tiny_llama(tmp_path_factory.mktemp("half-stopping"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][SPECIAL.index("<|eot_id|>")] *= 4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_loops_are_refused_by_name_however_high_they_score(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], half_stopping: Path
) -> None:
    made = sample(store, given, characters, judges, half_stopping, "c" * 32, keep_unfinished=False)
    rows = made.table("completions").read().to_pylist()
    assert len(rows) / 10 < sum(row["finish"] == "length" for row in rows) < len(rows) * 9 / 10
    assert {row["reason"] for row in rows if row["finish"] == "length"} == {"infinity_loop"}
    assert not any(row["accepted"] for row in rows if row["finish"] == "length")


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_weight_is_a_number_from_zero_up(weight: float) -> None:
    with pytest.raises(ValueError, match="continue"):
        RejectionConfig(signals={"continue": weight})


def test_prompts_of_forgotten_users_are_not_sampled_from(
    store: Store, given: Given, characters: pa.Table, judges: dict[str, Path], tiny_model: Path
) -> None:
    inputs = Inputs({"prompts": (given("constrain", {"prompts": week(6)}), "prompts")}, {}, frozenset({"0" * 32}))
    config = RejectionConfig(least_policies=1)
    with pytest.raises(InputError, match="no prompt to sample from"):
        commit(store, STAGE.name, STAGE.outputs, lambda out: STAGE.run(inputs, config, out), "d" * 32)
