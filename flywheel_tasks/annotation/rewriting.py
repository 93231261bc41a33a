"""Expert chain-of-thought rewriting (Sec. 2.2.2 ii): the prompt for one kind of rewrite, and the reply out of its
answer. Templates are data (`rewriting.yaml`), versioned; a malformed answer is a reason, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from flywheel_tasks.core.errors import ConfigError

_REPLY = re.compile(r"<reply>(.*?)</reply>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?(?:reply|thinking)\s*>", re.IGNORECASE)
_SPACE = re.compile(r"\s+")
_QUOTES = (('"', '"'), ("“", "”"), ("«", "»"))


class Templates(NamedTuple):
    version: int
    frame: str
    kinds: Mapping[str, Mapping[str, Any]]


class Parsed(NamedTuple):
    """The rewritten reply, or why there is none."""

    reply: str | None
    reason: str | None = None


@cache
def templates() -> Templates:
    text = files("flywheel_tasks.annotation").joinpath("rewriting.yaml").read_text(encoding="utf-8")
    return Templates(**yaml.safe_load(text))


def kinds(chosen: Iterable[str] = ()) -> tuple[str, ...]:
    """The kinds of rewrite that are used: all of them unless some are chosen."""
    known, wanted = templates().kinds, tuple(chosen)
    if unknown := [kind for kind in wanted if kind not in known]:
        raise ConfigError(f"pairs.rewrites: no kind '{unknown[0]}': legal kinds are {', '.join(known)}")
    return wanted or tuple(known)


def label(kind: str) -> str:
    """How a rewrite is named as a policy: its kind and the templates' version."""
    return f"rewrite:{kind}@{templates().version}"


def prompt(kind: str, character: Any, turns: Iterable[Mapping[str, Any]], reply: str) -> str:
    """What the rewriting model is asked. Every quoted text is one line, so none can forge a turn or a heading."""
    chosen = templates().kinds[kind]
    rendered: str = _frame().render(
        character=character, turns=list(turns), reply=reply, task=chosen["task"], steps=chosen["steps"]
    )
    return rendered.strip()


def parse(answer: str) -> Parsed:
    """The one reply of an answer. It comes last: what follows it, a second one, or a missing end make it malformed."""
    found = _REPLY.findall(answer)
    if not found:
        return Parsed(None, "rewrite_unclosed" if "<reply>" in answer.lower() else "rewrite_without_reply")
    if len(found) > 1:
        return Parsed(None, "rewrite_twice")
    if _REPLY.split(answer)[-1].strip():
        return Parsed(None, "rewrite_with_afterword")
    reply = _unquoted(found[0].strip())
    if not reply:
        return Parsed(None, "rewrite_empty")
    if _TAG.search(reply):
        return Parsed(None, "rewrite_with_reasoning")
    return Parsed(reply)


def _unquoted(reply: str) -> str:
    """Without the speaker's name or the quotation marks that models like to put around a reply."""
    reply = re.sub(r"\A(?:Character|Reply)\s*:\s*", "", reply)
    for opening, closing in _QUOTES:
        inner = reply[1:-1]
        if len(reply) > 1 and reply[0] == opening and reply[-1] == closing and not {opening, closing} & set(inner):
            return inner.strip()
    return reply


@cache
def _frame() -> Any:
    from jinja2 import Environment, StrictUndefined

    # The prompt is plain text for a model, not markup: escaping would change what is read.
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701
    environment.filters["oneline"] = lambda text: _SPACE.sub(" ", str(text)).strip()
    return environment.from_string(templates().frame)
