"""Sec. 2.5.1: held-out prompts only, proved by hash; answered once; a refusal that lists what leaked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.manifest import InputRecord, SourceRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.evaluation import leakage, respond
from flywheel_tasks.evaluation.respond import RespondConfig, _chosen
from flywheel_tasks.evaluation.weights import digest
from flywheel_tasks.models.chat import Card
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from tests.curation.curation_runs import commit, prompts

STORY = "Tell me again how you crossed the mountains in winter"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def held_out(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"e{n}",
            "conversation_id": f"ce{n}",
            "split": "eval",
            "source": ("internal", "production")[n % 2],
            "turns": [turn("user", f"{STORY}, chapter {n}")],
        }
        for n in range(count)
    ]


def training(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": f"t{n}",
            "conversation_id": f"ct{n}",
            "turns": [turn("user", f"Sing me song number {n} of forty")],
        }
        for n in range(count)
    ]


def seen_in(*tables: list[dict[str, Any]]) -> leakage.Seen:
    known = prompts([*held_out(), *training()]).to_pylist()
    of = {row["prompt_id"]: row["conversation_id"] for row in known}
    return leakage.seen([pa.Table.from_pylist(rows) for rows in tables if rows], of)


def leaks(*tables: list[dict[str, Any]], least: int = 40) -> dict[str, str]:
    return leakage.overlap(prompts(held_out()), seen_in(*tables), least).leaked


def test_what_training_never_saw_did_not_leak() -> None:
    assert leaks([{"prompt_id": "t0", "turns": [turn("user", "something else that is long enough to count")]}]) == {}


def test_a_prompt_its_conversation_and_its_text_leak() -> None:
    assert leaks([{"prompt_id": "e1", "turns": []}]) == {"e1": "prompt"}
    other = held_out()
    other[2]["conversation_id"] = "ct0"
    found = leakage.overlap(prompts(other), seen_in([{"prompt_id": "t0", "turns": []}]), 40)
    assert found.leaked == {"e2": "conversation"}
    assert leaks([{"turns": [turn("user", f"{STORY}, chapter 3")]}]) == {"e3": "text"}


def test_training_on_how_the_conversation_went_on_is_a_leak() -> None:
    messages = [
        turn("system", "You are Mia."),
        turn("user", f"{STORY},  CHAPTER 4 "),
        turn("assistant", "It was cold."),
        turn("user", "And then?"),
        turn("assistant", "Snow."),
    ]
    assert leaks([{"example_id": "x", "messages": messages}]) == {"e4": "text"}


def test_what_everybody_says_is_no_leak() -> None:
    common = [{"turns": [turn("user", f"{STORY}, chapter 3")]}]
    assert leaks(common, least=200) == {}


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8)), max_size=6))
def test_two_conversations_share_a_hash_only_if_they_share_the_words(turns: list[tuple[str, str]]) -> None:
    rows = [turn(role, content) for role, content in turns]
    hashes = list(leakage.prefixes(rows))
    assert len(hashes) == sum(role == "user" for role, _ in turns)
    assert len(set(hashes)) == len(hashes)
    swapped = [turn("user", row["content"]) for row in rows]
    if any(row["role"] == "assistant" for row in rows[:-1]) and hashes:
        assert hashes[-1] not in set(leakage.prefixes(swapped)) or rows[-1]["role"] != "user"


def test_a_refusal_lists_what_leaked_and_how_many_more() -> None:
    found = leakage.Overlap(100, {f"p{n:03d}": "prompt" for n in range(50)})
    with pytest.raises(InputError, match=r"50 of 100 .* p000 \(prompt\), p001 .* and 30 more; take them out"):
        leakage.refuse(found, 0.99)


def test_a_text_that_somebody_else_also_said_is_left_out_but_an_id_never() -> None:
    texts = leakage.Overlap(100, {f"p{n:03d}": "text" for n in range(5)})
    leakage.refuse(texts, 0.05)
    with pytest.raises(InputError, match="5 of 100"):
        leakage.refuse(texts, 0.04)
    with pytest.raises(InputError, match="6 of 100"):
        leakage.refuse(leakage.Overlap(100, texts.leaked | {"p9": "conversation"}), 0.5)


def test_prompts_are_held_out_ones_of_both_sets_and_the_same_every_week() -> None:
    table = prompts([*held_out(40), *training(40)])
    chosen = _chosen(table, 5)
    assert chosen.num_rows == 10
    assert set(chosen["split"].to_pylist()) == {"eval"}
    assert sorted(chosen["source"].to_pylist()) == ["internal"] * 5 + ["production"] * 5
    later = _chosen(prompts([*reversed(held_out(40)), *training(7)]), 5)
    assert set(later["prompt_id"].to_pylist()) == set(chosen["prompt_id"].to_pylist())


def test_nothing_held_out_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(InputError, match="none of 3 curated prompts is held out for evaluation"):
        _chosen(prompts(training()), 5)


CHARACTER = {
    "character_id": "char-0",
    "name": "Mia",
    "description": "a mountain guide",
    "traits": ["calm"],
    "instructions": "Keep it short.",
    "greeting": "Hello",
    "review_status": "approved",
}


class World:
    """Upstream artifacts in a throwaway store; `candidate` is a real checkpoint."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.store, self.model, self.runs = Store(f"file://{folder}/store"), model, 0

    def checkpoint(
        self,
        stage: str,
        made_from: dict[str, tuple[Artifact, str]] | None = None,
        sources: tuple[SourceRecord, ...] = (),
        base: str = "package:other",
    ) -> tuple[Artifact, str]:
        """A model whose manifest says what it was made from."""

        def fill(out: Output) -> None:
            for path in self.model.iterdir():
                (out.folder("model") / path.name).write_bytes(path.read_bytes())

        self.runs += 1
        made = commit(self.store, stage, {"model": "checkpoint"}, fill, f"{self.runs + 300:032x}")
        records = {
            name: InputRecord(stage=artifact.manifest.stage, key=artifact.manifest.key, output=output)
            for name, (artifact, output) in (made_from or {}).items()
        }
        more = {"inputs": records, "sources": sources, "config": {"base": {"path": base}}}
        manifest = made.manifest.model_copy(update=more)
        made.storage.put(manifest.path, manifest.to_bytes())
        return Artifact(made.storage, manifest), "model"

    def curated(self, rows: list[dict[str, Any]]) -> tuple[Artifact, str]:
        whole = [row | {"character_id": "char-0"} for row in prompts(rows).to_pylist()]
        return self.table("constrain", "prompts", "prompt", whole)

    def table(self, stage: str, output: str, contract: str, rows: list[dict[str, Any]]) -> tuple[Artifact, str]:
        self.runs += 1

        def fill(out: Output) -> None:
            with out.table(output) as writer:
                writer.write(pa.Table.from_pylist(rows, schema=schemas.get(contract)))
            out.account("row", rows_in=len(rows), rows_out=len(rows))

        return commit(self.store, stage, {output: contract}, fill, f"{self.runs + 100:032x}"), output

    def inputs(self, extra: dict[str, tuple[Artifact, str]] | None = None, rows: int = 6, **learnt: Any) -> Inputs:
        """The inputs of `respond`; the candidate is of this cycle, and was made from its prompts and `learnt`."""
        curated = self.curated([*held_out(rows), *training()])
        given: dict[str, tuple[Artifact, str] | None] = dict.fromkeys(respond.STAGE.inputs)
        given |= {
            "prompts": curated,
            "characters": self.table("ingest", "characters", "character", [CHARACTER]),
            "candidate": self.checkpoint("rl", {"prompts": curated, **learnt}),
        }
        return Inputs(given | (extra or {}), {})

    def run(self, inputs: Inputs, config: RespondConfig) -> Artifact:
        self.runs += 1
        key = f"{self.runs + 700:032x}"
        return commit(self.store, "respond", respond.STAGE.outputs, lambda out: respond.run(inputs, config, out), key)


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    return World(tmp_path, tiny_model)


