from __future__ import annotations

import ast
import datetime as dt
import gzip
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

import flywheel_tasks
from flywheel_tasks.core import ids, schemas
from flywheel_tasks.simulation import faults as fault
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.chat import Mix
from flywheel_tasks.simulation.faults import Faults
from flywheel_tasks.simulation.language import Context
from flywheel_tasks.simulation.plants import KINDS
from flywheel_tasks.simulation.traffic import TrafficTruth, write_event_log
from flywheel_tasks.simulation.users import make_users
from flywheel_tasks.simulation.world import steady

START = dt.date(2026, 11, 9)
REQUIRED = ("event_id", "type", "conversation_id", "message_id", "user_id", "character_id", "at")
HARSH = Faults(duplicate=0.1, late=0.05, reordered=0.2, malformed=0.03, unknown_type=0.01)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> TrafficTruth:
    folder = tmp_path_factory.mktemp("log")
    return write_event_log(
        folder, users=120, days=5, seed=11, start=START, faults=HARSH, mix=Mix(identifiers=0.05, unsafe=0.03)
    )


def lines_of(path: Path) -> list[bytes]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data.split(b"\n")[:-1]


def problem(line: bytes) -> str | None:
    """A reader of its own: what is wrong with a line, by the standard library's rules."""
    try:
        event = json.loads(line.decode())
    except ValueError:
        return "no JSON"
    if not isinstance(event, dict):
        return "no object"
    for name in REQUIRED:
        if not isinstance(event.get(name), str):
            return f"bad {name}"
        if any("\ud800" <= c <= "\udfff" for c in event[name]):
            return "surrogate"
    if event["type"] not in ("message", "reaction", "feedback", "regenerate"):
        return "unknown type"
    try:
        dt.datetime.fromisoformat(event["at"])
    except ValueError:
        return "bad time"
    return None


def read(truth: TrafficTruth) -> tuple[list[dict[str, Any]], set[tuple[str, int]]]:
    good, bad = [], set()
    for path in truth.files:
        for number, line in enumerate(lines_of(path), 1):
            if problem(line):
                bad.add((path.name, number))
            else:
                good.append(json.loads(line))
    return good, bad


def test_an_independent_reader_recovers_the_truth(log: TrafficTruth) -> None:
    good, bad = read(log)
    assert bad == set(log.rejected)
    assert len(good) + len(bad) == log.lines
    once = {e["event_id"]: e for e in good}
    assert len(once) == log.events
    assert len(good) - len(once) == log.duplicates > 100
    messages: dict[str, dict[str, dict[str, Any]]] = {}
    for event in once.values():
        if event["type"] == "message":
            messages.setdefault(event["conversation_id"], {})[event["message_id"]] = event
    assert set(messages) == set(log.conversations)
    for name, conversation in log.conversations.items():
        sent = sorted(messages[name].values(), key=lambda e: e["at"])
        assert [(e["message_id"], e["role"], e["content"]) for e in sent] == [
            (t.message_id, t.role, t.content) for t in conversation.turns
        ]
    felt = Counter(e["reaction"] for e in once.values() if e["type"] == "reaction")
    turns = [t for c in log.conversations.values() for t in c.turns]
    assert felt == {r: sum(getattr(t, r) for t in turns) for r in schemas.REACTIONS}
    assert sum(e["type"] == "feedback" for e in once.values()) == sum(t.feedback is not None for t in turns) > 0
    assert sum(e["type"] == "regenerate" for e in once.values()) == sum(t.regenerated for t in turns) > 0
    for event in once.values():
        if event["type"] != "message":
            target = messages[event["conversation_id"]][event["message_id"]]
            assert target["role"] == "assistant"
            assert target["at"] < event["at"]


def test_every_fault_occurs(log: TrafficTruth) -> None:
    kinds = Counter(log.rejected.values())
    assert set(kinds) == {*fault._DAMAGE, "unknown_type"}
    good, _ = read(log)
    arrived_day = [path.name[7:17] for path in log.files for line in lines_of(path) if not problem(line)]
    late = sum(e["at"][:10] < day for e, day in zip(good, arrived_day, strict=True))
    assert late > 50
    assert sum(a["at"] > b["at"] for a, b in itertools.pairwise(good)) > 500


