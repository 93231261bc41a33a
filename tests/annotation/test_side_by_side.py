"""Sec. 2.5.1, human comparison: who is asked, what they see, what comes back, and how a session goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.annotation import publish
from flywheel_tasks.annotation.annotate_import import ImportConfig
from flywheel_tasks.annotation.contract import Task
from flywheel_tasks.annotation.side_by_side import IMPORT, STAGE, SideBySideConfig
from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.manifest import InputRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Artifact
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from tests.annotation import worlds

CYCLE, KEY = "2026-W47", "ab" * 16
CANDIDATE, CHAMPION = f"rl/{KEY}", "the-champion"


class World(worlds.World):
    """Prompts that candidate and champion have answered, and the stages that bring the answers before people."""

    def __init__(self, folder: Path, champion: str = CHAMPION) -> None:
        super().__init__(folder)
        self.folder, self.champion, self.candidate = folder, champion, KEY
        self.sent: list[Artifact] = []
        self.collected: list[Artifact] = []

    def responses(self, prompts: pa.Table, said: dict[tuple[str, str], dict[str, Any]] | None = None) -> Artifact:
        """What `respond` leaves: one answer of each policy, `said` where (prompt, policy) is to have another one."""
        fields = [f.name for f in schemas.PROMPT if f.name in schemas.COMPLETION.names]
        rows = [
            dict.fromkeys(schemas.COMPLETION.names) | {name: row[name] for name in fields}
            | {"completion_id": f"{policy}-{number}", "policy": policy, "sample": 0, "tokens": 5, "scores": []}
            | {"finish": "stop", "text": f"{'Ahoy' if policy == 'candidate' else 'Hello'} from number {number}."}
            | (said or {}).get((row["prompt_id"], policy), {})
            for number, row in enumerate(prompts.to_pylist())
            for policy in ("candidate", "champion")
        ]  # fmt: skip

        def fill(out: Output) -> None:
            with out.table("responses") as writer:
                writer.write(pa.Table.from_pylist(rows, schema=schemas.COMPLETION))
            out.account("response", rows_in=len(rows), rows_out=len(rows))

        config = {
            "champion": ModelConfig(path=self.champion).model_dump(mode="json"),
            "sampling": Sampling(max_tokens=8).model_dump(mode="json"),
            "engine": EngineConfig(cache_gib=0.25, stall_seconds=300).model_dump(mode="json"),
        }
        record = InputRecord(stage="rl", key=self.candidate, output="model")
        return worlds.commit(
            self.store, "respond", {"responses": "completion"}, fill, CYCLE, inputs={"candidate": record}, config=config
        )

    def send(
        self, prompts: pa.Table, said: dict[tuple[str, str], dict[str, Any]] | None = None, cycle: str = CYCLE,
        forgotten: frozenset[str] = frozenset(), **config: Any,
    ) -> Artifact:  # fmt: skip
        given = {
            "responses": (self.responses(prompts, said), "responses"),
            "prompts": (self.put("constrain", {"prompts": "prompt"}, {"prompts": prompts}), "prompts"),
            "characters": (self.characters, "characters"),
            "earlier": (self.sent[-1], "tasks") if self.sent else None,
            "sessions": (self.collected[-1], "interactive") if self.collected else None,
        }
        whole = SideBySideConfig.model_validate({"folder": str(self.folder / "compare")} | config)
        self.sent.append(worlds.run(STAGE, self.store, whole, given, cycle, {}, forgotten))
        return self.sent[-1]

    def asked(self) -> list[Task]:
        name = self.sent[-1].json("report")["export"]
        return publish.tasks(publish.read(str(self.folder / "compare"), name)["tasks.jsonl"])

    def answered(self, cycle: str = CYCLE) -> Artifact:
        given = {
            "tasks": (self.sent[-1], "tasks"),
            "export": (self.sent[-1], "report"),
            "earlier": (self.collected[-1], "annotations") if self.collected else None,
            "earlier_report": (self.collected[-1], "report") if self.collected else None,
        }
        files = {"deliveries": tuple(worlds.source(path) for path in sorted(self.inbox.glob("*")))}
        self.collected.append(worlds.run(IMPORT, self.store, ImportConfig(), given, cycle, files))
        return self.collected[-1]


@pytest.fixture
def world(tmp_path: Path, user_key: bytes) -> World:
    return World(tmp_path)


def held_out(count: int, seed: int = 0) -> pa.Table:
    table = worlds.prompts(count, seed)
    return table.set_column(table.schema.get_field_index("split"), "split", pa.array(["eval"] * count))


def test_sides_are_a_balanced_coin_that_tells_nobody_who_is_who(world: World) -> None:
    prompts = held_out(600)
    sent = world.send(prompts, count=500)
    ledger, tasks = sent.table("tasks").read().to_pylist(), {task.task_id: task for task in world.asked()}
    assert len(ledger) == len(tasks) == 500
    assert {frozenset((row["policy0"], row["policy1"])) for row in ledger} == {frozenset((CANDIDATE, CHAMPION))}
    spread = 4 * np.sqrt(500 / 4)
    policy_left = [row[f"policy{row['left'][1]}"] for row in ledger]
    for count in (
        policy_left.count(CANDIDATE), sum(row["policy0"] == CANDIDATE for row in ledger),
        sum(row["left"] == "y0" for row in ledger),
    ):  # fmt: skip
        assert abs(count - 250) < spread
    for row, policy in zip(ledger, policy_left, strict=True):
        shown = tasks[row["task_id"]].shown
        greetings = ("Ahoy", "Hello") if policy == CANDIDATE else ("Hello", "Ahoy")
        assert (shown.left.text.split()[0], shown.right.text.split()[0]) == greetings
        assert shown.left.text.split()[1:] == shown.right.text.split()[1:], "both answer the same prompt"
    files = publish.read(str(world.folder / "compare"), sent.json("report")["export"])
    words = b"".join(files.values()).decode()
    hidden = {CANDIDATE, KEY, CHAMPION, "candidate", "champion"}
    hidden |= {row[name] for row in ledger for name in ("user", "prompt_id", "pair_id")}
    assert not [word for word in hidden if word in words]


def test_another_key_puts_other_models_left(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def left() -> dict[str, str]:
        return {row["pair_id"]: row["left"] for row in world.send(held_out(64)).table("tasks").read().to_pylist()}

    one = left()
    world.sent.clear()
    monkeypatch.setenv("FLYWHEEL_USER_KEY", "0f" * 32)
    other = left()
    assert one.keys() == other.keys()
    assert 8 < sum(one[pair] != other[pair] for pair in one) < 56


def test_without_a_folder_nobody_is_asked(world: World) -> None:
    sent = world.send(held_out(20), folder="")
    assert (sent.table("tasks").rows, sent.json("report")["published"]) == (0, False)
    assert not (world.folder / "compare").exists()
    assert world.answered().table("annotations").rows == 0


def test_what_cannot_be_compared_stays_and_is_counted(world: World) -> None:
    prompts = held_out(12)
    ids, users = prompts["prompt_id"].to_pylist(), prompts["user"].to_pylist()
    said = {
        (ids[0], "candidate"): {"text": "Hello from NUMBER 0."},
        (ids[1], "champion"): {"text": " "},
        (ids[2], "candidate"): {"text": "", "finish": "error", "reason": "RuntimeError: no"},
        (ids[3], "candidate"): {"text": "Write to mira@example.com, will you?"},
        (ids[4], "champion"): {"text": "I was just about to sa", "finish": "length"},
        (ids[5], "champion"): {"text": "word " * 200},
    }
    sent = world.send(prompts, said, forgotten=frozenset({users[11]}))
    reasons = {"identical": 1, "empty": 1, "generation_runtimeerror": 1, "identifier": 1, "forgotten": 1}
    assert sent.manifest.rows.reasons == reasons
    assert (sent.manifest.rows.rows_in, sent.manifest.rows.rows_out) == (12, 7)
    assert {4, 5} <= {ids.index(prompt) for prompt in sent.table("tasks").read()["prompt_id"].to_pylist()}, (
        "cut-off and long responses are what a model is"
    )
    gone = next(row for row in worlds.quarantine(sent) if row["reason"] == "forgotten")
    assert gone["user"] is None
    assert users[11] not in sent.table("tasks").read()["user"].to_pylist()


def test_answers_come_back_late_and_what_was_never_sent_or_was_altered_does_not_count(world: World) -> None:
    world.send(held_out(10))
    first = world.asked()
    worlds.write(world.inbox, "261118-a.jsonl", [worlds.line(task) for task in first[:4]])
    assert world.answered().table("annotations").rows == 4
    world.send(held_out(10, seed=3), cycle="2026-W48")
    rows = [worlds.line(task) for task in first[4:6]]
    rows += [worlds.line(world.asked()[0], digest="0" * 64), worlds.line(world.asked()[1], task_id="t" + "0" * 24)]
    worlds.write(world.inbox, "261125-a.jsonl", rows)
    later = world.answered("2026-W48")
    assert later.table("annotations").rows == 6, "of last week's comparison, and kept apart by the names of its models"
    assert {row["reason"] for row in worlds.quarantine(later)} == {"altered_text", "unknown_task"}
    assert later.table("preferences").read()["split"].unique().to_pylist() == ["eval"], "nothing to train on"
    assert later.table("examples").rows == 0


def test_the_weeks_own_import_does_not_know_these_tasks(world: World) -> None:
    world.export(worlds.pairs(10), CYCLE)
    world.send(held_out(10))
    worlds.write(world.inbox, "261118-a.jsonl", [worlds.line(task) for task in world.asked()])
    world.collect(CYCLE)
    assert {row["reason"] for row in worlds.quarantine(world.imports[-1])} == {"unknown_task"}
    assert world.imports[-1].table("preferences").rows == 0, "held-out prompts reach no reward model"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_session_goes_on_from_either_response_and_both_models_answer(
    tmp_path: Path, tiny_model: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model through vLLM: a folder is the champion, a checkpoint of the store the candidate."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    world = World(tmp_path, str(tiny_model))

    def checkpoint(out: Output) -> None:
        for path in tiny_model.iterdir():
            (out.folder("model") / path.name).write_bytes(path.read_bytes())

    world.candidate = worlds.commit(world.store, "rl", {"model": "checkpoint"}, checkpoint, CYCLE).manifest.key
    world.send(held_out(30))
    rows = [worlds.line(task, preferred="left", next_message="and then?") for task in world.asked()]
    worlds.write(world.inbox, "261118-a.jsonl", rows)
    answered = world.answered()
    sessions = answered.table("interactive").read().to_pylist()
    # The embedded safety classifier takes offence at a greeting or two.
    left_out = answered.json("report")["words_left_out"].get("next_message_unsafe_response", 0)
    assert len(sessions) + left_out == 30
    assert left_out < 4
    assert 4 < sum("Ahoy" in row["turns"][-2]["content"] for row in sessions) < 26, "whichever was preferred"
    sent = world.send(held_out(6, seed=9), cycle="2026-W48", sessions=12, count=5)
    assert sent.json("report")["sessions_going_on"] == 12
    mine = [row for row in sent.table("tasks").read().to_pylist() if row["cycle"] == "2026-W48"]
    known = {row["prompt_id"]: row["turns"] for row in sessions}
    going_on = [row for row in mine if row["prompt_id"] in known]
    assert len(mine) - len(going_on) == 5
    assert len(going_on) + sum(sent.json("report")["not_shown"].values()) == 12
    assert going_on
    for row in going_on:
        assert row["turns"] == known[row["prompt_id"]]
        assert {row["policy0"], row["policy1"]} == {f"rl/{world.candidate}", tiny_model.name}
        assert row["y0"] != row["y1"]
    rows_of = sent.manifest.rows
    assert rows_of.rows_in - rows_of.rows_out == rows_of.rows_rejected
