"""Identifiers: what a legal one looks like, and the keyed pseudonym that stands for a person."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable

from flywheel_tasks.core.errors import ConfigError, InputError

_CYCLE = re.compile(r"(\d{4})-W(\d{2})\Z")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}\Z", re.IGNORECASE)
_KEY = re.compile(r"[0-9a-f]{32}\Z")
_RELATIVE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]{0,199}(/[A-Za-z0-9][A-Za-z0-9_.=-]{0,199})*\Z")

USER_KEY_VARIABLE = "FLYWHEEL_USER_KEY"
_SHORTEST_USER_KEY = 16


def cycle_id(text: str) -> str:
    """`text` if it names an ISO week that exists, such as 2026-W47."""
    match = _CYCLE.match(text)
    if match:
        year, week = int(match[1]), int(match[2])
        if year and 1 <= week <= datetime.date(year, 12, 28).isocalendar().week:
            return text
    raise InputError(f"cycle '{text}' is not an ISO week: write it like 2026-W47")


def cycle_start(cycle: str) -> datetime.date:
    """The Monday of the cycle's week."""
    year, week = cycle_id(cycle).split("-W")
    return datetime.date.fromisocalendar(int(year), int(week), 1)


def cycle_of(day: datetime.date) -> str:
    """The cycle a day belongs to."""
    iso = day.isocalendar()
    return f"{iso.year}-W{iso.week:02d}"


def name(text: str, what: str) -> str:
    """`text` if it is a plain name that can't leave its folder."""
    if _NAME.match(text) and ".." not in text:
        return text
    raise InputError(f"{what} '{text[:80]}' is not a plain name: use letters, digits, '_', '.' and '-'")


def key(text: str) -> str:
    """`text` if it is an artifact key."""
    if _KEY.match(text):
        return text
    raise InputError(f"'{text[:80]}' is not an artifact key: it has 32 hexadecimal digits")


def relative_path(text: str, where: str) -> str:
    """`text` if it is a path below its folder: no '..', no leading '/', no odd characters."""
    if _RELATIVE.match(text) and ".." not in text:
        return text
    raise InputError(f"{where}: path '{text[:80]}' is not a plain relative path")


def is_legal(check: Callable[..., str], text: str, *arguments: str) -> bool:
    """Whether a validator of this module accepts `text`."""
    try:
        check(text, *arguments)
    except InputError:
        return False
    return True


def new_attempt() -> str:
    """A name for one attempt at an artifact; sorts by time, never repeats."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(6)}"


def user_key() -> bytes:
    """The secret under which user ids are pseudonymised. It comes from the environment and is never stored."""
    value = os.environ.get(USER_KEY_VARIABLE, "").encode()
    if len(value) < _SHORTEST_USER_KEY:
        problem = "is not set" if not value else f"has only {len(value)} bytes"
        raise ConfigError(
            f"{USER_KEY_VARIABLE} {problem}: set it to a secret of at least {_SHORTEST_USER_KEY} bytes, "
            "the same in every cycle (for example: openssl rand -hex 32)"
        )
    return value


def pseudonym(user_id: str, secret: bytes) -> str:
    """The stable stand-in for a user: HMAC-SHA256, cut to 128 bits."""
    return hmac.digest(secret, user_id.encode(), "sha256").hex()[:32]


def fingerprint(secret: bytes) -> str:
    """Tells whether two runs used the same secret without telling the secret."""
    return hashlib.blake2b(b"", key=hashlib.sha256(secret).digest(), person=b"flywheel-user-ke").hexdigest()[:16]
