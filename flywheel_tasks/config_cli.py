"""`flywheel config`: the configuration that a command would run under, as a file that --config reads."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel

from flywheel_tasks import pipeline
from flywheel_tasks.core.commands import AsJson, configured, print_json
from flywheel_tasks.core.config import FlywheelConfig, without_password
from flywheel_tasks.core.terminal import visible

_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the command to the `flywheel` command."""
    app.command("config")(configured(pipeline.load_config, example="ingest.continue_minutes=15")(config))


def config(
    config: FlywheelConfig,
    stage: Annotated[str | None, typer.Argument(help="Only this stage's keys; see `flywheel stages`.")] = None,
    as_json: AsJson = False,
) -> None:
    """The effective configuration as YAML, every key with what it means: profile, then file, then --set."""
    tracking = config.tracking.model_copy(update={"uri": without_password(config.tracking.uri)})
    config = config.model_copy(update={"tracking": tracking})
    sections: dict[str, BaseModel] = {}
    if stage is None:
        sections = {"store": config.store, "tracking": config.tracking, "models": config.models, **config.stages}
    else:
        sections = {pipeline.by_name(stage).name: config.stages[pipeline.by_name(stage).name]}
    shared = {} if stage else {"profile": config.profile, "seed": config.seed}
    if as_json:
        print_json(shared | {name: section.model_dump(mode="json") for name, section in sections.items()})
        return
    for name, value in shared.items():
        print(f"{name}: {value}")
    for name, section in sections.items():
        print(f"{name}:")
        print("\n".join(commented(section, section.model_dump(mode="json"), "  ")))


def commented(section: BaseModel, values: dict[str, Any], indent: str) -> Iterator[str]:
    """The keys of a section as lines of YAML, below the description of each."""
    for name, field in type(section).model_fields.items():
        for line in textwrap.wrap(field.description or "", _WIDTH - len(indent)):
            yield f"{indent}# {line}"
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            yield f"{indent}{name}:"
            yield from commented(inner, values[name], indent + "  ")
        else:
            yield f"{indent}{name}: {as_yaml(values[name])}"


def as_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return visible(text.removesuffix("...\n").strip())
