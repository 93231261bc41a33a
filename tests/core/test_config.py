"""Nothing wrong gets into a run: unknown keys, wrong types and contradictions are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from flywheel_tasks import pipeline
from flywheel_tasks.core.config import PROFILES, ModelConfig, Operational, StageConfig, load, model_of, model_roles
from flywheel_tasks.core.errors import ConfigError


class Tuned(StageConfig):
    rate: float = Field(0.5, ge=0, le=1)
    words: tuple[str, ...] = ()
    threads: int = Field(1, json_schema_extra=Operational)


STAGES = {stage.name: stage.config for stage in pipeline.STAGES} | {"tune": Tuned}


class Placed(StageConfig):
    rate: float = 0.5
    cores: int = Field(1, json_schema_extra=Operational)


class Nested(StageConfig):
    place: Placed = Placed()


def test_where_a_stage_runs_is_no_part_of_what_it_makes_however_deep() -> None:
    assert Nested(place=Placed(cores=8)).identity() == Nested().identity() == {"place": {"rate": 0.5}}
    assert Nested(place=Placed(rate=0.1)).identity() != Nested().identity()


class Sampled(StageConfig):
    place: Placed = Placed(rate=0.25, cores=4)


def test_setting_one_key_of_a_section_leaves_its_others_as_the_stage_has_them() -> None:
    found = load(STAGES | {"draw": Sampled}, "demo", overrides=["draw.place.cores=8"]).stages["draw"]
    assert found == Sampled(place=Placed(rate=0.25, cores=8))


class Modelled(StageConfig):
    base: ModelConfig = model_of("reward", "where training starts")
    pool: tuple[ModelConfig, ...] = model_of("candidates", "further policies")


def test_a_stage_uses_the_cycles_model_unless_it_names_its_own() -> None:
    shared = ("models.reward.path=/m/reward", "models.candidates=[{path: /m/large}]")
    stage = load(STAGES | {"judge": Modelled}, "demo", overrides=shared).stages["judge"]
    assert isinstance(stage, Modelled)
    assert (stage.base.path, [model.path for model in stage.pool]) == ("/m/reward", ["/m/large"])
    own = load(STAGES | {"judge": Modelled}, "demo", overrides=(*shared, "judge.base.path=/m/own")).stages["judge"]
    assert isinstance(own, Modelled)
    assert own.base.path == "/m/own"
    assert model_roles(Modelled) == {"base": "reward", "pool": "candidates"}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_shipped_profile_loads(profile: str) -> None:
    config = pipeline.load_config(profile)
    assert config.profile == profile
    assert set(config.stages) == {stage.name for stage in pipeline.STAGES}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("tune.rte=0.1", "did you mean 'tune.rate'"),
        ("tnue.rate=0.1", "did you mean 'tune'"),
        ("tune.rate=high", "tune.rate"),
        ("tune.rate=1.5", "less than or equal to 1"),
        ("sede=3", "did you mean 'seed'"),
        ("models.policy.pth=x", "did you mean 'models.policy.path'"),
        ("store.uri=ftp://x", "use file://, s3:// or gs://"),
        ("store.uri=s3://bucket/../other", "without '..'"),
        ("tune=3", "'tune' is a section"),
        ("tune.rate", "write for example --set tune.rate=VALUE"),
        ("tune.words=3", "'tune.words': must be a list"),
        ("tune.rate=high", "'tune.rate': must be a number"),
        ("store.uri=s3://", "'s3://' must be a plain URI"),
        ("tune.threads=yes", "'threads' is a number"),
        ("tune.words=2026-13-45", "not a YAML value"),
        ("tune.words=[a", "not a YAML value"),
    ],
)
def test_a_wrong_override_is_refused_naming_the_key_and_the_cure(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(STAGES, overrides=[override])
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_same_model_twice_in_the_pool_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="twice"):
        load(STAGES, overrides=["models.policy.path=/m/a", "models.candidates=[{path: /m/a}]"])


def test_overrides_win_over_the_file_and_the_file_over_the_profile(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("profile: cluster\nseed: 5\ntune: {rate: 0.25, words: [a]}\n")
    config = load(STAGES, file=str(file), overrides=["tune.rate=0.75"])
    tuned = config.stages["tune"]
    assert isinstance(tuned, Tuned)
    assert (config.seed, tuned.rate, tuned.words) == (5, 0.75, ("a",))
    assert config.models.policy.tensor_parallel == 8, "the profile is the file's"


@pytest.mark.parametrize("text", ["- a list", "key: [unclosed", "{1: 2, tune: {rate: 3}}"])
def test_a_broken_config_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refusal:
        load(STAGES, file=str(file))
    assert "\n" not in str(refusal.value)
    if text == "key: [unclosed":
        assert "line 1, column 15" in str(refusal.value)


def test_a_section_that_comes_twice_is_refused_and_not_half_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("profile: demo\ngate:\n  unsafe_ceiling: 0.001\nseed: 5\ngate:\n  win_rate_precision: 0.2\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml.*line 5.*'gate' is already in line 2"):
        load(STAGES, file=str(file))
    with pytest.raises(ConfigError, match="'rate' is already"):
        load(STAGES, overrides=["tune={rate: 0.1, rate: 0.2}"])


def test_what_a_mapping_takes_from_another_may_be_said_anew(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("tune: &shared {rate: 0.25, words: [a]}\ndraw: {<<: *shared, rate: 0.75}\n")
    loaded = load(STAGES | {"draw": Tuned}, file=str(file)).stages["draw"]
    assert isinstance(loaded, Tuned)
    assert (loaded.rate, loaded.words) == (0.75, ("a",))


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_none_is_refused_with_its_key(value: str) -> None:
    with pytest.raises(ConfigError, match=r"timeout_s.*finite"):
        pipeline.load_config("demo", overrides=[f"filter.privacy.timeout_s={value}"])


def test_a_threshold_is_never_yes() -> None:
    for key in ("gate.win_rate.block", "gate.win_rate.hold", "gate.unsafe.worse", "gate.unsafe.doubt"):
        with pytest.raises(ConfigError, match=f"'{key.rpartition('.')[2]}' is a number, not true"):
            pipeline.load_config("demo", overrides=[f"{key}=yes"])


def test_how_a_stage_runs_is_not_part_of_what_it_computes() -> None:
    one, many = Tuned(threads=1), Tuned(threads=64)
    assert one.identity() == many.identity() == {"rate": 0.5, "words": []}
    assert Tuned(rate=0.4).identity() != one.identity()


def test_a_profile_beside_a_config_file_is_refused_but_one_in_the_environment_is_only_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\n")
    with pytest.raises(ConfigError, match="not both"):
        load(STAGES, profile="test", file=str(file))
    monkeypatch.setenv("FLYWHEEL_PROFILE", "test")
    assert load(STAGES, file=str(file)).profile == "test"


def test_a_password_in_the_tracking_uri_is_never_part_of_what_is_tracked() -> None:
    flat = load(STAGES, overrides=["tracking.uri=http://me:secret@host:5000"]).flat()
    assert flat["tracking.uri"] == "http://host:5000"
    assert "secret" not in str(flat)
