"""Nothing in a delivery stops the week: what can't be a review is refused where it stands, and the rest counts."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.annotation import delivery, label_studio, waiting
from flywheel_tasks.annotation.contract import Review, Task
from tests.annotation import worlds
from tests.annotation.test_label_studio import exported
from tests.annotation.worlds import line, write

CYCLE = "2026-W47"
AT = dt.datetime(2026, 11, 18, 9, tzinfo=dt.UTC)
END_OF_TIME = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.timezone(dt.timedelta(hours=-12)))
START_OF_TIME = dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=14)))


@pytest.fixture
def world(tmp_path, user_key) -> worlds.World:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(12, modes={"static": 0.5, "steerability": 0.5}), CYCLE)
    return world


@pytest.mark.parametrize("at", [END_OF_TIME, START_OF_TIME, AT.replace(year=2126), AT.replace(year=2020)])
def test_a_review_from_no_possible_day_is_refused_and_the_next_weeks_go_on(world: worlds.World, at: Any) -> None:
    first, *others = world.tasks()
    write(world.inbox, "261118-a.jsonl", [line(first, at=at), *(line(task) for task in others)])
    assert dict(world.collect(CYCLE).manifest.rows.reasons) == {"bad_at": 1}
    write(world.inbox, "261125-b.jsonl", [line(first, preferred="right", at=AT + dt.timedelta(days=7))])
    later = world.collect("2026-W48")
    assert (later.table("annotations").rows, later.manifest.rows.rows_rejected) == (len(others) + 1, 0)


@pytest.mark.parametrize(("days", "taken"), [(-900, True), (0, True), (6, True), (8, False), (-1200, False)])
def test_a_batch_repeats_old_answers_and_holds_none_from_after_its_week(days: int, taken: bool) -> None:
    said = json.loads(review().model_dump_json()) | {"at": (AT + dt.timedelta(days=days)).isoformat()}
    (found,) = delivery.lines("261118-a.jsonl", json.dumps(said).encode(), CYCLE)
    assert (found.review is not None, found.reason) == (taken, None if taken else "bad_at")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("261118-a.jsonl", None), ("251230-a.jsonl", None), ("270104-a.jsonl", None), ("991231-a.jsonl", "bad_batch"),
        ("000101-a.jsonl", "bad_batch"), ("621118-a.jsonl", "bad_batch"), ("261332-a.jsonl", "batch_unnamed"),
    ],
)  # fmt: skip
def test_a_batch_of_another_decade_is_refused(name: str, reason: str | None) -> None:
    """It would be the oldest or the newest of all batches for ever."""
    day = delivery.batch_of(name) or dt.datetime(2026, 11, 18, tzinfo=dt.UTC)
    said = json.loads(review().model_dump_json()) | {"at": day.isoformat()}
    (found,) = delivery.lines(name, json.dumps(said).encode(), CYCLE)
    assert found.reason == reason


def poison(task: Task, **data: Any) -> dict[str, Any]:
    return exported(task, line(task)) | {"data": label_studio.data(task) | data}


def poisoned(task: Task) -> list[dict[str, Any]]:
    """Tasks of a Label Studio export, each broken so that reading it raises something else."""
    endless = exported(task, line(task))
    strength = {"from_name": "strength", "type": "choices", "value": {"choices": [float("inf")]}}
    endless["annotations"][0]["result"].append(strength)
    late = exported(task, line(task, at=END_OF_TIME))
    return [endless, poison(task, left_tool_call="[" * 100_000), poison(task, left_tool_call="[1]"), late]


def test_one_bad_task_costs_itself_and_the_wait_counts_the_others(world: worlds.World) -> None:
    first, *others = world.tasks()
    rows = [*poisoned(first), *(exported(task, line(task)) for task in others)]
    world.inbox.mkdir()
    (world.inbox / "261118-ls.json").write_text(json.dumps(rows))
    inbox = waiting.Inbox(world.store.uri, world.exports[0].uri, [f"{world.inbox}/*"])
    assert inbox.look().there == len(others)
    imported = world.collect(CYCLE)
    assert dict(imported.manifest.rows.reasons) == {"bad_at": 1, "malformed_task": 3}
    assert imported.table("annotations").rows == len(others)


def review() -> Review:
    return Review.model_validate({"task_id": "t1", "digest": "0" * 64, "annotator": "a", "preferred": "left", "at": AT})


@given(st.binary(max_size=300), st.sampled_from(["261118-a.jsonl", "261118-a.json", "x"]))
def test_no_bytes_can_stop_the_week(content: bytes, name: str) -> None:
    for found in delivery.lines(name, content, CYCLE):
        assert (found.review is None) == (found.reason is not None)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["[" * 5000, "{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TASK = Task.model_validate(
    {
        "task_id": "t1", "mode": "static", "reviewers": 3, "locale": "en_US", "language": "en", "questions": (),
        "shown": {"character": {"name": "a", "description": "", "traits": (), "instructions": ""}, "history": (),
                  "left": {"text": "l"}, "right": {"text": "r"}}, "digest": "0" * 64,
    }
)  # fmt: skip
FIELDS = [("data", name) for name in label_studio.data(TASK)] + [
    ("annotations", 0, name) for name in exported(TASK, line(TASK))["annotations"][0]
] + [("data",), ("annotations",), ("annotations", 0), ("annotations", 0, "result", 0, "value"),
     ("annotations", 0, "result", 0, "from_name")]  # fmt: skip


@given(st.sampled_from(FIELDS), JUNK)
def test_no_field_of_a_label_studio_task_can_stop_the_week(field: tuple[Any, ...], junk: Any) -> None:
    broken, whole = exported(TASK, line(TASK)), exported(TASK, line(TASK))
    *path, last = field
    inside: Any = broken
    for part in path:
        inside = inside[part]
    inside[last] = junk
    found = list(delivery.lines("261118-a.json", json.dumps([broken, whole]).encode(), CYCLE))
    assert found[-1].review, "what stands beside it is read"
    for one in found:
        assert (one.review is None) == (one.reason is not None)
