"""YAML as a person writes it. A key that comes twice in a mapping is refused: what the first one said would vanish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flywheel_tasks.core.errors import ConfigError


def read_yaml(file: str | Path, what: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        body = parse_yaml(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"{what} {file} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} {file} is not YAML: {problem_of(error)}") from error
    if not isinstance(body, dict):
        raise ConfigError(f"{what} {file} must be a mapping of keys to values")
    return body


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; what is wrong with it is a YAMLError or a ValueError."""
    return _Strict(text).get_single_data()


def problem_of(error: Exception) -> str:
    """What is wrong with a YAML text, and where."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


class _Strict(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                problem = f"the key '{key.value}' is already in line {first[key.value]}: write both as one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node
