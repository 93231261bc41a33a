"""What is wrong with a document or a configuration, in plain words where pydantic speaks of types."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

_WORDS = {
    "missing": "is missing",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "does not have the form {pattern}",
    "list_type": "must be a list, such as [a, b]",
    "tuple_type": "must be a list, such as [a, b]",
    "dict_type": "must be a section of names and values",
    "model_type": "must be a section of names and values",
    "model_attributes_type": "must be a section of names and values",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be less than or equal to {le}",
    "literal_error": "must be one of {expected}",
    "date_type": "must be a day, such as 2026-11-16",
    "date_parsing": "must be a day, such as 2026-11-16",
    "date_from_datetime_parsing": "must be a day, such as 2026-11-16",
    "date_from_datetime_inexact": "must be a day, such as 2026-11-16",
    "datetime_type": "must be a time, such as 2026-11-16T10:00:00+00:00",
    "datetime_parsing": "must be a time, such as 2026-11-16T10:00:00+00:00",
    "datetime_from_date_parsing": "must be a time, such as 2026-11-16T10:00:00+00:00",
    "timezone_aware": "must be a time with its zone, such as 2026-11-16T10:00:00+00:00",
}
_LONGEST = 80


def first(error: ValidationError, cls: type[BaseModel]) -> tuple[str, str]:
    """Where the first problem of a `cls` is, with dots, and what it is."""
    problem = error.errors()[0]
    at = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        parent = at.rpartition(".")[0]
        legal = [f"{parent}.{name}".lstrip(".") for name in owner(cls, problem["loc"]).model_fields]
        return at, f"is not known: {nearest(at, legal)}"
    words = _WORDS.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return at, words.format(**problem.get("ctx", {})) if problem["type"] in _WORDS else words


def given(error: ValidationError) -> str:
    """The value of the first problem in brackets, where it is short enough to be of use."""
    problem = error.errors()[0]
    value = problem["input"]
    if problem["type"] == "missing" or isinstance(value, dict | BaseModel):
        return ""
    text = repr(value)
    return f" (given: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'})"


def nearest(name: str, legal: Iterable[str]) -> str:
    """What may have been meant by a name that is not known."""
    legal = sorted(legal)
    near = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"legal are {', '.join(legal)}"


def owner(cls: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class that holds the key at `location`."""
    for part in location[:-1]:
        if isinstance(part, int) or part not in cls.model_fields:
            continue
        inner = [t for t in leaf_types(cls.model_fields[part].annotation) if issubclass(t, BaseModel)]
        cls = inner[0] if inner else cls
    return cls


def leaf_types(annotation: Any) -> list[type]:
    """The classes that a field's annotation is made of."""
    if typing.get_origin(annotation) in (None, types.NoneType):
        return [annotation] if isinstance(annotation, type) else []
    if typing.get_origin(annotation) is Literal:
        return []
    return [leaf for argument in typing.get_args(annotation) for leaf in leaf_types(argument)]
