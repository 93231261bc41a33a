"""Errors that reach a person: one line each, saying what is wrong, where, and what to do."""

from __future__ import annotations


class FlywheelError(Exception):
    """A failure the user can read and act on. The command line prints it in one line, without a traceback."""

    exit_code = 1


class InputError(FlywheelError):
    """What was handed in is wrong: a file, a row, an id, a missing upstream artifact."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class CorruptArtifact(FlywheelError):
    """A committed file is not what its manifest says."""
