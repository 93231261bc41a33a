"""The raw `event` log of simulated traffic, exactly as production would write it, and the truth behind it.

One JSON object a line. A `message` carries role and content; a `reaction` names the assistant message it is on in
`message_id`; `feedback` does too, with the user's words as content; `regenerate` names the assistant message that was
thrown away, and its replacement follows as a `message` of its own. Times are ISO 8601 in UTC.
"""

from __future__ import annotations

import datetime as dt
import gzip
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from flywheel_tasks.simulation import faults as fault
from flywheel_tasks.simulation.characters import Character, demo_characters
from flywheel_tasks.simulation.chat import Mix, TrueConversation, chat
from flywheel_tasks.simulation.faults import Faults
from flywheel_tasks.simulation.language import Policy, scripted_policy
from flywheel_tasks.simulation.plants import Planted
from flywheel_tasks.simulation.users import SimulatedUser, make_users

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass
class TrafficTruth:
    """What a perfect reader would recover. For tests and benchmarks only: no stage ever sees it."""

    conversations: dict[str, TrueConversation] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    lines: int = 0
    events: int = 0
    duplicates: int = 0
    rejected: dict[tuple[str, int], str] = field(default_factory=dict)
    """(file name, line number from 1) of every line that is no event, and what is wrong with it."""

    @property
    def planted(self) -> list[Planted]:
        return [p for c in self.conversations.values() for p in c.planted]

    @property
    def messages(self) -> int:
        return sum(len(c.turns) for c in self.conversations.values())

    @property
    def activity(self) -> Counter[tuple[str, dt.date]]:
        """Messages each user sent on each UTC day."""
        sent: Counter[tuple[str, dt.date]] = Counter()
        for c in self.conversations.values():
            sent.update((c.user.user_id, t.at.date()) for t in c.turns if t.role == "user")
        return sent


def write_event_log(
    directory: str | Path,
    *,
    users: int = 0,
    people: Sequence[SimulatedUser] = (),
    days: int,
    seed: int,
    start: dt.date,
    faults: Faults | None = None,
    mix: Mix | None = None,
    policies: Mapping[str, Policy] | None = None,
    characters: tuple[Character, ...] | None = None,
    endings: tuple[str, ...] = ENDINGS,
    version_of: Mapping[str, str] | None = None,
) -> TrafficTruth:
    """Simulate `users` new people, or those given, for `days` days and write one log file a day of arrival, as
    `endings` say. `version_of` tells which policy each of them is served (default: chance, by conversation)."""
    faults = Faults() if faults is None else faults
    policies = policies or {"v1": scripted_policy(0.45), "v2": scripted_policy(0.65)}
    held = chat(
        list(people) or make_users(users, seed), characters or demo_characters(), policies, start=start, days=days,
        seed=seed, mix=mix, version_of=version_of,
    )  # fmt: skip
    truth = TrafficTruth(conversations={c.conversation_id: c for c in held})
    lines = sorted(_lines(held, truth, faults, np.random.default_rng([seed, 4])), key=lambda line: line[0])
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(days):
        first = dt.datetime.combine(start + dt.timedelta(days=day), dt.time(), dt.UTC)
        last_file = day == days - 1
        here = [x for x in lines if x[0] >= first and (last_file or x[0] < first + dt.timedelta(days=1))]
        path = folder / f"events-{first:%Y-%m-%d}{endings[day % len(endings)]}"
        _write(path, b"".join(line + b"\n" for _, line, _ in here))
        truth.files.append(path)
        truth.rejected |= {(path.name, n): problem for n, (_, _, problem) in enumerate(here, 1) if problem}
        truth.lines += len(here)
    return truth


def events_of(conversation: TrueConversation) -> Iterator[tuple[dt.datetime, dict[str, Any]]]:
    """Every event of a conversation, in the order in which it happened within each message."""
    c = conversation
    for turn in c.turns:
        base = {"conversation_id": c.conversation_id, "message_id": turn.message_id, "user_id": c.user.user_id,
                "character_id": c.character.character_id}  # fmt: skip
        tail = {"model_version": c.model_version, "locale": c.user.locale, "source": c.source}
        message = {"event_id": f"{turn.message_id}-e0", "type": "message", **base, "role": turn.role}
        yield turn.at, message | {"content": turn.content, "at": _iso(turn.at), **tail}
        for number, (signal, at) in enumerate(turn.signals_at.items(), 1):
            event: dict[str, Any] = {"event_id": f"{turn.message_id}-e{number}", **base}
            if signal in ("feedback", "regenerate"):
                event["type"] = signal
                if signal == "feedback":
                    event["content"] = turn.feedback
            else:
                event |= {"type": "reaction", "reaction": signal}
            yield at, event | {"at": _iso(at), **tail}


def _lines(
    held: list[TrueConversation], truth: TrafficTruth, faults: Faults, rng: np.random.Generator
) -> Iterator[tuple[dt.datetime, bytes, str | None]]:
    """(arrival, line, what is wrong with it or None)."""
    for conversation in held:
        for at, event in events_of(conversation):
            truth.events += 1
            seen = fault.arrival(rng, at, faults)
            yield seen, fault.encode(event), None
            draws = rng.random(3)
            if draws[0] < faults.duplicate:
                truth.duplicates += 1
                again = fault.retried(event) if rng.random() < 0.5 else fault.encode(event)
                yield fault.arrival(rng, seen, faults), again, None
            if draws[1] < faults.malformed:
                kind, line = fault.malformed(rng, event, truth.events)
                yield seen, line, kind
            if draws[2] < faults.unknown_type:
                yield seen, fault.unknown_type(event, truth.events), "unknown_type"


def _iso(at: dt.datetime) -> str:
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _write(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=6, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor(level=3).compress(data)
    path.write_bytes(data)
