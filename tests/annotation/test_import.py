from __future__ import annotations

import codecs
import datetime as dt
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flywheel_tasks.annotation import delivery, resolve
from flywheel_tasks.annotation.annotate_import import ImportConfig
from flywheel_tasks.annotation.contract import Task
from flywheel_tasks.annotation.sessions import continued
from flywheel_tasks.core import ids
from tests.annotation import worlds
from tests.annotation.worlds import line, quarantine, write

CYCLE = "2026-W47"
AT = dt.datetime(2026, 11, 18, 9, tzinfo=dt.UTC)


@pytest.fixture
def world(tmp_path, user_key) -> worlds.World:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(30), CYCLE)
    return world


def reasons(world: worlds.World) -> dict[str, int]:
    return dict(world.imports[-1].manifest.rows.reasons)


def annotations(world: worlds.World) -> list[dict]:
    return world.imports[-1].table("annotations").read().to_pylist()


def test_nothing_has_come_back_yet_and_the_week_goes_on(world: worlds.World) -> None:
    imported = world.collect(CYCLE)
    assert imported.manifest.rows.rows_in == 0
    assert imported.table("preferences").rows == 0
    assert imported.json("report")["tasks"]["without_review"] == len(world.tasks())


def test_a_review_finds_its_pair_and_its_side(world: worlds.World) -> None:
    tasks = world.tasks()
    write(world.inbox, "261118-a.jsonl", [line(task, preferred="left", strength=2) for task in tasks])
    world.collect(CYCLE)
    ledger = {row["pair_id"]: row for row in world.exports[0].table("tasks").read().to_pylist()}
    rows = annotations(world)
    assert len(rows) == len(tasks)
    for row in rows:
        pair = ledger[row["pair_id"]]
        assert row["preferred"] == pair["left"]
        assert (row["user"], row["batch"], row["strength"]) == (pair["user"], "261118", 2)
        assert {(q["name"], q["about"]) for q in row["questions"]} == {
            (name, y) for name in ("false_refusal", "templated") for y in ("y0", "y1")
        }
        assert row["annotator"].startswith("a")
        assert "ann" not in row["annotator"][1:]
    chosen = {row["pair_id"]: row["chosen"] for row in world.imports[0].table("preferences").read().to_pylist()}
    assert chosen == {row["pair_id"]: ledger[row["pair_id"]][row["preferred"]] for row in rows}