def example(number: int) -> dict[str, Any]:
    messages = [turn("user", f"{STORY}, chapter {number}"), turn("assistant", "Slowly.")]
    return {
        "example_id": f"x{number}", "user": None, "source": "user_rjs", "character_id": None, "locale": None,
        "messages": [row | {"trained": row["role"] == "assistant"} for row in messages],
    }  # fmt: skip


def preference(number: int, split: str) -> dict[str, Any]:
    row = dict.fromkeys(schemas.PREFERENCE.names, "") | {"turns": [turn("user", f"{STORY}, chapter {number}")]}
    return row | {"preference_id": f"r{number}", "split": split, "n_reviews": 1, "conflict": False}


def refused(world: World, tiny_model: Path, inputs: Inputs, said: str) -> None:
    with pytest.raises(InputError, match=said):
        world.run(inputs, RespondConfig(champion=ModelConfig(path=str(tiny_model))))


def test_the_stage_stops_before_any_engine_starts_when_a_prompt_leaked(world: World, tiny_model: Path) -> None:
    sft = world.checkpoint("sft", {"sampled": world.table("rejection-sample", "examples", "example", [example(2)])})
    taught = world.table(
        "annotate-import", "preferences", "preference", [preference(5, "train"), preference(4, "eval")]
    )
    dpo = world.checkpoint("dpo", {"policy": sft, "preferences": taught})
    said = r"2 of 6 evaluation prompts occur in training data: e2 \(text\), e5 \(text\)"
    refused(world, tiny_model, world.inputs(policy=dpo), said)


