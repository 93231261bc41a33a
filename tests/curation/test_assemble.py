"""Sec. 2.2.1, Table 2: what a clock that is wrong and an event id that is taken may do to a week of logs: nothing."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from flywheel_tasks import pipeline
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.curation.ingest import STAGE

START = dt.datetime(2026, 11, 16, 9, tzinfo=dt.UTC)


def message(number: int, at: dt.datetime, **fields: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{number}", "type": "message", "conversation_id": f"c{number // 2}", "message_id": f"m{number}",
        "user_id": f"u{number // 2 % 5}", "character_id": "maya", "role": ("user", "assistant")[number % 2],
        "content": f"said {number}", "at": at.isoformat(), "source": "production",
    } | fields  # fmt: skip


def week(days: int = 3, a_day: int = 200) -> list[dict[str, Any]]:
    """Conversations of two messages; the last of them ends within ten minutes of the end of the log."""
    numbers = range(days * a_day)
    return [message(n, START + dt.timedelta(days=n // a_day, minutes=2 * (n % a_day))) for n in numbers]


def ingested(folder: Path, events: list[dict[str, Any]]) -> Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    settings = [f"ingest.logs={folder}/log.jsonl", f"store.uri={folder}/store", f"tracking.uri=sqlite:///{folder}/m.db"]
    config = pipeline.load_config("test", overrides=settings)
    return run_stage(STAGE, "2026-W47", config, Store(config.store.uri)).artifact


def continued(artifact: Artifact) -> list[bool | None]:
    rows = sorted(artifact.table("conversations").read().to_pylist(), key=lambda row: row["conversation_id"])
    return [turn["signals"]["continued"] for row in rows for turn in row["turns"] if turn["signals"]]


@pytest.mark.parametrize("wrong", ["2199-01-01T00:00:00Z", "2026-11-20T12:00:00Z", "9999-12-31T23:59:59Z"])
def test_a_clock_that_runs_ahead_moves_no_label(tmp_path: Path, user_key: bytes, wrong: str) -> None:
    clean = ingested(tmp_path / "clean", week())
    assert None in continued(clean), "who was still there when the logs end has no label"
    late = message(9000, dt.datetime.fromisoformat(wrong), model_version="v0-ancient")
    other = ingested(tmp_path / "wrong", [late, *week()])
    assert continued(other) == continued(clean)
    assert other.manifest.rows is not None
    assert other.manifest.rows.reasons == {"at_beyond_log": 1}
    (row,) = other.table("quarantine").read().to_pylist()
    assert (row["where"], row["reason"]) == ("log.jsonl:1", "at_beyond_log")


def test_the_first_minutes_of_one_more_day_are_kept(tmp_path: Path, user_key: bytes) -> None:
    more = message(9000, START + dt.timedelta(days=3))
    rows = ingested(tmp_path, [*week(), more]).manifest.rows
    assert rows is not None
    assert rows.reasons == {}


def test_few_events_on_many_days_are_all_real(tmp_path: Path, user_key: bytes) -> None:
    rows = ingested(tmp_path, [message(n, START + dt.timedelta(days=9 * n)) for n in range(6)]).manifest.rows
    assert rows is not None
    assert rows.rows_out == 6


def test_another_event_under_an_id_that_is_taken_is_no_retry(tmp_path: Path, user_key: bytes) -> None:
    first = message(0, START)
    log = [
        first,
        first,
        first | {"at": (START + dt.timedelta(seconds=9)).isoformat(), "locale": "en_US", "model_version": "v7"},
        first | {"content": "something else"},
        first | {"message_id": "m7"},
        message(1, START),
        {**message(3, START), "event_id": "e1", "conversation_id": "c0", "user_id": "u0"},
    ]
    made = ingested(tmp_path, log)
    assert made.manifest.rows is not None
    assert made.manifest.rows.reasons == {"conflicting event_id": 3, "duplicate event_id": 2}
    assert made.manifest.metrics["conflicting_event_ids"] == 3
    (row,) = made.table("conversations").read().to_pylist()
    assert [turn["content"] for turn in row["turns"]] == ["said 0", "said 1"], "the first in the logs stays"
    places = {r["where"] for r in made.table("quarantine").read().to_pylist() if r["reason"] == "conflicting event_id"}
    assert places == {"log.jsonl:4", "log.jsonl:5", "log.jsonl:7"}
