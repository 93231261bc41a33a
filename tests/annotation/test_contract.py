from __future__ import annotations

import hashlib
import json
from importlib.resources import files

import jsonschema
import pytest

from flywheel_tasks.annotation import contract, publish
from flywheel_tasks.annotation.contract import Review, Task
from flywheel_tasks.core.errors import CorruptArtifact, InputError
from flywheel_tasks.core.storage import Storage
from tests.annotation import worlds

KEY = b"k" * 32


@pytest.fixture
def world(tmp_path, user_key) -> worlds.World:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(40, modes={"static": 0.7, "steerability": 0.3}), "2026-W47")
    return world


@pytest.mark.parametrize("name", contract.CONTRACTS)
def test_the_schema_file_is_the_contract(name: str) -> None:
    shipped = files("flywheel_tasks.annotation").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    assert shipped == contract.schema_text(name), "write it anew: contract.schema_text"
    jsonschema.Draft202012Validator.check_schema(json.loads(shipped))


def test_exported_lines_and_reviews_of_them_keep_to_the_json_schema(world: worlds.World) -> None:
    task_schema, review_schema = (jsonschema.Draft202012Validator(contract.schema(n)) for n in contract.CONTRACTS)
    tasks = world.tasks()
    for task in tasks:
        task_schema.validate(json.loads(task.model_dump_json()))
        review_schema.validate(json.loads(worlds.line(task).model_dump_json()))
    with pytest.raises(jsonschema.ValidationError):
        review_schema.validate({**json.loads(worlds.line(tasks[0]).model_dump_json()), "preferred": "y0"})


def test_a_task_names_nobody_and_no_policy(world: worlds.World, user_key: bytes) -> None:
    """Not one id of ours, pseudonym or policy is in any byte that leaves."""
    ledger = world.exports[0].table("tasks").read().to_pylist()
    name = world.exports[0].json("report")["export"]
    everything = b"".join(publish.read(str(world.outbox), name).values())
    assert len(ledger) == everything.count(b'"contract":"flywheel.task/1"')
    for row in ledger:
        for field in ("user", "prompt_id", "pair_id", "character_id", "policy0", "policy1"):
            assert row[field].encode() not in everything, field
    assert b"policy-of-quality" not in everything
    assert b"eval" not in everything.replace(b"evaluat", b""), "which prompts are held out is ours to know"


def test_order_is_a_coin_that_ids_and_seed_do_not_tell(world: worlds.World) -> None:
    ids = [f"pair-{i}" for i in range(2000)]
    sides = [contract.left(pair, 17, KEY) for pair in ids]
    assert 900 < sides.count("y0") < 1100
    assert sides == [contract.left(pair, 17, KEY) for pair in ids]
    for other in ([contract.left(p, 17, b"x" * 32) for p in ids], [contract.left(p, 18, KEY) for p in ids]):
        assert 900 < sum(a == b for a, b in zip(sides, other, strict=True)) < 1100
    ledger = world.exports[0].table("tasks").read().to_pylist()
    shown = {task.task_id: task.shown for task in world.tasks()}
    for row in ledger:
        left = shown[row["task_id"]].left.text
        assert left == row[row["left"]]
    assert contract.task_id("pair-1", KEY) != contract.task_id("pair-1", b"x" * 32)


def test_the_digest_covers_every_word_on_the_page(world: worlds.World) -> None:
    shown = world.tasks()[0].shown
    changes = [
        {"left": shown.right, "right": shown.left},
        {"history": (*shown.history[:-1], shown.history[-1].model_copy(update={"content": "x"}))},
        {"character": shown.character.model_copy(update={"instructions": "x"})},
        {"left": shown.left.model_copy(update={"tool_call": "{}"})},
    ]
    digests = {contract.digest(shown), *(contract.digest(shown.model_copy(update=change)) for change in changes)}
    assert len(digests) == 5
    again = Task.model_validate_json(world.tasks()[0].model_dump_json())
    assert contract.digest(again.shown) == again.digest