def test_what_led_the_candidate_was_training_too(world: World, tiny_model: Path) -> None:
    """A reward model saw the prompt, or the policy of an earlier cycle from which this one went on."""
    taught = world.table("annotate-import", "preferences", "preference", [preference(1, "train")])
    reward = world.checkpoint("preference-pointwise", {"preferences": taught})
    refused(world, tiny_model, world.inputs(reward=reward), r"1 of 6 .* e1 \(text\)")
    sampled = world.table("rejection-sample", "examples", "example", [example(3)])
    champion, _ = world.checkpoint("rl", {"policy": world.checkpoint("sft", {"sampled": sampled})})
    sft = world.checkpoint("sft", base=f"{world.store.uri}/{champion.manifest.folder}/model")
    refused(world, tiny_model, world.inputs(policy=sft), r"1 of 6 .* e3 \(text\)")


def test_a_candidate_of_another_cycle_is_held_against_what_it_learned_itself(world: World, tiny_model: Path) -> None:
    theirs = world.curated([{"prompt_id": "old", "conversation_id": "ce2", "split": "train"}])
    other = {"candidate": world.checkpoint("rl", {"prompts": theirs})}
    refused(world, tiny_model, world.inputs(other), r"1 of 6 .* e2 \(conversation\)")


def test_a_candidate_that_names_no_training_data_proves_nothing(world: World, tiny_model: Path) -> None:
    refused(world, tiny_model, world.inputs({"candidate": world.checkpoint("rl")}), "names no training data")


@pytest.mark.parametrize("trained", ["sft", "dpo"])
def test_files_that_a_stage_was_given_are_compared_too(
    world: World, tiny_model: Path, tmp_path: Path, trained: str
) -> None:
    patch = tmp_path / "patch.jsonl"
    lines = ["not json", json.dumps({"turns": [turn("user", f"{STORY}, chapter 1")], "chosen": "a", "rejected": "b"})]
    patch.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    sha256 = hashlib.sha256(patch.read_bytes()).hexdigest()
    record = SourceRecord(name="patch.jsonl", uri=str(patch), bytes=patch.stat().st_size, sha256=sha256)
    sft = world.checkpoint("sft", sources=(record,) if trained == "sft" else ())
    dpo = world.checkpoint("dpo", {"policy": sft}, sources=(record,) if trained == "dpo" else ())
    inputs = world.inputs(policy=dpo)
    refused(world, tiny_model, inputs, r"1 of 6 evaluation prompts occur in training data: e1 \(text\)")
    patch.write_text("{}")
    refused(world, tiny_model, inputs, "is not the file that was trained on any more")


