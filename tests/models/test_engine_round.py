"""Nothing is lost and nothing is done twice, however engines die: the bookkeeping of a round, without engines."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.engine import STATS, Engine
from flywheel_tasks.models.engine_config import EngineConfig
from flywheel_tasks.models.engine_round import SUSPECT, Round
from flywheel_tasks.models.engine_wire import Completion, Draw, Request


def draw(k: int = 2) -> Draw:
    return Draw(k, 1.0, 1.0, 8, 0)


def responses(request: Request, k: int) -> list[Completion]:
    return [Completion(request.id, sample, [1], [0.0], "length") for sample in range(k)]


def simulate(
    count: int, engines: int, room: int, poison: set[str], accidents: float, seed: int
) -> tuple[Round, Counter[str], list[str]]:
    """Engines that take what fits and finish some of it; a poisoned prompt kills its engine, accidents kill any."""
    rng = random.Random(seed)
    current = Round([Request(f"p{i}", [1]) for i in range(count)], draw(), 10_000, engines)
    flying: list[dict[str, Request]] = [{} for _ in range(engines)]
    returned: Counter[str] = Counter()
    given_up: list[str] = []
    while not current.complete:
        number = rng.randrange(engines)
        work = flying[number]
        work |= {r.id: r for r in current.take(work, room - 2 * len(work))}
        if work and (set(work) & poison or rng.random() < accidents):
            for request in current.lost(work, RuntimeError("killed")):
                given_up.append(request.id)
                returned[request.id] += 1
                current.finish(responses(request, 2))
            flying[number] = {}
            continue
        for name in rng.sample(sorted(work), rng.randint(0, len(work))):
            returned[name] += 1
            current.finish(responses(work.pop(name), 2))
    return current, returned, given_up


@given(
    st.integers(0, 40),
    st.integers(1, 4),
    st.integers(2, 12),
    st.sets(st.integers(0, 39), max_size=3),
    st.integers(0, 9999),
)
def test_every_prompt_comes_back_once_and_only_killers_are_given_up(
    count: int, engines: int, room: int, poisoned: set[int], seed: int
) -> None:
    poison = {f"p{i}" for i in poisoned if i < count}
    current, returned, given_up = simulate(count, engines, room, poison, 0.0, seed)
    assert returned == Counter({f"p{i}": 1 for i in range(count)})
    assert set(given_up) == poison
    assert current.deaths <= (SUSPECT + 1) * len(poison)


@given(st.integers(1, 30), st.integers(1, 3), st.floats(0, 0.3), st.integers(0, 9999))
def test_accidents_lose_no_prompt(count: int, engines: int, accidents: float, seed: int) -> None:
    _, returned, _ = simulate(count, engines, 8, set(), accidents, seed)
    assert returned == Counter({f"p{i}": 1 for i in range(count)})


def test_a_suspect_runs_alone() -> None:
    current = Round([Request(name, [1]) for name in "abc"], draw(k=1), 5, 1)
    for _ in range(SUSPECT):
        work = {r.id: r for r in current.take({}, 3)}
        assert set(work) == set("abc")
        assert current.lost(work, RuntimeError("killed")) == []
    alone = current.take({}, 3)
    assert [r.id for r in alone] == ["a"]
    flying = {"a": alone[0]}
    assert current.take(flying, 3) == []
    assert not current.more_for(flying)
    assert [r.id for r in current.lost(flying, RuntimeError("killed"))] == ["a"]
    assert [r.id for r in current.take({}, 3)] == ["b"]


def test_a_round_gives_up_on_engines_that_keep_dying() -> None:
    current = Round([Request("a", [1])], draw(), 2, 1)
    for _ in range(2):
        current.lost({}, RuntimeError("no memory"))
    with pytest.raises(FlywheelError, match="3 engines were lost in one round, the last because no memory"):
        current.lost({}, RuntimeError("no memory"))


def test_a_small_round_is_shared_by_all_engines() -> None:
    current = Round([Request(f"p{i}", [1]) for i in range(8)], draw(k=4), 5, 2)
    assert current.fair_share == 16
    assert len(current.take({}, min(128, current.fair_share))) == 4


def test_prompts_are_made_when_they_are_needed() -> None:
    made = []

    def source():
        for number in range(1000):
            made.append(number)
            yield Request(f"p{number}", [1])

    current = Round(source(), draw(k=4), 5, 1)
    current.take({}, 16)
    assert len(made) == 4


def test_a_reader_who_works_past_the_deadline_gets_what_is_finished_and_then_the_reason() -> None:
    engine = Engine(ModelConfig(path="/nowhere"), EngineConfig())
    current = Round([], draw(k=1), 1, 1)
    current.finish(responses(Request("a", [1]), 1))
    found = engine._read(current, ends=time.monotonic() - 5)
    assert next(found)[0].id == "a"
    with pytest.raises(FlywheelError, match="passed its deadline: 1 prompts were finished"):
        next(found)


def test_stats_have_every_name_before_anything_was_drawn() -> None:
    assert Engine(ModelConfig(path="/nowhere"), EngineConfig()).stats() == dict.fromkeys(STATS, 0.0)
