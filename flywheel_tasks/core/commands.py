"""What commands of several parts share: --profile, --config and --set, and an error in one line."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import FlywheelError

Settings = Callable[[str | None, str | None, Sequence[str] | None], FlywheelConfig]
"""Builds the configuration from profile, file and overrides."""
Command = Callable[..., None]
_HELP = {"config": "A YAML file instead of a profile.", "set": "Override one key: --set store.uri=s3://bucket/x."}


def configured(settings: Settings, whose: str) -> Callable[[Command], Command]:
    """A command whose first argument is the configuration. It gets --profile (of `whose` the help speaks), --config and
    --set behind its own options, and ends with one line and the exit code of its error."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            profile, config, set_ = (given.pop(name) for name in ("profile", "config", "set_"))
            try:
                command(settings(profile, config, set_), **given)
            except FlywheelError as error:
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(error.exit_code) from error

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = (
            _option("profile", str | None, whose),
            _option("config", str | None),
            _option("set_", list[str] | None),
        )
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        return run

    return decorate


def _option(name: str, kind: Any, said: str = "") -> inspect.Parameter:
    plain = name.rstrip("_")
    told = typer.Option(f"--{plain}", help=said or _HELP[plain])
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, told])
