"""`flywheel status`, `show`, `lineage`, `forget` and `config` on a small store, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flywheel_tasks import pipeline
from flywheel_tasks.app import run_app
from flywheel_tasks.core import ids
from flywheel_tasks.core.store import Store
from tests.conftest import USER_KEY

CYCLE = "2026-W47"
SAID = {
    "type": "message", "conversation_id": "c", "character_id": "maya", "at": "2026-11-16T09:30:00Z",
    "source": "production", "locale": "en_US",
}  # fmt: skip


def line(number: int, user: str, role: str = "user") -> str:
    return json.dumps(
        SAID | {"event_id": f"e{number}", "message_id": f"m{number}", "user_id": user, "role": role, "content": "hi"}
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path))
    monkeypatch.setenv("FLYWHEEL_PROFILE", "test")
    monkeypatch.setenv(ids.USER_KEY_VARIABLE, USER_KEY)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def made(home: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A week of two good events and three bad ones; the key of its artifact."""
    bad = ["no json", "[1]", '{"type": "\\u001b[31m"}']
    (home / "log\x1b.jsonl").write_text("\n".join([line(1, "ann"), line(2, "ann", "assistant"), *bad]) + "\n")
    assert run_app(["run", "ingest", "--cycle", CYCLE, "--set", f"ingest.logs=[{home}/log*]"]) == 0
    return capsys.readouterr().out.strip().split("/")[-2]


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_app([*arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_rejected_rows_are_shown_with_reason_file_and_line(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "show", made, "--quarantine", "2")
    assert code == 0
    assert "2 of 3 rejected rows" in out
    assert r"log\x1b.jsonl:" in out
    rows = json.loads(say(capsys, "show", made, "--quarantine", "9", "--json")[1])
    assert {row["where"].rpartition(":")[2] for row in rows} == {"3", "4", "5"}
    assert all(row["reason"] for row in rows)


def test_no_look_at_the_store_obeys_a_file_name(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("show", made), ("lineage", made), ("status",), ("show", made, "--quarantine", "3")):
        code, out, err = say(capsys, *command)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        if command[0] == "status":
            assert max(map(len, out.splitlines())) <= 80


def test_a_user_that_nobody_knows_is_not_forgotten_by_mistake(
    home: Path, made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = say(capsys, "lineage", "--user", "anne")
    assert (code, "no artifact in" in out, "check the spelling" in out) == (0, True, True)
    code, _, err = say(capsys, "forget", "--user", "anne")
    assert (code, "nothing was done" in err, "--even-if-unknown" in err) == (2, True, True)
    store = Store(f"{home}/store")
    assert store.forgotten() == frozenset()
    code, out, _ = say(capsys, "forget", "--user", "anne", "--even-if-unknown")
    assert (code, "no artifact ever held" in out) == (0, True)
    assert len(store.forgotten()) == 1
    assert say(capsys, "forget", "--user", "ann")[0] == 0
    assert say(capsys, "forget", "--user", "ann")[0] == 0, "again, to finish or to prove it"
    assert "since then purged: " in say(capsys, "show", made)[1]


def test_another_key_is_named_before_a_user_is_called_unknown(
    made: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ids.USER_KEY_VARIABLE, "another-key-of-enough-bytes")
    code, _, err = say(capsys, "forget", "--user", "ann")
    assert (code, "under another" in err) == (2, True)


def test_a_damaged_manifest_hides_no_other(home: Path, made: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = home / "store" / "artifacts" / "filter" / ("0" * 32)
    other.mkdir(parents=True)
    (other / "manifest.json").write_text("{}")
    assert say(capsys, "show", made[:12])[0] == 0
    code, _, err = say(capsys, "show", f"filter/{'0' * 32}")
    assert (code, "it is cut off or no manifest" in err) == (1, True)


def test_status_says_what_is_stale_and_what_never_ran(
    home: Path, made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["run", "filter", "--cycle", CYCLE]) == 0
    capsys.readouterr()
    assert "stale" not in say(capsys, "status")[1]
    (home / "log2.jsonl").write_text(line(3, "ben") + "\n")
    assert run_app(["run", "ingest", "--cycle", CYCLE, "--set", f"ingest.logs=[{home}/log2*]"]) == 0
    capsys.readouterr()
    found = json.loads(say(capsys, "status", "--json")[1])[CYCLE]
    assert {stage: one["stale"] for stage, one in found.items() if one} == {"ingest": False, "filter": True}
    rows = [row.split() for row in say(capsys, "status")[1].splitlines()]
    assert [row[0] for row in rows if row and row[-1] == "stale"] == ["filter"]
    assert "2026-W10 has not run" in say(capsys, "status", "--cycle", "2026-W10")[1]


def test_the_printed_configuration_is_a_file_that_gives_the_same_one(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ("--set", "ingest.continue_minutes=15", "--set", "models.reward.path=/m/a")
    _, text, _ = say(capsys, "config", *change)
    assert "  # p(continue): the user writes again within this time (Table 2)\n  continue_minutes: 15\n" in text
    (home / "mine.yaml").write_text(text)
    whole = json.loads(say(capsys, "config", "--json", *change)[1])
    assert json.loads(say(capsys, "config", "--json", "--config", f"{home}/mine.yaml")[1]) == whole
    assert set(whole) == {"profile", "seed", "store", "tracking", "models", *(s.name for s in pipeline.STAGES)}
    one = yaml.safe_load(say(capsys, "config", "ingest")[1])
    assert set(one) == {"ingest"}
    _, secret, _ = say(capsys, "config", "--set", "tracking.uri=http://me:hush@host")
    assert "hush" not in secret
