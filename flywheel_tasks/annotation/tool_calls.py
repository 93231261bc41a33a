"""A response that calls a tool (Sec. 2.7): what is said, and the call, such as an image to be generated, apart."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class Spoken(NamedTuple):
    """The words, the call as canonical JSON (or none), and why the response is malformed (or none)."""

    text: str
    call: str | None
    reason: str | None = None


def split(response: str) -> Spoken:
    """At most one call of the form {"name": …, "arguments": {…}} between <tool_call> tags."""
    calls = _CALL.findall(response)
    text = _CALL.sub("", response).strip()
    if "<tool_call>" in text or "</tool_call>" in text:
        return Spoken(text, None, "tool_call_unclosed")
    if not calls:
        return Spoken(text, None)
    if len(calls) > 1:
        return Spoken(text, None, "tool_call_twice")
    try:
        call = json.loads(calls[0])
    except (ValueError, RecursionError):
        return Spoken(text, None, "tool_call_malformed")
    if isinstance(call, list) and len(call) == 1:
        call = call[0]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Spoken(text, None, "tool_call_malformed")
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, dict):
        return Spoken(text, None, "tool_call_malformed")
    return Spoken(text, json.dumps({"name": call["name"], "arguments": arguments}, sort_keys=True, ensure_ascii=False))
