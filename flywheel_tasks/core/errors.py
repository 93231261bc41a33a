"""Errors that reach a person: one line each, saying what is wrong, where, and what to do."""

from __future__ import annotations

from flywheel_tasks.core.terminal import visible


class FlywheelError(Exception):
    """A failure the user can read and act on. The command line prints it in one line, without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        """One line whatever was handed in: a newline or a terminal's escape code in an id is shown, not obeyed."""
        return visible(super().__str__())


class InputError(FlywheelError):
    """What was handed in is wrong: a file, a row, an id, a missing upstream artifact."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class CorruptArtifact(FlywheelError):
    """A committed file is not what its manifest says."""
