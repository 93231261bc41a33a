"""Ids can't leave their folder, weeks exist, and a pseudonym can't be made without the key."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import ConfigError, InputError

EVIL = ["..", "../x", "a/../b", "/etc/passwd", "a\\b", "a\0b", "a\n", "", ".hidden", "%2e%2e", "a b", "é", "x" * 300]


@pytest.mark.parametrize("text", EVIL)
def test_no_evil_id_passes_any_validator(text: str) -> None:
    for check in (ids.key, ids.cycle_id, lambda t: ids.name(t, "name"), lambda t: ids.relative_path(t, "here")):
        with pytest.raises(InputError):
            check(text)


@given(st.text())
def test_a_relative_path_that_passes_stays_inside(text: str) -> None:
    try:
        path = ids.relative_path(text, "here")
    except InputError:
        return
    assert not path.startswith("/")
    assert ".." not in path
    assert "\\" not in path


@given(st.dates(datetime.date(1990, 1, 1), datetime.date(2100, 1, 1)))
def test_a_day_lies_in_its_cycle(day: datetime.date) -> None:
    cycle = ids.cycle_of(day)
    assert ids.cycle_id(cycle) == cycle
    assert 0 <= (day - ids.cycle_start(cycle)).days < 7


@pytest.mark.parametrize("week", ["2026-W54", "2026-W00", "2025-W53", "2026-W7", "26-W07", "2026-w07", "0000-W01"])
def test_a_week_that_does_not_exist_is_refused(week: str) -> None:
    with pytest.raises(InputError, match="ISO week"):
        ids.cycle_id(week)


def test_a_missing_or_short_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ids.USER_KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="not set"):
        ids.user_key()
    monkeypatch.setenv(ids.USER_KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match="only 5 bytes"):
        ids.user_key()


def test_pseudonyms_depend_on_the_key_and_never_show_the_user() -> None:
    one, other = b"k" * 16, b"l" * 16
    assert ids.pseudonym("alice", one) == ids.pseudonym("alice", one)
    assert len({ids.pseudonym("alice", one), ids.pseudonym("alice", other), ids.pseudonym("bob", one)}) == 3
    assert "alice" not in ids.pseudonym("alice", one)
    assert ids.fingerprint(one) != ids.fingerprint(other)