@pytest.mark.parametrize("head", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r\n\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(
    world: worlds.World, head: bytes, newline: bytes
) -> None:
    found = [line(task) for task in world.tasks()]
    write(world.inbox, "261118-a.jsonl", found, head=head, newline=newline)
    world.collect(CYCLE)
    assert (len(annotations(world)), reasons(world)) == (len(found), {})


def test_utf16_from_a_spreadsheet_is_read_too(world: worlds.World) -> None:
    text = "".join(line(task).model_dump_json() + "\r\n" for task in world.tasks())
    world.inbox.mkdir()
    (world.inbox / "261118-a.jsonl").write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    world.collect(CYCLE)
    assert (len(annotations(world)), reasons(world)) == (len(world.tasks()), {})


def test_a_tenth_of_the_lines_broken_costs_a_tenth(world: worlds.World) -> None:
    rng = random.Random(4)
    rows = [line(task, f"ann{k}").model_dump_json().encode() for task in world.tasks() for k in range(3)]
    damage = {
        b'{"task_id": ': "not_json", b"\xff\xfe\xfd{}": "not_utf8", b"[1, 2]": "not_an_object",
        b'{"contract": "flywheel.annotation/1"}': "missing_task_id", b'"just text"': "not_an_object",
        b"\x00\x00": "not_json", b"[" * 5000: "not_json", b'{"a": NaN' + b"1" * 9 + b"}": "not_json",
    }  # fmt: skip
    broken = rng.sample(range(len(rows)), len(rows) // 10)
    expected: dict[str, int] = {}
    for at in broken:
        bad = rng.choice(list(damage))
        rows[at] = bad
        expected[damage[bad]] = expected.get(damage[bad], 0) + 1
    world.inbox.mkdir()
    (world.inbox / "261118-a.jsonl").write_bytes(b"\n".join(rows))
    imported = world.collect(CYCLE)
    counts = imported.manifest.rows
    assert dict(counts.reasons) == expected
    assert (counts.rows_in, counts.rows_out) == (len(rows), len(rows) - len(broken))
    places = {row["where"] for row in quarantine(imported)}
    assert places == {f"261118-a.jsonl:{at + 1}" for at in broken}, "each refusal says file and line"
    assert all(row["raw"] is None for row in quarantine(imported)), "what was written is not repeated"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_id": "t000000000000000000000000"}, "unknown_task"),
        ({"digest": "0" * 64}, "altered_text"),
        ({"answers": ()}, "unanswered"),
        ({"answers": [{"question": "templated", "about": "left", "answer": "perhaps"}]}, "illegal_answer"),
        ({"answers": [{"question": "templated", "about": "pair", "answer": "yes"}]}, "illegal_answer"),
        (
            {"answers": [{"question": "templated", "about": "left", "answer": a} for a in ("yes", "no")]},
            "answered_twice",
        ),
    ],
)
def test_a_review_that_can_not_be_trusted_is_refused(world: worlds.World, change: dict, reason: str) -> None:
    tasks = world.tasks()
    write(world.inbox, "261118-a.jsonl", [line(tasks[0], **change), line(tasks[1])])
    world.collect(CYCLE)
    assert (len(annotations(world)), reasons(world)) == (1, {reason: 1})


def test_text_altered_by_the_tool_is_refused_even_if_the_digest_was_sent_back(world: worlds.World) -> None:
    first, second, third = world.tasks()[:3]
    edited = second.shown.model_copy(update={"left": second.shown.left.model_copy(update={"text": "edited"})})
    swapped = third.shown.model_copy(update={"left": third.shown.right, "right": third.shown.left})
    rows = [line(first, shown=first.shown), line(second, shown=edited), line(third, shown=swapped)]
    write(world.inbox, "261118-a.jsonl", rows)
    world.collect(CYCLE)
    assert reasons(world) == {"altered_text": 2}


def test_the_same_batch_twice_counts_once(world: worlds.World) -> None:
    found = [line(task) for task in world.tasks()]
    one = write(world.inbox, "261118-a.jsonl", found)
    write(world.inbox, "261118-a-again.jsonl", found)
    write(world.inbox, "261119-a.jsonl", found[:5])
    world.collect(CYCLE)
    n = len(found)
    assert (len(annotations(world)), reasons(world)) == (n, {"duplicate": n + 5})
    assert {row["batch"] for row in annotations(world)} == {"261118"}, "a review belongs to the batch it first came in"
    world.collect("2026-W48", [one])
    assert reasons(world) == {}, "a file read before is not read again"
    assert len(annotations(world)) == n
    assert world.imports[-1].json("report")["deliveries"]["read_before"] == 1


def test_an_annotator_who_changes_their_mind_is_taken_at_their_last_word(world: worlds.World) -> None:
    task, other = world.tasks()[:2]
    later = AT + dt.timedelta(hours=2)
    rows = [
        line(task, "mind", "right", at=later), line(task, "mind", "left", at=AT),
        line(other, "torn", "left", at=AT), line(other, "torn", "right", at=AT), line(other, "calm", "right", at=AT),
    ]  # fmt: skip
    write(world.inbox, "261118-a.jsonl", rows)
    world.collect(CYCLE)
    assert reasons(world) == {"superseded": 1, "contradictory": 2}
    by_id = {row["pair_id"]: row for row in world.exports[0].table("tasks").read().to_pylist()}
    for row in annotations(world):
        assert row["preferred"] != by_id[row["pair_id"]]["left"]