def test_any_tool_can_compute_the_digest_as_the_contract_page_says(world: worlds.World) -> None:
    name = world.exports[0].json("report")["export"]
    export = publish.read(str(world.outbox), name)
    assert "keys sorted, no spaces" in export["CONTRACT.md"].decode()
    for line in export["tasks.jsonl"].splitlines():
        task = json.loads(line)
        text = json.dumps(task["shown"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == task["digest"]


def test_the_two_core_questions_are_asked_in_every_mode() -> None:
    for mode in ("static", "interactive", "steerability", "image"):
        asked = {q.name for q in contract.asked(contract.core_questions(), mode) if q.required}
        assert {"false_refusal", "templated"} <= asked
        assert ("violation" in asked) == (mode == "steerability")
        assert ({"image_timing", "image_prompt"} <= asked) == (mode == "image")


def test_a_time_without_a_zone_and_an_unknown_field_are_no_review(world: worlds.World) -> None:
    good = json.loads(worlds.line(world.tasks()[0]).model_dump_json())
    for change in ({"at": "2026-11-18T09:00:00"}, {"surprise": 1}, {"seconds": -1}, {"strength": 4}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Review.model_validate(good | change)


class Stopped(Exception):
    pass


def test_an_export_interrupted_at_any_step_is_never_taken_for_whole(tmp_path, monkeypatch) -> None:
    files_of = {"tasks.jsonl": b'{"a": 1}\n', "label_studio/static.xml": b"<View/>", "task.schema.json": b"{}"}
    steps: list[str] = []
    monkeypatch.setattr("flywheel_tasks.core.storage.fault_point", steps.append)
    name = publish.publish(str(tmp_path / "whole"), "2026-W47", files_of)
    assert len(steps) > 3
    for stop in range(len(steps)):
        folder, seen = str(tmp_path / f"stopped-{stop}"), iter(range(len(steps) + 1))

        def stopping(step: str, stop: int = stop, seen=seen) -> None:
            if next(seen) == stop:
                raise Stopped(step)

        monkeypatch.setattr("flywheel_tasks.core.storage.fault_point", stopping)
        with pytest.raises(Stopped):
            publish.publish(folder, "2026-W47", files_of)
        monkeypatch.setattr("flywheel_tasks.core.storage.fault_point", lambda step: None)
        with pytest.raises(InputError, match="interrupted"):
            publish.read(folder, name)
        assert publish.publish(folder, "2026-W47", files_of) == name, "the next attempt completes it"
        assert publish.read(folder, name) == files_of


def test_an_export_altered_after_it_was_written_is_refused(tmp_path) -> None:
    name = publish.publish(str(tmp_path), "2026-W47", {"tasks.jsonl": b'{"a": 1}\n'})
    assert publish.publish(str(tmp_path), "2026-W47", {"tasks.jsonl": b'{"a": 1}\n'}) == name
    Storage(str(tmp_path)).put(f"{name}/tasks.jsonl", b'{"a": 2}\n')
    with pytest.raises(CorruptArtifact, match="missing or altered"):
        publish.read(str(tmp_path), name)


def test_a_second_cycle_sends_only_what_is_new_and_remembers_everything(world: worlds.World) -> None:
    first = world.exports[0].table("tasks").read()
    both = world.export(worlds.pairs(40, modes={"static": 0.7, "steerability": 0.3}), "2026-W48")
    assert both.manifest.rows.reasons == {"already_exported": len(first)}
    more = world.export(worlds.pairs(10, seed=5), "2026-W49")
    ledger = more.table("tasks").read()
    assert len(ledger) == len(first) + len(world.tasks())
    assert set(ledger["cycle"].to_pylist()) == {"2026-W47", "2026-W49"}


def test_a_forgotten_user_leaves_with_no_export(world: worlds.World) -> None:
    user = world.exports[0].table("tasks").read()["user"][0].as_py()
    pairs = worlds.pairs(10, seed=5)
    other = pairs["user"][3].as_py()
    later = world.export(pairs, "2026-W48", frozenset({user, other}))
    assert not {user, other} & set(later.table("tasks").read()["user"].to_pylist())
    rows = later.manifest.rows
    assert rows.reasons == {"forgotten": 2}, "a task of the ledger and a pair of this week"
    assert (rows.rows_in, rows.rows_out) == (
        len(world.exports[0].table("tasks").read()) + len(pairs),
        len(later.table("tasks").read()),
    )
    assert {row["user"] for row in worlds.quarantine(later)} == {None}, "the quarantine names nobody"


def test_an_identifier_in_a_character_card_is_masked(tmp_path, user_key) -> None:
    row = {**worlds.CHARACTERS.to_pylist()[0], "instructions": "Write to mira@example.com if she is asked."}
    import pyarrow as pa

    from flywheel_tasks.annotation.annotate_export import characters

    shown = characters(pa.Table.from_pylist([row], schema=worlds.CHARACTERS.schema))[row["character_id"]]
    assert shown.instructions == "Write to [EMAIL] if she is asked."
