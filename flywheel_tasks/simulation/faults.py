"""What goes wrong in a raw event log: duplicates, late and reordered delivery, and lines that are no event at all."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson


@dataclass(frozen=True)
class Faults:
    """Rates per event. Malformed and unknown lines come on top of the true events, so the truth stays whole."""

    duplicate: float = 0.01
    late: float = 0.01
    reordered: float = 0.05
    malformed: float = 0.003
    unknown_type: float = 0.001


NONE = Faults(0, 0, 0, 0, 0)


def encode(event: dict[str, Any]) -> bytes:
    return orjson.dumps(event)


def retried(event: dict[str, Any]) -> bytes:
    """The same event as another client would serialise it: other key order, other whitespace, nulls spelled out."""
    reversed_keys = {k: event[k] for k in reversed(event)} | {"image": None}
    return orjson.dumps(reversed_keys).replace(b'":', b'": ', 1)


def malformed(rng: np.random.Generator, event: dict[str, Any], serial: int) -> tuple[str, bytes]:
    """A kind of damage and a damaged copy of the event, under an id of its own."""
    kind = list(_DAMAGE)[int(rng.integers(len(_DAMAGE)))]
    return kind, _DAMAGE[kind](event | {"event_id": f"damaged-{serial:06d}"}, rng)


def unknown_type(event: dict[str, Any], serial: int) -> bytes:
    return encode(event | {"event_id": f"unknown-{serial:06d}", "type": "typing_started"})


def arrival(rng: np.random.Generator, at: dt.datetime, faults: Faults) -> dt.datetime:
    """When the collector sees an event that happened at `at`."""
    draw = rng.random()
    if draw < faults.late:
        return at + dt.timedelta(hours=float(rng.uniform(2, 40)))
    if draw < faults.late + faults.reordered:
        return at + dt.timedelta(seconds=float(rng.uniform(5, 900)))
    return at + dt.timedelta(milliseconds=200)


def _truncated(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    line = encode(event)
    return line[: int(rng.integers(1, len(line) - 1))]


def _missing_field(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    gone = ("event_id", "type", "conversation_id", "message_id", "user_id", "character_id", "at")[int(rng.integers(7))]
    return encode({k: v for k, v in event.items() if k != gone})


def _wrong_type(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    wrong: dict[str, Any] = (
        {"user_id": 17}, {"conversation_id": ["c1"]}, {"message_id": None}, {"type": {"name": "message"}}, {"at": True},
    )[int(rng.integers(5))]  # fmt: skip
    return encode(event | wrong)


def _bad_utf8(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    return encode(event).replace(b'"character_id":"', b'"character_id":"\xff\xfe\xc3', 1)


def _control_character(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    return encode(event).replace(b'"user_id":"', b'"user_id":"\x01\x1b', 1)


def _lone_surrogate(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    return encode(event).replace(b'"user_id":"', b'"user_id":"\\ud83d', 1)


def _bad_time(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    return encode(event | {"at": ("yesterday", "", "2026-13-45T99:00:00Z", "0x1f")[int(rng.integers(4))]})


def _not_an_object(event: dict[str, Any], rng: np.random.Generator) -> bytes:
    return (b"[]", b"null", b'"message"', b"42", b"{}", b"NaN")[int(rng.integers(6))]


_DAMAGE: dict[str, Callable[[dict[str, Any], np.random.Generator], bytes]] = {
    "truncated": _truncated,
    "missing_field": _missing_field,
    "wrong_type": _wrong_type,
    "bad_utf8": _bad_utf8,
    "control_character": _control_character,
    "lone_surrogate": _lone_surrogate,
    "bad_time": _bad_time,
    "not_an_object": _not_an_object,
}