def test_a_review_of_an_earlier_cycle_still_finds_its_pair_and_can_tip_it(world: worlds.World) -> None:
    """Late and partial: two reviews of three come with the first cycle, the third weeks later."""
    world.import_config = ImportConfig(fewest_reviews=2)
    task, partly = world.tasks()[:2]
    write(world.inbox, "261118-a.jsonl", [line(task, "a", "left"), line(task, "b", "right"), line(partly, "a")])
    world.collect(CYCLE)
    report = world.imports[-1].json("report")
    assert report["undecided"] == {"conflict": 1, "too_few_reviews": 1}
    assert report["tasks"]["partly_reviewed"] == 2
    world.export(worlds.pairs(10, seed=9), "2026-W49")
    late = write(world.inbox, "261202-b.jsonl", [line(task, "c", "right"), line(partly, "c")])
    world.collect("2026-W49", [late])
    report = world.imports[-1].json("report")
    assert report["deliveries"]["of_earlier_cycles"] == 2
    assert report["carried"] == 3
    preferences = world.imports[-1].table("preferences").read().to_pylist()
    assert sorted((p["agreement"], p["conflict"], p["n_reviews"], p["batch"]) for p in preferences) == [
        ("majority", True, 3, "261118"), ("unanimous", False, 2, "261118"),
    ]  # fmt: skip
    assert world.exports[0].table("tasks").rows + 10 >= report["tasks"]["out"] > world.exports[0].table("tasks").rows


@pytest.mark.parametrize("name", ["vendor.jsonl", "261332-vendor.jsonl", "2611180-vendor.jsonl"])
def test_a_delivery_without_a_batch_is_refused_line_by_line(world: worlds.World, name: str) -> None:
    write(world.inbox, name, [line(task) for task in world.tasks()[:4]])
    write(world.inbox, "261118-good.jsonl", [line(world.tasks()[5])])
    world.collect(CYCLE)
    assert (len(annotations(world)), reasons(world)) == (1, {"batch_unnamed": 4})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("vendor-261118.jsonl", "261118-vendor.jsonl"), ("621118-vendor.jsonl", "261118-vendor.jsonl"),
        ("260118-vendor.jsonl", "261118-vendor.jsonl"), ("261118-vendor.json", "261118-vendor.jsonl"),
    ],
)  # fmt: skip
def test_a_delivery_that_was_named_wrongly_is_read_under_its_right_name(
    world: worlds.World, wrong: str, right: str
) -> None:
    """By the next import, whether it was renamed or copied; and an import after that reads neither again."""
    early = line(world.tasks()[0], at=dt.datetime(2026, 1, 18, tzinfo=dt.UTC))
    found = [early, *(line(task) for task in world.tasks()[1:])]
    first = write(world.inbox, wrong, found)
    world.collect(CYCLE)
    assert len(annotations(world)) == (1 if wrong.startswith("2601") else 0)
    second = write(world.inbox, right, found)
    world.collect("2026-W48", [first, second])
    assert len(annotations(world)) == len(found)
    preferences = world.imports[-1].table("preferences").read()
    assert preferences["n_reviews"].to_pylist() == [1] * len(found), "no review counts twice"
    world.collect("2026-W49", [second])
    assert (len(annotations(world)), reasons(world)) == (len(found), {})


def test_an_earlier_cycle_that_is_imported_late_leaves_the_later_ones_reviews_to_them(world: worlds.World) -> None:
    earlier = world.exports[-1]
    old = {task.task_id for task in world.tasks()}
    later = world.export(worlds.pairs(9, seed=5), "2026-W48")
    write(world.inbox, "261125-a.jsonl", [line(task) for task in world.tasks() if task.task_id not in old])
    world.exports.append(earlier)
    world.collect(CYCLE)
    assert reasons(world) == {"unknown_task": 9}
    world.exports.append(later)
    world.collect("2026-W48")
    assert (len(annotations(world)), reasons(world)) == (9, {})


