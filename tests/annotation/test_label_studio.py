from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from xml.etree import ElementTree as Xml

import pyarrow as pa
import pytest

from flywheel_tasks.annotation import contract, label_studio, publish
from flywheel_tasks.annotation.annotate_export import ExportConfig
from flywheel_tasks.annotation.contract import Question, Review
from flywheel_tasks.annotation.label_studio_server import Server, push
from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import FlywheelError
from tests.annotation import worlds

CALL = '{"arguments": {"prompt": "a gull"}, "name": "image"}'
HOSTILE = '<img src=x onerror="window.hacked=1"> & <b>bold</b>\nsecond line <script>window.hacked=2</script>'


def hostile_pairs(count: int) -> pa.Table:
    """Pairs of every mode whose texts try to be markup."""
    rows = worlds.pairs(count + 6).to_pylist()[:count]
    for i, row in enumerate(rows):
        row["mode"] = schemas.MODES[i % 4]
        row["y0"] += f" {HOSTILE}"
        row["turns"][-1]["content"] += f" {HOSTILE}"
        if row["mode"] == "image":
            row["tool_call1"] = CALL
    return pa.Table.from_pylist(rows, schema=schemas.get("pair"))


def results(review: Review) -> list[dict]:
    """A review as the annotation that Label Studio's page would submit for it."""

    def choice(name: str, about: str, value: str) -> dict:
        return {"from_name": name, "to_name": about, "type": "choices", "value": {"choices": [value]}}

    found = [choice("preferred", "left", review.preferred)]
    if review.strength:
        found.append(choice("strength", "left", str(review.strength)))
    for answer in review.answers:
        about = "left" if answer.about == "pair" else answer.about
        found.append(choice(f"{answer.question}__{answer.about}", about, answer.answer))
    written = {name: getattr(review, name) for name in ("rewrite", "next_message")}
    return found + [
        {"from_name": name, "to_name": "left", "type": "textarea", "value": {"text": [text]}}
        for name, text in written.items()
        if text
    ]


def exported(task: contract.Task, review: Review) -> dict:
    """A task as Label Studio's JSON export holds it."""
    annotation = {
        "id": 1, "completed_by": 7, "result": results(review), "was_cancelled": False, "lead_time": review.seconds,
        "created_at": review.at.isoformat(), "updated_at": review.at.isoformat(),
    }  # fmt: skip
    return {"id": 1, "data": label_studio.data(task), "annotations": [annotation]}


@pytest.fixture
def world(tmp_path, user_key) -> worlds.World:
    world = worlds.World(tmp_path, questions=(Question(name="fun", about="pair", text='Is "<b>" & co fun?'),))
    world.export(hostile_pairs(16), "2026-W47")
    return world


@pytest.mark.parametrize("mode", schemas.MODES)
def test_a_page_is_well_formed_and_shows_every_field_of_the_data(world: worlds.World, mode: str) -> None:
    files = publish.read(str(world.outbox), world.exports[0].json("report")["export"])
    page = Xml.fromstring(files[f"label_studio/{mode}.xml"])
    data = json.loads(files[f"label_studio/{mode}.json"])[0]["data"]
    used = {tag.get("value", "")[1:] for tag in page.iter() if tag.get("value", "").startswith("$")}
    assert used <= data.keys()
    assert {"name", "description", "traits_line", "instructions", "history", "left", "right"} <= used
    names = [tag.get("name") for tag in page.iter() if tag.get("name")]
    assert len(names) == len(set(names)), "Label Studio finds tags by name"
    asked = {tag.get("name") for tag in page.iter("Choices")}
    assert {"preferred", "strength", "false_refusal__left", "templated__right", "fun__pair"} <= asked
    assert ("violation__left" in asked) == (mode == "steerability")
    assert ("image_prompt__right" in asked) == (mode == "image")
    written = {tag.get("name") for tag in page.iter("TextArea")}
    assert ("next_message" in written) == (mode in ("interactive", "steerability"))
    assert "rewrite" in written
    assert not {tag.tag for tag in page.iter()} & {"HyperText", "script", "img"}, "nothing on the page shows markup"
    highlighted = [view for view in page.iter("View") if view.get("className") == "fw-mark"]
    assert len(highlighted) == (mode == "steerability"), "traits and instructions are highlighted (Sec. 2.2.2)"


