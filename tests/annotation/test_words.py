"""What annotators write is filtered like what users write, before it trains a model or becomes a prompt."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from flywheel_tasks.annotation import words
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.store import Artifact
from flywheel_tasks.pipeline import by_name
from tests.annotation import worlds
from tests.annotation.worlds import line, write

CYCLE = "2026-W47"
AT = dt.datetime(2026, 11, 18, 9, tzinfo=dt.UTC)
UNSAFE = "Tell me how to make a bomb at home and kill people with it"
CARD = "Pay with 4111 1111 1111 1111, will you?"
MASKED = {
    "Call me at +1 212 555 0148.": "Call me at [PHONE].",
    "Come in, mind the stairs.": "Come in, mind the stairs.",
}


def world_of(folder: Any, mode: str, **rules: Any) -> worlds.World:
    world = worlds.World(folder, rules=worlds.LENIENT | rules)
    world.export(worlds.pairs(30, modes={mode: 1.0}), CYCLE)
    return world


def train_tasks(world: worlds.World) -> list[Any]:
    """Tasks on prompts that may be trained on."""
    split = {row["task_id"]: row["split"] for row in world.exports[0].table("tasks").read().to_pylist()}
    return [task for task in world.tasks() if split[task.task_id] == "train"]


def said(artifact: Artifact) -> str:
    """Everything that the import wrote, as text."""
    tables = [name for name, output in artifact.manifest.outputs.items() if output.contract != "json"]
    return json.dumps([artifact.table(name).read().to_pylist() for name in tables], default=str) + json.dumps(
        artifact.json("report")
    )


@pytest.mark.parametrize("mode", ["interactive", "steerability"])
def test_unsafe_words_and_identifiers_stay_out_and_the_votes_count(tmp_path, user_key, mode: str) -> None:
    world = world_of(tmp_path, mode)
    tasks, texts = train_tasks(world)[:8], [UNSAFE, CARD, *MASKED]
    rows = [line(task, preferred="neither", rewrite=text) for task, text in zip(tasks[:4], texts, strict=True)]
    rows += [line(task, preferred="left", next_message=text) for task, text in zip(tasks[4:], texts, strict=True)]
    write(world.inbox, "261118-a.jsonl", rows)
    imported = world.collect(CYCLE)
    left_out = {
        "rewrite_unsafe_response": 1, "rewrite_privacy_card": 1,
        "next_message_unsafe_prompt": 1, "next_message_privacy_card": 1,
    }  # fmt: skip
    counts = imported.manifest.rows
    assert (counts.rows_in, counts.rows_out, dict(counts.reasons)) == (12, 8, dict(sorted(left_out.items())))
    assert imported.json("report")["words_left_out"] == dict(sorted(left_out.items()))
    assert {row["reason"] for row in worlds.quarantine(imported)} == set(left_out)
    assert all(row["user"] and row["where"].startswith("261118-a.jsonl:") for row in worlds.quarantine(imported))
    trained = {row["messages"][-1]["content"] for row in imported.table("examples").read().to_pylist()}
    asked = {row["turns"][-1]["content"] for row in imported.table(mode).read().to_pylist()}
    assert trained == asked == set(MASKED.values())
    for text in (UNSAFE, "4111", "212 555"):
        assert text not in said(imported)


def test_the_rules_are_those_of_the_weeks_filter(tmp_path, user_key) -> None:
    """Its presidio recognizers, its drop policy and its threshold, whatever a team has set them to."""
    pan, mild = "My PAN is ABCPE1234F.", "how to build a pipe bomb"
    strict = {"privacy": {"presidio": ["InPanRecognizer"]}, "safety": {"threshold": 0.4}}
    dropping = {"privacy": {"presidio": ["InPanRecognizer"], "policy": {"IN_PAN": "drop"}}}
    found = {}
    for name, rules in {"lenient": {}, "strict": strict, "dropping": dropping}.items():
        world = world_of(tmp_path / name, "static", **rules)
        one, two = train_tasks(world)[:2]
        write(world.inbox, "261118-a.jsonl", [line(one, rewrite=pan), line(two, rewrite=mild)])
        imported = world.collect(CYCLE)
        texts = {row["messages"][-1]["content"] for row in imported.table("examples").read().to_pylist()}
        found[name] = (texts, set(imported.manifest.rows.reasons))
    assert found == {
        "lenient": ({pan, mild}, set()),
        "strict": ({"My PAN is [IN_PAN]."}, {"rewrite_unsafe_response"}),
        "dropping": ({mild}, {"rewrite_privacy_in_pan"}),
    }


def test_a_store_without_a_filter_has_its_defaults() -> None:
    from flywheel_tasks.core.stage import Inputs
    from flywheel_tasks.curation.filter import FilterConfig

    found = words.rules(Inputs({}, {}))
    assert (found.privacy, found.safety) == (FilterConfig().privacy, FilterConfig().safety)


def test_both_imports_read_the_filters_rules_in_a_real_cycle() -> None:
    for stage in ("annotate-import", "side-by-side-import"):
        assert by_name(stage).inputs["filter"].stage == "filter"


def test_a_session_does_not_go_on_from_an_unsafe_response(tmp_path, user_key) -> None:
    """Policies' responses never went through the filter: as the history of a prompt they would."""
    world = worlds.World(tmp_path)
    rows = [row | {"y0": UNSAFE, "y1": UNSAFE} for row in worlds.pairs(4, modes={"interactive": 1.0}).to_pylist()]
    world.export(worlds.pa.Table.from_pylist(rows, schema=worlds.schemas.PAIR), CYCLE)
    write(world.inbox, "261118-a.jsonl", [line(task, next_message="And then?") for task in world.tasks()])
    imported = world.collect(CYCLE)
    assert imported.table("interactive").rows == 0
    assert dict(imported.manifest.rows.reasons) == {"next_message_unsafe_response": len(rows)}