def test_rewrites_become_examples_that_train_on_the_rewrite_alone(world: worlds.World) -> None:
    ledger = {row["task_id"]: row for row in world.exports[0].table("tasks").read().to_pylist()}
    tasks = world.tasks()
    text = "Come in. Or call me at +1 212 555 0148 first?"
    rows = [line(task, preferred="neither", rewrite=text) for task in tasks] + [line(tasks[0], "b", rewrite="  ")]
    write(world.inbox, "261118-a.jsonl", rows)
    world.collect(CYCLE)
    examples = world.imports[-1].table("examples").read().to_pylist()
    train = [row for row in ledger.values() if row["split"] == "train"]
    assert len(examples) == len(train) < len(tasks), "a held-out prompt is not trained on by way of its rewrite"
    for example in examples:
        assert example["source"] == "failure_fix"
        assert [m["trained"] for m in example["messages"]] == [False] * (len(example["messages"]) - 1) + [True]
        assert example["messages"][-1]["content"] == "Come in. Or call me at [PHONE] first?"
    assert {e["user"] for e in examples} == {row["user"] for row in train}


def test_what_a_forgotten_user_said_is_gone_from_every_output(world: worlds.World) -> None:
    tasks = world.tasks()
    write(world.inbox, "261118-a.jsonl", [line(task, rewrite="Better.") for task in tasks])
    world.collect(CYCLE)
    user = world.exports[0].table("tasks").read()["user"][0].as_py()
    world.export(worlds.pairs(5, seed=3), "2026-W48", frozenset({user}))
    world.collect("2026-W48", forgotten=frozenset({user}))
    rows = world.imports[-1].manifest.rows
    assert (rows.rows_in, rows.rows_out, rows.reasons) == (len(tasks), len(tasks) - 1, {"forgotten": 1})
    assert worlds.quarantine(world.imports[-1])[0]["user"] is None
    for name in ("annotations", "preferences", "examples"):
        assert user not in world.imports[-1].table(name).read()["user"].to_pylist()
    again = write(world.inbox, "261125-a.jsonl", [line(task, "late") for task in tasks])
    world.collect("2026-W48", [again], forgotten=frozenset({user}))
    assert reasons(world) == {"unknown_task": 1}


def test_an_interactive_session_goes_on_from_either_response_whichever_was_preferred(tmp_path, user_key) -> None:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(120, modes={"interactive": 0.5, "steerability": 0.5}), CYCLE)
    tasks = world.tasks()
    rows = [line(task, preferred="left", next_message="and then?" if i % 2 else None) for i, task in enumerate(tasks)]
    write(world.inbox, "261118-a.jsonl", rows)
    imported = world.collect(CYCLE)
    ledger = {row["prompt_id"]: row for row in world.exports[0].table("tasks").read().to_pylist()}
    preferred = {row["prompt_id"]: row[row["left"]] for row in ledger.values()}
    by_context = {str(row["turns"]): row for row in ledger.values()}
    took_preferred = 0
    prompts = [row for mode in ("interactive", "steerability") for row in imported.table(mode).read().to_pylist()]
    assert len(prompts) == len(tasks) // 2
    for prompt in prompts:
        before = by_context[str(prompt["turns"][:-2])]
        reply = prompt["turns"][-2]["content"]
        assert reply in (before["y0"], before["y1"])
        assert prompt["turns"][-1] == {"role": "user", "content": "and then?"}
        assert (prompt["user"], prompt["split"], prompt["source"]) == (before["user"], before["split"], "internal")
        took_preferred += reply == preferred[before["prompt_id"]]
    assert 0.3 < took_preferred / len(prompts) < 0.7
    again = write(world.inbox, "261125-a.jsonl", [*rows, line(tasks[0], "somebody else")])
    world.collect("2026-W48", [again])
    assert reasons(world) == {"duplicate": len(rows)}
    later = world.imports[-1].json("report")["sessions_going_on"]
    assert later == {"interactive": 0, "steerability": 0}, "a session goes on once, however often its review is sent"
    from flywheel_tasks.annotation import pairing

    sessions = {mode: imported.table(mode).read() for mode in ("interactive", "steerability")}
    planned = pairing.plan(
        worlds.prompts(2), sessions, count=500, pool=1, kinds=(), rewrite_share=0.0, modes={"static": 1.0}, seed=1
    )
    assert len(planned.prompts) == len(prompts) + 2


