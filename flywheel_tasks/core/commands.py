"""What commands of several parts share: --profile, --config and --set, and an error in one line."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from flywheel_tasks.core.config import PROFILES, FlywheelConfig
from flywheel_tasks.core.errors import FlywheelError

Settings = Callable[[str | None, str | None, Sequence[str]], FlywheelConfig]
"""Builds the configuration from profile, file and overrides."""
Command = Callable[..., None]
PROFILE = f"One of {', '.join(PROFILES)} (default: $FLYWHEEL_PROFILE, else demo)."
FILE = "A YAML file instead of a profile; it may start from one with 'profile: NAME'."


def configured(
    settings: Settings, whose: str = "", example: str = "store.uri=s3://bucket/x"
) -> Callable[[Command], Command]:
    """A command whose first argument is the configuration. It gets --profile (of `whose` the help speaks), --config and
    --set (with an `example`) behind its own options, and ends with one line and the exit code of its error."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            profile, config, set_ = (given.pop(name) for name in ("profile", "config", "set_"))
            try:
                command(settings(profile, config, set_ or ()), **given)
            except FlywheelError as error:
                raise typer.Exit(told(error)) from error

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        shared = (
            _option("profile", str | None, f"{whose} {PROFILE}".strip()),
            _option("config", str | None, FILE),
            _option("set_", list[str] | None, f"Override one key: --set {example}; lists as YAML. Repeatable."),
        )
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        return run

    return decorate


def told(error: FlywheelError) -> int:
    """Say the error, and below it what else went wrong; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"       {note}", file=sys.stderr)
    return error.exit_code


def _option(name: str, kind: Any, said: str) -> inspect.Parameter:
    option = typer.Option(f"--{name.rstrip('_')}", help=said)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
