"""Tables of completions: complete, resumable, with an error row where there is no response."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.generate import Chunk, Encode, cards, complete, encoder, prompt_room, template_of
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.engine_policy import engine_policy
from flywheel_tasks.simulation.language import Context
from flywheel_tasks.simulation.users import Turn

DRAW = Sampling(k=2, max_tokens=10, seed=3)


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> Template:
    return Template(load_tokenizer(tiny_model))


@pytest.fixture
def encode(engine: Engine, template: Template) -> Encode:
    return encoder(template, cards(character_table(demo_characters())), prompt_room(engine, DRAW))


@pytest.fixture
def partial(tmp_path: Path) -> Partial:
    return Partial(Storage(f"file://{tmp_path}/store"), "rejection-sample", "0" * 32)


def prompt_rows(count: int) -> pa.Table:
    people = demo_characters()
    rows = [
        {
            "prompt_id": f"prompt-{number:03d}", "conversation_id": f"c{number}", "user": f"u{number % 7}",
            "character_id": people[number % len(people)].character_id, "source": "internal",
            "turns": [{"role": "user", "content": f"Tell me about day {number}. <|eot_id|>"}], "turn_index": 0,
            "first_turn": True, "locale": "en_US", "language": "en", "code_mixed": False,
            "jtbd": None if number % 3 else "advice", "depth": "1", "quality": 0.5, "difficulty": 0.5,
            "model_version": "v1", "near_policy": True, "split": "train",
        }
        for number in range(count)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=schemas.PROMPT)


def whole(chunks: Iterator[Chunk]) -> pa.Table:
    return pa.concat_tables([chunk.table for chunk in sorted(chunks, key=lambda chunk: chunk.name)])


def test_k_rows_for_each_prompt_that_repeat_what_a_reader_needs(
    engine: Engine, template: Template, encode: Encode
) -> None:
    prompts = prompt_rows(20)
    table = whole(complete(engine, template, prompts, encode, DRAW, "base", chunk=8))
    assert table.schema == schemas.COMPLETION
    assert table.column("prompt_id").to_pylist() == [p for p in prompts.column("prompt_id").to_pylist() for _ in (0, 1)]
    assert table.column("sample").to_pylist() == [0, 1] * 20
    assert len(set(table.column("completion_id").to_pylist())) == 40
    for row in table.to_pylist():
        asked = prompts.to_pylist()[int(row["prompt_id"][-3:])]
        assert {name: row[name] for name in ("user", "locale", "jtbd", "turns", "split")} == {
            name: asked[name] for name in ("user", "locale", "jtbd", "turns", "split")
        }
        assert row["logprob"] < 0
        assert 0 < row["tokens"] <= 10
        assert row["policy"] == "base"
        assert not row["text"].endswith("<|eot_id|>")
        assert (row["scores"], row["accepted"], row["reason"]) == ([], None, None)


def test_a_row_without_a_response_is_an_error_row(engine: Engine, template: Template, encode: Encode) -> None:
    rows = prompt_rows(6).to_pylist()
    rows[1]["character_id"] = "nobody"
    rows[4]["turns"] = [{"role": "user", "content": "word " * 3000}]
    prompts = pa.Table.from_pylist(rows, schema=schemas.PROMPT)
    table = whole(complete(engine, template, prompts, encode, DRAW, "base", chunk=2)).to_pylist()
    assert len(table) == 12
    failed = {row["prompt_id"]: row["reason"] for row in table if row["finish"] == "error"}
    assert set(failed) == {"prompt-001", "prompt-004"}
    assert failed["prompt-001"].startswith("unknown_character: character 'nobody'")
    assert failed["prompt-004"].startswith("too_long: ")
    assert all(
        (row["text"], row["tokens"], row["logprob"], row["accepted"]) == ("", 0, None, False)
        for row in table
        if row["finish"] == "error"
    )


def test_chunks_do_not_change_what_is_drawn_but_policies_do(engine: Engine, template: Template, encode: Encode) -> None:
    prompts = prompt_rows(12)
    small = whole(complete(engine, template, prompts, encode, DRAW, "base", chunk=3))
    big = whole(complete(engine, template, prompts, encode, DRAW, "base", chunk=12))
    other = whole(complete(engine, template, prompts, encode, DRAW, "another", chunk=12))
    assert small.equals(big)
    assert not set(other.column("completion_id").to_pylist()) & set(big.column("completion_id").to_pylist())
    assert other.column("text") != big.column("text")


def test_what_an_attempt_committed_is_not_generated_again(
    engine: Engine, template: Template, encode: Encode, partial: Partial
) -> None:
    prompts = prompt_rows(40)
    undisturbed = whole(complete(engine, template, prompts, encode, DRAW, "base", chunk=5))
    first = complete(engine, template, prompts, encode, DRAW, "base", partial=partial, chunk=5)
    begun = [next(first).name, next(first).name]
    first.close()
    committed = set(partial.names())
    assert set(begun) <= committed
    assert len(committed) < 8
    before = engine.stats()["completions"]
    second = list(complete(engine, template, prompts, encode, DRAW, "base", partial=partial, chunk=5))
    assert {chunk.name for chunk in second if chunk.resumed} == committed
    assert engine.stats()["completions"] - before == (8 - len(committed)) * 5 * 2
    assert whole(iter(second)).equals(undisturbed)


def test_a_damaged_or_foreign_chunk_is_made_again(
    engine: Engine, template: Template, encode: Encode, partial: Partial, tmp_path: Path
) -> None:
    prompts = prompt_rows(10)
    [made] = complete(engine, template, prompts.slice(0, 5), encode, DRAW, "base", partial=partial, chunk=5)
    [foreign] = complete(engine, template, prompts.slice(5), encode, DRAW, "base", partial=partial, chunk=5)
    assert not foreign.resumed
    [stored] = tmp_path.rglob(made.name)
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    [again] = complete(engine, template, prompts.slice(5), encode, DRAW, "base", partial=partial, chunk=5)
    assert not again.resumed
    assert again.table.equals(foreign.table)


def test_scoring_overlaps_generation(engine: Engine, template: Template, encode: Encode) -> None:
    """While the reader holds the first chunk, the engine finishes others."""
    draw = DRAW.model_copy(update={"max_tokens": 60})
    stream = complete(engine, template, prompt_rows(60), encode, draw, "base", chunk=5)
    next(stream)
    done = engine.stats()["prompts"]
    deadline = time.monotonic() + 30
    while engine.stats()["prompts"] < done + 10:
        assert time.monotonic() < deadline, "the engine waits for the reader"
        time.sleep(0.05)
    assert sum(1 for _ in stream) == 11


def test_repeated_prompts_are_refused(engine: Engine, template: Template, encode: Encode) -> None:
    prompts = pa.concat_tables([prompt_rows(3), prompt_rows(2)])
    with pytest.raises(InputError, match="2 prompts repeat a prompt_id"):
        list(complete(engine, template, prompts, encode, DRAW, "base"))


def test_no_room_for_a_prompt_is_a_config_error(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        prompt_room(engine, Sampling(max_tokens=engine.context))


def test_no_prompts_no_chunks(engine: Engine, template: Template, encode: Encode) -> None:
    assert list(complete(engine, template, prompt_rows(0), encode, DRAW, "base")) == []


def test_simulated_users_can_chat_with_the_engine(engine: Engine) -> None:
    policy = engine_policy(engine, DRAW, template_of(engine))
    people = demo_characters()
    contexts = [
        Context(f"c{number}", people[number], "en", (Turn("user", "hello there"),), seed=number) for number in range(4)
    ]
    replies = policy(contexts)
    assert len(set(replies)) == 4
    assert policy(contexts[2:]) == replies[2:]
    assert policy([]) == []