def test_a_session_ends(world: worlds.World) -> None:
    from flywheel_tasks.annotation.sessions import next_prompt

    pair = world.exports[0].table("tasks").read().to_pylist()[0]
    turns = 0
    while (prompt := next_prompt(pair, "a", "go on", 17, most_turns=8)) is not None:
        pair, turns = pair | {"turns": prompt["turns"], "prompt_id": prompt["prompt_id"]}, turns + 1
        assert turns < 20
    assert sum(turn["role"] == "user" for turn in pair["turns"]) == 8


def test_the_conversation_goes_on_by_a_fair_coin_that_nobody_can_move() -> None:
    def drawn(seed: int) -> np.ndarray:
        return np.array([continued({"pair_id": f"pair-{i}"}, seed) == "y0" for i in range(5000)])

    coins, other = drawn(1), drawn(2)
    assert stats.binomtest(int(coins.sum()), coins.size, 0.5).pvalue > 1e-4
    runs = int((coins[1:] != coins[:-1]).sum())
    assert stats.binomtest(runs, coins.size - 1, 0.5).pvalue > 1e-4, "one pair's coin says nothing of the next"
    assert stats.binomtest(int((coins == other).sum()), coins.size, 0.5).pvalue > 1e-4
    pair = {"pair_id": "pair-1"}
    assert continued(pair | {"y0": "a", "preferred": "y1"}, 1) == continued(pair, 1)


# -- the rules, whatever the order

TASK = Task.model_validate(
    {
        "task_id": "t1", "mode": "static", "reviewers": 3, "locale": "en_US", "language": "en", "questions": (),
        "shown": {"character": {"name": "a", "description": "", "traits": (), "instructions": ""}, "history": (),
                  "left": {"text": "l"}, "right": {"text": "r"}}, "digest": "0" * 64,
    }
)  # fmt: skip
LEDGER = {
    f"t{i}": {"task_id": f"t{i}", "pair_id": f"p{i}", "left": "y0", "digest": "0" * 64, "mode": "static", "user": "u"}
    for i in (1, 2)
}


Said = tuple[str, str, str, int, str, str | None]
SAID = st.lists(
    st.tuples(st.sampled_from(["t1", "t2"]), st.sampled_from("ab"), st.sampled_from(["left", "right"]),
              st.integers(0, 3), st.sampled_from(["261118", "261119"]), st.sampled_from([None, "One.", "Two."])),
    max_size=12,
)  # fmt: skip


def resolved(rows: list[Said]) -> list[resolve.Resolved]:
    found = []
    for number, (task, who, side, hour, batch, rewrite) in enumerate(rows):
        review = line(TASK, who, side, task_id=task, at=AT + dt.timedelta(hours=hour), rewrite=rewrite)
        found.append(delivery.Line(f"f:{number}", batch, review))
    return [resolve.resolve(one, LEDGER, {}, b"k" * 16) for one in found]


@given(SAID, st.randoms())
def test_reviews_settle_the_same_way_in_any_order(said: list[Said], shuffle: random.Random) -> None:
    kept, out, contradicted = resolve.settle(resolved(said))
    shuffled = list(said)
    shuffle.shuffle(shuffled)
    again, out_again, contradicted_again = resolve.settle(resolved(shuffled))
    assert len(kept) + len(out) == len(said)
    assert [one.row for one in kept] == [one.row for one in again]
    assert sorted(str(one.reason) for one in out) == sorted(str(one.reason) for one in out_again)
    assert contradicted == contradicted_again
    people = [(one.row["pair_id"], one.row["annotator"]) for one in kept if one.row]
    assert len(people) == len(set(people)), "one person has one answer on one pair"


