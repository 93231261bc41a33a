"""Large event logs for benchmarks: the events of `traffic` with simple text, assembled column by column in Arrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.simulation.characters import demo_characters
from flywheel_tasks.simulation.language import phrases

_BLOCK = 200_000
_MESSAGES_PER_CONVERSATION = 8.0
_REACTIONS = np.array(["love", "thumb_up", "thumb_down"])
_LOCALES = np.array(["en_US", "es_MX", "hi_IN", "pt_BR"])


@dataclass(frozen=True)
class BulkTruth:
    lines: int
    events: int
    messages: int
    reactions: int
    conversations: int
    duplicates: int
    malformed: int


def write_benchmark_log(
    path: str | Path,
    events: int,
    seed: int,
    *,
    duplicates: float = 0.01,
    malformed: float = 1e-4,
    reacting: float = 0.15,
    start: str = "2026-11-16",
) -> BulkTruth:
    """Write a log of exactly `events` distinct events (.jsonl, .jsonl.gz or .jsonl.zst). Conversations interleave in
    time, repeated events follow half a minute late, malformed lines come on top. Memory does not grow with `events`."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("lines", "events", "messages", "reactions", "conversations", "duplicates", "malformed"), 0)
    weights = 1.0 / np.arange(1, len(demo_characters()) + 1)
    users = max(10, events // 60)
    with _sink(Path(path)) as sink:
        while counts["events"] < events:
            want = min(_BLOCK, events - counts["events"])
            block = _block(rng, want, counts["conversations"], users, weights / weights.sum(), reacting, start)
            again = np.flatnonzero(rng.random(want) < duplicates)
            seen = np.concatenate([block["at"], block["at"][again] + 30_000])
            order = np.concatenate([np.arange(want), again])[np.argsort(seen, kind="stable")]
            lines = _json_lines({name: column[order] for name, column in block.items()})
            sink.write(lines.buffers()[2])
            bad = np.flatnonzero(rng.random(want) < malformed)
            sink.write(b"".join(line[:25].encode() + b"\n" for line in lines.take(pa.array(bad)).to_pylist()))
            messages = int((block["reaction"] < 0).sum())
            for name, n in {
                "lines": len(lines) + len(bad), "events": want, "messages": messages, "reactions": want - messages,
                "conversations": int(block["conversation"][-1]) + 1 - counts["conversations"],
                "duplicates": len(again), "malformed": len(bad),
            }.items():  # fmt: skip
                counts[name] += n
    return BulkTruth(**counts)


def _block(
    rng: np.random.Generator, events: int, first: int, users: int, popularity: np.ndarray, reacting: float, start: str
) -> dict[str, np.ndarray]:
    """Numbers that describe `events` events of whole conversations; the last conversation may be cut short."""
    length = rng.geometric(1 / _MESSAGES_PER_CONVERSATION, events) + 1
    conversations = int(np.searchsorted(np.cumsum(length), events)) + 1
    length = length[:conversations]
    number = np.repeat(np.arange(conversations), length)
    message = np.arange(len(number)) - np.repeat(np.cumsum(length) - length, length)
    reacted = (message % 2 == 1) & (rng.random(len(number)) < reacting)
    # Each message once, and once more, as the reaction to it, where there is one.
    source = np.repeat(np.arange(len(number)), 1 + reacted)[:events]
    reacts = np.diff(source, prepend=-1) == 0
    number, message = number[source], message[source]
    conversations = int(number[-1]) + 1
    place = np.arange(events) - np.searchsorted(number, number)
    opened = np.sort(rng.integers(0, events * 400, conversations)) + first * 3200
    since = np.datetime64(start, "ms").astype(np.int64)
    millis = since + opened[number] + place * 20_000 + rng.integers(0, 9000, events)
    return {
        "conversation": number + first,
        "message": message,
        "event": place,
        "at": millis,
        "user": (users * rng.random(conversations) ** 3).astype(np.int64)[number],
        "character": rng.choice(len(popularity), conversations, p=popularity)[number],
        "locale": rng.integers(0, len(_LOCALES), conversations)[number],
        "reaction": np.where(reacts, rng.choice(3, events, p=(0.3, 0.6, 0.1)), -1),
        "text": rng.integers(0, 2**31, (events, 3)),
    }


def _json_lines(block: dict[str, np.ndarray]) -> pa.Array:
    def number(name: str) -> pa.Array:
        return pa.array(block[name]).cast(pa.string())

    def word(options: np.ndarray, index: np.ndarray) -> pa.Array:
        return pa.array(options).take(pa.array(index))

    openers, middles, ends = _fragments()
    reaction = block["reaction"] >= 0
    ids = np.array([c.character_id for c in demo_characters()])
    conversation, message = number("conversation"), number("message")
    head = _join('{"event_id":"e', conversation, "-", number("event"), '","type":"')
    who = _join('","conversation_id":"c', conversation, '","message_id":"c', conversation, "-m", message,
                '","user_id":"user-', number("user"), '","character_id":"', word(ids, block["character"]))  # fmt: skip
    role = word(np.array(["user", "assistant"]), block["message"] % 2)
    said = _join('","role":"', role, '","content":"', *(
        word(part, block["text"][:, i] % len(part)) for i, part in enumerate((openers, middles, ends))
    ))  # fmt: skip
    felt = _join('","reaction":"', word(_REACTIONS, np.maximum(block["reaction"], 0)))
    time = pc.replace_substring(pa.array(block["at"]).cast(pa.timestamp("ms", "UTC")).cast(pa.string()), " ", "T")
    tail = _join('","at":"', time, '","model_version":"v', pa.array(block["conversation"] % 2).cast(pa.string()),
                 '","locale":"', word(_LOCALES, block["locale"]), '","source":"production"}\n')  # fmt: skip
    is_reaction = pa.array(reaction)
    return _join(head, pc.if_else(is_reaction, "reaction", "message"), who, pc.if_else(is_reaction, felt, said), tail)


def _join(*parts: Any) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def _fragments() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of sentences: some ten million different messages."""
    lists = phrases("en")
    starts = ("so", "hey,", "ok but", "honestly", "wait,", "you know,", "well", "listen,", "haha")
    openers = [f"{s} {p} " for s in starts for p in lists["person"]]
    middles = [f"took the {t} {p} " for t in lists["thing"] for p in lists["place"]]
    ends = [f"and now I feel {f} {t}" for f in lists["feeling"] for t in lists["time"]]
    return np.array(openers), np.array(middles), np.array(ends)


@contextmanager
def _sink(path: Path) -> Iterator[Any]:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as raw:
        if codec is None:
            yield raw
        else:
            with pa.CompressedOutputStream(raw, codec) as stream:
                yield stream
