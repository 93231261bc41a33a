"""What commands of several parts share: --profile, --config and --set, JSON, the places they write to, and an error in
one line."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flywheel_tasks.core.config import PROFILES, FlywheelConfig
from flywheel_tasks.core.errors import ConfigError, FlywheelError, InputError
from flywheel_tasks.core.terminal import visible

Settings = Callable[[str | None, str | None, Sequence[str]], FlywheelConfig]
"""Builds the configuration from profile, file and overrides."""
Command = Callable[..., None]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
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
                found = settings(profile, config, set_ or ())
                _store_is_a_folder(found.store.uri)
                command(found, **given)
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
        print(f"       {visible(str(note))}", file=sys.stderr)
    return error.exit_code


def print_json(value: Any) -> None:
    """Print a result for machines."""
    print(json.dumps(value, indent=1, default=str, ensure_ascii=False))


def new_file(path: Path, option: str, suffix: str) -> None:
    """Refuse a file that can't be written, before anything is computed for it."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: name a {suffix} file in it")
    if path.suffix.lower() != suffix:
        raise InputError(f"{option} {path}: give it a name that ends in {suffix}")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path} can't be written: check its permissions")


def new_folder(path: Path, option: str) -> None:
    """Refuse a folder that can't be made or written to, before anything is computed for it."""
    there = nearest(path)
    if not there.is_dir():
        raise InputError(f"{option} {path}: {there} is a file: name a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"{option} {path}: nothing can be written in {there}: check its permissions")


def nearest(path: Path) -> Path:
    """The path, or the nearest folder or file above it that exists."""
    path = path.absolute()
    return next((at for at in (path, *path.parents) if os.path.lexists(at)), path)


def _store_is_a_folder(uri: str) -> None:
    """A file where the store should be holds nothing, and must not read as a store without cycles."""
    if uri.startswith("file://") and not (there := nearest(Path(uri.removeprefix("file://")))).is_dir():
        raise ConfigError(f"store.uri '{uri}': {there} is a file: name a folder")


def _option(name: str, kind: Any, said: str) -> inspect.Parameter:
    option = typer.Option(f"--{name.rstrip('_')}", help=said)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