@given(SAID, st.randoms(), st.lists(st.integers(0, 12), max_size=3))
def test_reviews_settle_the_same_way_over_any_number_of_imports(
    said: list[Said], shuffle: random.Random, cuts: list[int]
) -> None:
    """All but the batch, which is the one of the import that first took the answer."""
    at_once, _, contradicted = resolve.settle(resolved(said))
    shuffled = list(said)
    shuffle.shuffle(shuffled)
    ends = [0, *sorted(cuts), len(said)]
    kept: list[resolve.Resolved] = []
    remembered: dict[str, dt.datetime] = {}
    for start, stop in pairwise(ends):
        carried = [resolve.Resolved(resolve.CARRIED, one.row, user=one.user) for one in kept]
        fresh = resolved(shuffled[start:stop])
        kept, out, remembered = resolve.settle([*carried, *fresh], remembered)
        assert len(kept) + len(out) == len(carried) + len(fresh)

    def answers(found: list[resolve.Resolved]) -> list[dict]:
        return [{name: value for name, value in (one.row or {}).items() if name != "batch"} for one in found]

    assert answers(kept) == answers(at_once)
    assert remembered == contradicted


def test_a_person_who_contradicts_themselves_is_remembered_by_the_next_import(world: worlds.World) -> None:
    """One of the two answers sent again is no answer; a later one is."""
    task, *_ = world.tasks()
    both = [line(task, "ann", side, at=AT) for side in ("left", "right")]
    first = write(world.inbox, "261118-a.jsonl", both)
    world.collect(CYCLE, [first])
    assert reasons(world) == {"contradictory": 2}
    second = write(world.inbox, "261125-a.jsonl", [both[0]])
    world.collect("2026-W48", [first, second])
    assert (reasons(world), annotations(world)) == ({"contradictory": 1}, [])
    later = line(task, "ann", "left", at=AT + dt.timedelta(days=9))
    third = write(world.inbox, "261202-a.jsonl", [later])
    world.collect("2026-W49", [first, second, third])
    assert len(annotations(world)) == 1
    assert world.imports[-1].json("report")["contradicted"] == {}


def test_an_annotator_is_known_by_a_keyed_name_only(world: worlds.World, tmp_path: Path) -> None:
    write(world.inbox, "261118-a.jsonl", [line(task, "jane.doe@vendor.example") for task in world.tasks()])
    imported = world.collect(CYCLE)
    for file in Path(imported.storage.root).rglob("*"):
        assert not file.is_file() or b"jane.doe" not in file.read_bytes()
    assert ids.user_key() not in str(imported.json("report")).encode()


def test_a_batch_imported_over_two_cycles_ends_where_one_import_would(tmp_path, user_key) -> None:
    from flywheel_tasks.simulation import annotators

    pairs, team = worlds.pairs(40), annotators.team(4, 3)
    ends = []
    for name, cycles in {"at-once": [("2026-W48", 2)], "in-turn": [("2026-W47", 1), ("2026-W48", 2)]}.items():
        world = worlds.World(tmp_path / name)
        world.export(pairs, CYCLE)
        found = annotators.reviews(world.tasks(), team, worlds.DAY, 3)
        files = [
            annotators.deliver(found[: len(found) // 2], world.inbox, worlds.DAY),
            annotators.deliver(found[len(found) // 3 :], world.inbox, worlds.DAY + dt.timedelta(days=7)),
        ]
        for cycle, how_many in cycles:
            world.collect(cycle, files[:how_many])
        ends.append(world.imports[-1])
    for output in ("annotations", "preferences", "examples"):
        assert ends[0].table(output).read().equals(ends[1].table(output).read()), output
    assert ends[0].json("report")["agreement"] == ends[1].json("report")["agreement"]