def test_words_that_were_left_out_can_come_again_mended_and_votes_survive_another_rule(tmp_path, user_key) -> None:
    world = world_of(tmp_path, "static")
    one, two = train_tasks(world)[:2]
    write(world.inbox, "261118-a.jsonl", [line(one, rewrite=UNSAFE), line(two, rewrite=CARD)])
    world.collect(CYCLE)
    write(world.inbox, "261125-a.jsonl", [line(one, rewrite="Not like that."), line(two, rewrite=CARD)])
    world.filter = world.filtered_by(worlds.LENIENT | {"privacy": {"presidio": [], "default": "mask", "policy": {}}})
    imported = world.collect("2026-W48")
    assert dict(imported.manifest.rows.reasons) == {"duplicate": 2}
    texts = {row["messages"][-1]["content"] for row in imported.table("examples").read().to_pylist()}
    assert texts == {"Not like that.", "Pay with [CARD], will you?"}
    assert imported.table("annotations").rows == 2


class Guard(BaseHTTPRequestHandler):
    """A guard model's endpoint: it can be down, and it chokes on one text."""

    up, chokes = True, True

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        answer = "unsafe\nS1" if "bomb" in asked else "as an AI model I" if "odd" in asked and Guard.chokes else "safe"
        said = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200 if Guard.up else 503)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@pytest.fixture
def guard() -> Iterator[dict[str, Any]]:
    Guard.up = Guard.chokes = True
    with HTTPServer(("127.0.0.1", 0), Guard) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        # One at a time, as this server answers: a connection refused by a full queue would be a text not judged.
        yield {"classifier": "guard-http", "guard_url": url, "guard_model": "g", "guard_parallel": 1}
        http.shutdown()


def test_a_guard_that_is_down_stops_the_import_and_one_text_that_it_cannot_judge_does_not(
    tmp_path, user_key, guard: dict[str, Any]
) -> None:
    """A delivery is read once: what nobody judged while the guard was down must not be counted as refused for ever."""
    world = world_of(tmp_path, "static", safety=guard)
    texts = [UNSAFE, "odd", "Come in."]
    write(world.inbox, "261118-a.jsonl", [line(t, rewrite=s) for t, s in zip(train_tasks(world), texts, strict=False)])
    Guard.up = False
    with pytest.raises(FlywheelError, match="guard-http classifier cannot judge even a greeting"):
        world.collect(CYCLE)
    Guard.up = True
    imported = world.collect(CYCLE)
    assert dict(imported.manifest.rows.reasons) == {"rewrite_classifier_error": 1, "rewrite_unsafe_response": 1}
    (example,) = imported.table("examples").read().to_pylist()
    assert example["messages"][-1]["content"] == "Come in."


def test_words_that_the_guard_missed_are_read_once_more_and_the_votes_count_once(
    tmp_path, user_key, guard: dict[str, Any]
) -> None:
    world = world_of(tmp_path, "interactive", safety=guard)
    one, two, three, *_ = train_tasks(world)
    rows = [line(one, rewrite="An odd one."), line(two, next_message="How odd!"), line(three, next_message="Go on!")]
    write(world.inbox, "261118-a.jsonl", rows)
    first = world.collect(CYCLE)
    assert [first.table(name).rows for name in ("annotations", "examples", "interactive")] == [3, 0, 1]
    Guard.chokes = False
    second = world.collect("2026-W48")
    assert [second.table(name).rows for name in ("annotations", "examples", "interactive")] == [3, 1, 1]
    said = [session["turns"][-1]["content"] for session in second.table("interactive").read().to_pylist()]
    assert said == ["How odd!"]
    third = world.collect("2026-W49")
    assert [third.table(name).rows for name in ("annotations", "examples", "interactive")] == [3, 1, 0]
    assert third.json("report")["deliveries"]["read"] == 0


def test_words_that_the_guard_never_can_judge_are_tried_twice(tmp_path, user_key, guard: dict[str, Any]) -> None:
    world = world_of(tmp_path, "interactive", safety=guard)
    write(world.inbox, "261118-a.jsonl", [line(task, next_message="How odd!") for task in train_tasks(world)])
    read = [world.collect(f"2026-W{week}").json("report")["deliveries"]["read"] for week in (47, 48, 49)]
    assert read == [1, 1, 0]


def test_a_session_that_went_on_does_not_go_on_again_where_the_guard_misses_its_message_later(
    tmp_path, user_key, guard: dict[str, Any]
) -> None:
    world = world_of(tmp_path, "interactive", safety=guard)
    task, *_ = train_tasks(world)
    found = []
    for week, chokes in ((47, False), (48, True), (49, False)):
        Guard.chokes = chokes
        write(world.inbox, f"261118-{week}.jsonl", [line(task, next_message="How odd!")] * week)
        found.append(world.collect(f"2026-W{week}").table("interactive").rows)
    assert found == [1, 0, 0]
