from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from flywheel_tasks.annotation import delivery, waiting
from flywheel_tasks.annotation.waiting import Arrived, Inbox
from flywheel_tasks.core.errors import InputError
from tests.annotation import worlds

DEADLINE = dt.datetime(2026, 11, 20, 18, tzinfo=dt.UTC)
BEFORE, AFTER = DEADLINE - dt.timedelta(seconds=1), DEADLINE


def test_it_waits_for_enough_and_never_past_the_deadline() -> None:
    assert waiting.decide(Arrived(100, 79), 80, BEFORE, DEADLINE) == "wait"
    assert waiting.decide(Arrived(100, 80), 80, BEFORE, DEADLINE) == "enough"
    assert waiting.decide(Arrived(100, 0), 80, AFTER, DEADLINE) == "late"
    assert waiting.decide(Arrived(0, 0), 80, BEFORE, DEADLINE) == "enough", "nothing was asked for"
    assert waiting.decide(Arrived(60, 60), 80, BEFORE, DEADLINE) == "enough", "nobody sends more than was asked for"


def test_only_different_people_on_this_exports_tasks_count(tmp_path, user_key) -> None:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(6), "2026-W47")
    one, two = world.tasks()[:2]
    rows = [worlds.line(one, who) for who in ("a", "a", "b", "c", "d")] + [worlds.line(two, "a")]
    rows.append(worlds.line(two, "z", task_id="t-of-another-week"))
    path = worlds.write(world.inbox, "261118-a.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"broken\n")
    sent = waiting.sent(world.exports[0])
    found = waiting.arrived(sent.tasks, waiting.said(delivery.lines(path.name, path.read_bytes(), "2026-W47"), sent))
    assert found == Arrived(3 * len(sent.tasks), 3 + 1)


@pytest.mark.parametrize("modes", [{"static": 1.0}, {"steerability": 1.0}])
def test_a_review_that_the_import_will_refuse_is_not_counted(
    tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch, modes: dict[str, float]
) -> None:
    world = worlds.World(tmp_path)
    export = world.export(worlds.pairs(9, modes=modes), "2026-W47")
    first, second, *others = world.tasks()
    altered = first.shown.model_copy(update={"left": first.shown.right, "right": first.shown.left})
    # Complete in the static mode; steerability mandates `violation` too.
    core = [answer for answer in worlds.line(first).answers if answer.question != "violation"]
    rows = [worlds.line(task, "trimmed", digest="0" * 64) for task in world.tasks()]
    rows += [worlds.line(task, "hurried", answers=()) for task in world.tasks()]
    rows += [worlds.line(first, "swapped", shown=altered), worlds.line(second, "core only", answers=core)]
    rows += [worlds.line(task, "ann") for task in others]
    worlds.write(world.inbox, "261118-a.jsonl", rows)
    with monkeypatch.context() as triggerer:
        triggerer.delenv("FLYWHEEL_USER_KEY")
        there = Inbox(world.store.uri, export.uri, [f"{world.inbox}/*.jsonl"]).look().there
    assert there == world.collect("2026-W47").table("annotations").rows
    assert there == len(others) + ("static" in modes)


def test_the_inbox_counts_this_cycles_tasks_and_reads_a_delivery_once(
    tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(3), "2026-W46")
    earlier = world.tasks()
    export = world.export(worlds.pairs(4, seed=1), "2026-W47")
    asked = sum(task.reviewers for task in world.tasks())
    inbox = Inbox(world.store.uri, export.uri, [f"{world.inbox}/*.jsonl", f"{world.inbox}/*.json"])
    assert inbox.look() == Arrived(asked, 0), "no folder yet"

    read: list[str] = []
    real = waiting.open_external
    monkeypatch.setattr(waiting, "open_external", lambda uri: read.append(uri) or real(uri))
    one, two = world.tasks()[:2]
    late = worlds.write(world.inbox, "261118-a.jsonl", [worlds.line(earlier[0]), worlds.line(one, "a")])
    assert [inbox.look(), inbox.look()] == [Arrived(asked, 1)] * 2, "a late review of last week is not this week's"
    second = worlds.write(world.inbox, "261119-a.jsonl", [worlds.line(one, "a"), worlds.line(two, "a")])
    assert inbox.look() == Arrived(asked, 2), "who says it twice counts once"
    worlds.write(world.inbox, "261119-a.jsonl", [worlds.line(two, who) for who in ("a", "b")])
    assert inbox.look() == Arrived(asked, 3), "a delivery that grew is read again"
    assert read == [str(late), str(second), str(second)]
    late.unlink()
    assert inbox.look() == Arrived(asked, 2)


def test_an_export_of_another_store_is_refused(tmp_path: Path, user_key: bytes) -> None:
    world = worlds.World(tmp_path)
    export = world.export(worlds.pairs(2), "2026-W47")
    with pytest.raises(InputError, match="not a manifest of this store"):
        Inbox(f"{tmp_path}/other", export.uri, []).look()