def test_same_seed_same_bytes_and_no_faults_means_none(tmp_path: Path) -> None:
    one, two, other = (
        write_event_log(tmp_path / name, users=15, days=3, seed=seed, start=START, faults=fault.NONE)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert [p.read_bytes() for p in one.files] == [p.read_bytes() for p in two.files]
    assert [p.read_bytes() for p in one.files] != [p.read_bytes() for p in other.files]
    assert one.lines == one.events
    assert not one.rejected
    assert one.duplicates == 0


def test_continuation_follows_the_latent_probability(log: TrafficTruth) -> None:
    judged = [
        (t.p_continue, t.continued)
        for c in log.conversations.values()
        for t in c.turns
        if t.p_continue is not None and not t.regenerated and len(c.turns) < 60
    ]
    expected, variance = sum(p for p, _ in judged), sum(p * (1 - p) for p, _ in judged)
    assert len(judged) > 2000
    assert abs(sum(c for _, c in judged) - expected) / math.sqrt(variance) < 4
    by_decile = [[c for p, c in judged if lo <= p < lo + 0.2] for lo in (0.2, 0.4, 0.6, 0.8)]
    rates = [sum(x) / len(x) for x in by_decile]
    assert rates == sorted(rates)
    for c in log.conversations.values():
        for turn, after in itertools.pairwise(c.turns):
            if turn.role == "assistant" and not turn.regenerated:
                assert turn.continued == (after.at - turn.at <= dt.timedelta(minutes=10))


def test_the_better_policy_holds_users_longer(log: TrafficTruth) -> None:
    p = {"v1": [], "v2": []}  # type: dict[str, list[float]]
    for c in log.conversations.values():
        p[c.model_version] += [t.p_continue for t in c.turns if t.p_continue]
    assert sum(p["v2"]) / len(p["v2"]) > sum(p["v1"]) / len(p["v1"]) + 0.03


def test_identifiers_are_where_the_truth_says_and_well_formed(log: TrafficTruth) -> None:
    by_id = {t.message_id: t.content for c in log.conversations.values() for t in c.turns}
    assert {p.kind for p in log.planted} == set(KINDS)
    for planted in log.planted:
        assert planted.value in by_id[planted.message_id]
        plain = "".join(filter(str.isalnum, planted.value))
        if planted.kind == "card":
            digits = [int(d) for d in reversed(plain)]
            assert (sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0
        if planted.kind == "iban":
            moved = plain[4:] + plain[:4]
            assert int("".join(str(int(ch, 36)) for ch in moved)) % 97 == 1
    clean = [c for c in log.conversations.values() if not c.planted]
    assert not any("canary." in t.content for c in clean for t in c.turns)


def test_traffic_is_skewed_varied_and_repeats_itself(log: TrafficTruth) -> None:
    conversations = list(log.conversations.values())
    popularity = Counter(c.character.character_id for c in conversations).most_common()
    assert popularity[0][1] > 0.15 * len(conversations)
    assert len(popularity) > 30
    assert {c.language for c in conversations} == {"en", "es", "hi", "hi-Latn", "pt", "fr"}
    by_id = {t.message_id: t.content for c in conversations for t in c.turns}
    copies = [c for c in conversations if c.near_duplicate_of]
    assert len(copies) > 20
    for copy in copies:
        original = set(by_id[str(copy.near_duplicate_of)].casefold().split())
        assert len(original & set(copy.turns[0].content.casefold().split())) >= len(original) // 2
    openings = Counter(c.turns[0].content for c in conversations)
    assert len(openings) > 0.85 * len(conversations)
    assert {c.unsafe for c in conversations} == {None, "violence", "self_harm", "harassment", "illicit"}
    assert sum(log.activity.values()) == sum(t.role == "user" for c in conversations for t in c.turns)


def test_any_policy_can_answer_in_batches(tmp_path: Path) -> None:
    sizes: list[int] = []

    def dull(contexts: Any) -> list[str]:
        batch: list[Context] = list(contexts)
        sizes.append(len(batch))
        assert all(c.turns[-1].role == "user" for c in batch)
        return ["I am a language model."] * len(batch)

    def run(policies: Any) -> float:
        truth = write_event_log(tmp_path / "log", users=40, days=2, seed=2, start=START, policies=policies)
        turns = [t for c in truth.conversations.values() for t in c.turns if t.p_continue is not None]
        return sum(t.p_continue or 0.0 for t in turns) / len(turns)

    assert run({"dull": dull}) < run(None) - 0.2
    assert max(sizes) > 50


def test_personas_are_many_distinct_and_fit_the_schema() -> None:
    characters = demo_characters()
    assert len(characters) >= 40
    for field in ("character_id", "name", "greeting", "instructions", "description"):
        assert len({getattr(c, field) for c in characters}) == len(characters), field
    for c in characters:
        ids.name(c.character_id, "character")
        assert len(c.topics) == len(set(c.topics)) == 8
        assert c.intents
        assert c.review_status == "approved"
    assert character_table(characters).schema == schemas.CHARACTER


def test_nothing_that_ships_imports_the_simulation() -> None:
    """Only the demo may: a stage that could see the truth would prove nothing."""
    package = Path(flywheel_tasks.__file__).parent
    importers = set()
    for path in package.rglob("*.py"):
        if path.parent.name == "simulation":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            if any(n.startswith("flywheel_tasks.simulation") for n in names):
                importers.add(path.relative_to(package).as_posix())
    assert importers <= {"demo.py", "demo_week.py"}


def test_regular_people_come_as_often_as_their_rate_says(tmp_path: Path) -> None:
    people = steady(make_users(40, 3), 0.5)
    mix = Mix(identifiers=0, regular=True)
    truth = write_event_log(tmp_path, people=people, days=7, seed=2, start=START, mix=mix)
    visits = Counter(conversation.user.user_id for conversation in truth.conversations.values())
    assert set(visits.values()) == {3, 4}
    assert len(visits) == 40