def earlier_answers() -> respond._Earlier:
    """Two draws of each of e0, e1 and e2; the second of e1 failed, the second of e2 is gone with its user."""
    rows = [
        dict.fromkeys(schemas.COMPLETION.names)
        | {"completion_id": f"champion-{draw}", "prompt_id": draw[:2], "user": "u", "character_id": "c", "locale": "en"}
        | {"split": "eval", "turns": [], "text": draw, "sample": 0, "tokens": 1, "finish": finish, "policy": "champion"}
        | {"scores": []}
        for draw, finish in (("e0a", "stop"), ("e0b", "length"), ("e1a", "stop"), ("e1b", "error"), ("e2a", "stop"))
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.COMPLETION)
    row_of = {name.rpartition("-")[2]: row for row, name in enumerate(table["completion_id"].to_pylist())}
    return respond._Earlier(table, row_of, {"k0": ["e0a", "e0b"], "k1": ["e1a", "e1b"], "k2": ["e2a", "e2b"]})


def test_the_prompt_of_who_was_forgotten_in_this_moment_is_counted_and_not_answered(
    world: World, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody else's answers are there from the last cycle, so no engine starts."""
    config = RespondConfig(champion=ModelConfig(path=str(tiny_model)), most_leaked=0.2)
    given = world.inputs()
    asked = given["prompts"].read()
    users = [f"user-{n}" for n in range(asked.num_rows)]
    named = asked.set_column(asked.schema.get_field_index("user"), "user", pa.array(users)).to_pylist()
    prompts_in = world.curated(named)
    cards = {"char-0": Card.of(CHARACTER)}
    chosen = _chosen(asked, config.most_prompts)
    policy = respond._Policy("candidate", tiny_model, "x", digest(tiny_model))
    keys = respond._keys(chosen, policy, cards, config, 17)
    rows = [
        dict.fromkeys(schemas.COMPLETION.names)
        | {name: row[name] for name in ("prompt_id", "user", "character_id", "locale", "split", "turns")}
        | {"completion_id": f"candidate-{row['prompt_id']}", "text": "Yes.", "sample": 0, "tokens": 1}
        | {"finish": "stop", "policy": "candidate", "scores": []}
        for row in named if row["prompt_id"] in keys
    ]  # fmt: skip

    def earlier(out: Output) -> None:
        with out.table("responses") as writer:
            writer.write(pa.Table.from_pylist(rows, schema=schemas.COMPLETION))
        out.json("contents", {key: [prompt] for prompt, key in keys.items()})
        out.account("response", rows_in=len(rows), rows_out=len(rows))

    before = commit(world.store, "respond", {"responses": "completion", "contents": "json"}, earlier, "e" * 32)
    extra = {"prompts": prompts_in, "earlier": (before, "responses"), "earlier_contents": (before, "contents")}
    sampled = world.table("rejection-sample", "examples", "example", [example(4)])
    inputs = world.inputs(extra, policy=world.checkpoint("sft", {"sampled": sampled}))
    inputs.forgotten = frozenset({next(row["user"] for row in named if row["prompt_id"] == "e2")})
    made = world.run(inputs, config)
    counted = made.manifest.rows
    assert counted is not None
    reasons = {"forgotten": 1, "text_in_training": 1}
    assert (counted.rows_in, counted.rows_out, counted.reasons) == (10, 8, reasons)
    refused = made.table("quarantine").read().to_pylist()
    assert [(row["row_id"], row["user"]) for row in refused] == [("e2", None), ("e4", None)]
    assert not {"e2", "e4"} & set(made.table("responses").read()["prompt_id"].to_pylist())
    overlap = made.json("report")["overlap"]
    assert (overlap["prompts"], overlap["leaked"], overlap["left_out"]) == (4, 0, ["e4"])


@pytest.mark.parametrize("count", [0, 1, 4])
def test_answers_of_the_last_cycle_are_taken_whole_or_not_at_all(count: int) -> None:
    asked = prompts(held_out(4)[:count] or held_out(1)).slice(0, count)
    reused, left = earlier_answers().take(asked, {f"e{n}": f"k{n}" for n in range(4)})
    assert reused["text"].to_pylist() == (["e0a", "e0b"] if count else [])
    assert left == list(range(1, count))
    named = respond._named(reused, "candidate")
    assert named["completion_id"].to_pylist() == (["candidate-e0a", "candidate-e0b"] if count else [])
    assert set(named["policy"].to_pylist()) <= {"candidate"}


def test_another_card_turn_weight_or_draw_is_another_answer(tmp_path: Path) -> None:
    asked, plain = prompts(held_out(1)), respond._Policy("candidate", tmp_path, "rl/x", "w" * 64)
    mia = {"char-0": Card.of(CHARACTER)}
    asked = asked.set_column(
        asked.schema.get_field_index("character_id"), "character_id", pa.array(["char-0"], pa.string())
    )
    other = asked.set_column(
        asked.schema.get_field_index("turns"), "turns", pa.array([[turn("user", "no")]], asked["turns"].type)
    )
    config = RespondConfig()
    keys = [
        respond._keys(asked, plain, mia, config, 1),
        respond._keys(asked, plain._replace(weights="v" * 64), mia, config, 1),
        respond._keys(asked, plain, {"char-0": Card.of(CHARACTER | {"traits": ["loud"]})}, config, 1),
        respond._keys(other, plain, mia, config, 1),
        respond._keys(asked, plain, mia, config, 2),
        respond._keys(asked, plain, mia, RespondConfig(sampling=Sampling(top_p=0.9)), 1),
    ]
    assert len({row["e0"] for row in keys}) == len(keys)
    same = respond._keys(asked, plain._replace(name="champion", origin="y"), mia, config, 1)
    assert same == keys[0]


@pytest.mark.slow
def test_both_policies_answer_once_and_the_next_cycle_asks_for_nothing_twice(
    world: World, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = EngineConfig(cache_gib=0.25, sequences=16, stall_seconds=120, start_seconds=280)
    config = RespondConfig(
        champion=ModelConfig(path=str(tiny_model)), sampling=Sampling(max_tokens=16, k=2), engine=engine
    )
    first = world.run(world.inputs(), config)
    rows = first.table("responses").read()
    assert sorted(rows["policy"].to_pylist()) == ["candidate"] * 12 + ["champion"] * 12
    assert len(set(rows["completion_id"].to_pylist())) == 24
    assert set(rows["split"].to_pylist()) == {"eval"}
    text = {(r["policy"], r["prompt_id"], r["sample"]): r["text"] for r in rows.to_pylist()}
    # Equal weights give equal answers, under whatever name they run.
    assert all(text["candidate", f"e{n}", k] == text["champion", f"e{n}", k] for n in range(6) for k in range(2))
    report = first.json("report")
    (compared,) = report["overlap"].pop("compared_with")
    assert compared.startswith("constrain/")
    assert report["overlap"] == {"prompts": 6, "leaked": 0, "left_out": []}
    assert report["prompts"] == {"internal": 3, "user": 3}
    assert report["candidate"].startswith("rl/")
    earlier = {"earlier": (first, "responses"), "earlier_contents": (first, "contents")}

    def no_engine(*_: Any) -> None:
        raise AssertionError("an engine was started for answers that are there")

    monkeypatch.setattr("flywheel_tasks.models.engine.open_engine", no_engine)
    second = world.run(world.inputs(earlier), config)
    assert second.table("responses").read().sort_by("completion_id").equals(rows.sort_by("completion_id"))
    assert {policy["reused"] for policy in second.json("report")["policies"].values()} == {12}
    with pytest.raises(AssertionError, match="an engine was started"):
        world.run(world.inputs(earlier, rows=7), config)