def test_answers_come_back_as_they_would_in_our_own_lines(world: worlds.World) -> None:
    for task in world.tasks():
        review = worlds.line(task, "label-studio-7", "right", strength=2, rewrite="Better.", next_message="And?")
        (row,) = label_studio.reviews([exported(task, review)])
        again = Review.model_validate(row)
        assert again == review.model_copy(update={"answers": again.answers})
        assert set(again.answers) == set(review.answers)


def test_a_person_has_one_name_in_every_kind_of_export_and_another_on_another_server(world: worlds.World) -> None:
    task = world.tasks()[0]

    def name(who: object, server: str | None = None) -> str:
        found = exported(task, worlds.line(task))
        found["annotations"][0]["completed_by"] = who
        if server:
            found["data"][label_studio.SERVER] = server
        (row,) = label_studio.reviews([found])
        assert row["digest"] == task.digest
        return Review.model_validate(row).annotator

    assert name(7) == name({"id": 7}) == name({"id": 7, "email": "jane@vendor.example"}) == "label-studio-7"
    one, two = name(7, "labels.one.example"), name(7, "labels.two.example:8080")
    assert len({one, two, name(7), name(8, "labels.one.example")}) == 4
    assert name({"id": 7, "email": "jane@vendor.example"}, "labels.one.example") == one


def test_a_pushed_task_says_which_server_it_was_put_on(world: worlds.World) -> None:
    pushed: list[dict] = []

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/import"):
                pushed.extend(body)
            said = json.dumps({"id": 1, "task_count": len(body)}).encode()
            self.send_response(201)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    files = publish.read(str(world.outbox), world.exports[0].json("report")["export"])
    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{http.server_port}/studio"
        push(Server(f"http://{where}/", "token"), "flywheel", files, {}, lambda projects: None)
        http.shutdown()
    assert len(pushed) == len(world.tasks())
    assert {row["data"][label_studio.SERVER] for row in pushed} == {where}
    assert Server("https://me:secret@labels.one.example/studio", "token").name == "labels.one.example/studio"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"<html>log in</html>", "what is no JSON"), (b"[]", "without 'id'"), (b'{"id": null}', "without 'id'")],
)
def test_a_server_that_is_no_label_studio_is_one_line(content: bytes, says: str) -> None:
    """A login page, or a redirect that made a POST a GET."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        server = Server(f"http://127.0.0.1:{http.server_port}", "token")
        with pytest.raises(FlywheelError, match=says) as caught:
            server.create_project("t", "<View/>", 1)
        http.shutdown()
    assert "\n" not in str(caught.value)
    with pytest.raises(FlywheelError, match="does not answer"):
        Server("http://127.0.0.1:99999999", "token").create_project("t", "<View/>", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"left": "edited"}, {"name": "Somebody"}, {"traits_line": "gentle"}, {"traits": ["gentle"]}, {"history": []},
        {"left_image": "edited"}, {"right_tool_call": '{"arguments": {}, "name": "x"}'},
    ],
)  # fmt: skip
def test_whatever_is_changed_on_the_server_shows_in_the_digest(world: worlds.World, change: dict) -> None:
    task = next(task for task in world.tasks() if task.mode == "image")
    data = label_studio.data(task)
    assert contract.digest(label_studio.shown(data)) == task.digest
    assert contract.digest(label_studio.shown(data | change)) != task.digest


def test_a_label_studio_delivery_is_imported_with_its_refusals(world: worlds.World) -> None:
    tasks = world.tasks()
    rows = [exported(task, worlds.line(task)) for task in tasks]
    rows[0]["data"]["left"] = "edited on the server"
    rows[1]["annotations"][0]["was_cancelled"] = True
    rows[2]["annotations"][0]["result"] = [{"from_name": "preferred"}]
    rows.append({"id": 9})
    world.inbox.mkdir()
    (world.inbox / "261118-ls.json").write_text(json.dumps(rows))
    (world.inbox / "261118-broken.json").write_text(json.dumps(rows)[:-20])
    imported = world.collect("2026-W47")
    assert dict(imported.manifest.rows.reasons) == {
        "altered_text": 1, "skipped": 1, "malformed_task": 2, "not_label_studio": 1,
    }  # fmt: skip
    assert imported.table("annotations").rows == len(tasks) - 3


def test_a_question_of_ones_own_has_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match="'templated' is there already"):
        ExportConfig(questions=(Question(name="templated", text="again?"),))
