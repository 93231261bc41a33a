"""Ingest against the truth of simulated traffic: every event is either in a conversation or in quarantine."""

from __future__ import annotations

import datetime as dt
import gzip
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from flywheel_tasks import pipeline
from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.runner import Result, run_stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.curation import spill
from flywheel_tasks.curation.ingest import STAGE
from flywheel_tasks.simulation.faults import Faults
from flywheel_tasks.simulation.traffic import TrafficTruth, write_event_log
from tests.conftest import USER_KEY

CYCLE = "2026-W47"
GOOD = (
    b'{"event_id": "0", "type": "message", "conversation_id": "c", "message_id": "m", "user_id": "u", "role": "user", '
    b'"character_id": "maya", "content": "hi", "at": "2026-11-16T09:30:00Z", "source": "production"}\n'
)
FAULTS = Faults(duplicate=0.05, late=0.05, reordered=0.1, malformed=0.03, unknown_type=0.01)


def ingest(folder: Path, logs: str, *overrides: str, cycle: str = CYCLE) -> Result:
    settings = [
        f"ingest.logs={logs}",
        f"store.uri={folder}/store",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        *overrides,
    ]
    config = pipeline.load_config("test", overrides=settings)
    return run_stage(STAGE, cycle, config, Store(config.store.uri))


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrafficTruth]:
    folder = tmp_path_factory.mktemp("traffic")
    start = dt.date(2026, 11, 9)
    return folder, write_event_log(folder, users=60, days=6, seed=3, start=start, faults=FAULTS)


@pytest.fixture(scope="module")
def made(traffic: tuple[Path, TrafficTruth], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("ingested")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ids.USER_KEY_VARIABLE, USER_KEY)
        return ingest(folder, f"{traffic[0]}/events-*").artifact


def conversations(artifact: Artifact) -> dict[str, dict]:
    return {row["conversation_id"]: row for row in artifact.table("conversations").read().to_pylist()}


def expected_id(truth_id: str, truth: TrafficTruth) -> str:
    secret, conversation = USER_KEY.encode(), truth.conversations[truth_id]
    user = ids.pseudonym(conversation.user.user_id, secret)
    return ids.pseudonym(f"{user}/{conversation.character.character_id}/{truth_id}", secret)


def test_every_conversation_is_recovered_turn_by_turn(traffic: tuple[Path, TrafficTruth], made: Artifact) -> None:
    truth, found = traffic[1], conversations(made)
    assert len(found) == len(truth.conversations) > 200
    for truth_id, expected in truth.conversations.items():
        row = found[expected_id(truth_id, truth)]
        assert [(t["role"], t["content"], t["at"]) for t in row["turns"]] == [
            (t.role, t.content, t.at) for t in expected.turns
        ]
        assert (row["source"], row["locale"], row["model_version"]) == (
            expected.source,
            expected.user.locale,
            expected.model_version,
        )


def test_signals_are_on_the_response_they_are_about(traffic: tuple[Path, TrafficTruth], made: Artifact) -> None:
    truth, found = traffic[1], conversations(made)
    seen: Counter[str] = Counter()
    for truth_id, expected in truth.conversations.items():
        for turn, true in zip(found[expected_id(truth_id, truth)]["turns"], expected.turns, strict=True):
            if true.role == "user":
                assert turn["signals"] is None
                continue
            given = set(true.signals_at)
            got = {name for name in ("love", "thumb_up", "thumb_down") if turn["signals"][name]}
            got |= {"feedback"} if turn["signals"]["feedback"] is not None else set()
            got |= {"regenerate"} if turn["signals"]["regenerated"] else set()
            assert got == given
            assert turn["signals"]["feedback"] == true.feedback
            seen.update(given)
    assert set(seen) == {"love", "thumb_up", "thumb_down", "feedback", "regenerate"}


def test_continue_means_the_user_wrote_again_within_ten_minutes(
    traffic: tuple[Path, TrafficTruth], made: Artifact
) -> None:
    truth, found = traffic[1], conversations(made)
    end = max(t.at for c in truth.conversations.values() for t in c.turns)
    labels: Counter[bool | None] = Counter()
    for truth_id, expected in truth.conversations.items():
        turns = expected.turns
        for index, turn in enumerate(found[expected_id(truth_id, truth)]["turns"]):
            if turn["role"] == "user":
                continue
            waits = [t.at - turns[index].at for t in turns[index + 1 :] if t.role == "user"]
            continued = bool(waits) and waits[0] <= dt.timedelta(minutes=10)
            unknown = not waits and end - turns[index].at < dt.timedelta(minutes=10)
            if not unknown:
                assert turn["signals"]["continued"] is continued
            labels[turn["signals"]["continued"]] += 1
    assert labels[True] > 100
    assert labels[False] > 100


def test_every_bad_line_is_in_quarantine_with_its_file_line_and_reason(
    traffic: tuple[Path, TrafficTruth], made: Artifact
) -> None:
    truth = traffic[1]
    quarantine = made.table("quarantine").read().to_pylist()
    repeats = [row for row in quarantine if row["reason"] == "duplicate event_id"]
    others = {row["where"]: row for row in quarantine if row["reason"] != "duplicate event_id"}
    assert len(repeats) == truth.duplicates > 50
    assert set(others) == {f"{name}:{line}" for name, line in truth.rejected}
    assert {
        kind: {others[f"{n}:{i}"]["reason"] for (n, i), k in truth.rejected.items() if k == kind}
        for kind in set(truth.rejected.values())
    }["unknown_type"] == {"type: not a legal value"}
    rows = made.manifest.rows
    assert rows is not None
    assert (rows.rows_in, rows.rows_out) == (truth.lines, truth.events)


def test_activity_counts_each_users_sends_per_day(traffic: tuple[Path, TrafficTruth], made: Artifact) -> None:
    expected = {(ids.pseudonym(user, USER_KEY.encode()), day): n for (user, day), n in traffic[1].activity.items()}
    rows = made.table("activity").read().to_pylist()
    assert {(r["unit_id"], r["day"]): r["sends"] for r in rows} == expected


def test_no_raw_user_id_is_stored_and_the_key_is_nowhere(traffic: tuple[Path, TrafficTruth], made: Artifact) -> None:
    tables = [made.table(name).read() for name in ("conversations", "activity", "quarantine")]
    text = str([table.to_pylist() for table in tables])
    users = {c.user.user_id for c in traffic[1].conversations.values()}
    assert not [user for user in users if user in text]
    root = Path(made.storage.root)
    assert not [p for p in root.rglob("*") if p.is_file() and USER_KEY.encode() in p.read_bytes()]


def test_a_conversation_is_on_one_side_in_every_cycle(
    traffic: tuple[Path, TrafficTruth], made: Artifact, tmp_path: Path, user_key: bytes
) -> None:
    first = {c: row["split"] for c, row in conversations(made).items()}
    assert {"train", "eval"} == set(first.values())
    share = Counter(first.values())["eval"] / len(first)
    assert 0.05 < share < 0.16
    part = ingest(tmp_path, f"{traffic[0]}/events-2026-11-1*", cycle="2026-W48").artifact
    for conversation, row in conversations(part).items():
        assert row["split"] == first.get(conversation, row["split"])


@pytest.mark.parametrize(
    "overrides", [("ingest.chunk_bytes=20000",), ("ingest.bucket_bytes=40000", "ingest.chunk_bytes=50000")]
)
def test_chunks_and_buckets_change_no_row(
    made: Artifact, traffic: tuple[Path, TrafficTruth], tmp_path: Path, user_key: bytes, overrides: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("flywheel_tasks.compute.session.cpus", lambda: 1)
    other = ingest(tmp_path, f"{traffic[0]}/events-*", *overrides).artifact
    assert conversations(other) == conversations(made)
    for name, order in (("activity", ("unit_id", "day")), ("quarantine", ("where", "reason"))):
        one, two = (
            sorted(a.table(name).read().to_pylist(), key=lambda r: [str(r[k]) for k in order]) for a in (made, other)
        )
        assert one == two
    assert other.manifest.rows == made.manifest.rows


@pytest.mark.slow
def test_ray_gives_the_same_bytes_as_this_process(
    traffic: tuple[Path, TrafficTruth], tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flywheel_tasks.curation.ingest._WORTH_SHARING", 0)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # workers of a Ray that other tests started know nothing of this test's key
    small = ("ingest.bucket_bytes=100000", "ingest.chunk_bytes=200000")
    through_ray = ingest(tmp_path / "ray", f"{traffic[0]}/events-*", *small).artifact.manifest
    import ray

    assert ray.is_initialized()
    ray.shutdown()
    monkeypatch.setattr("flywheel_tasks.compute.session.cpus", lambda: 1)
    here = ingest(tmp_path / "here", f"{traffic[0]}/events-*", *small).artifact.manifest
    assert (through_ray.key, through_ray.digest) == (here.key, here.digest)


def test_a_forgotten_user_cannot_come_back_through_the_logs(
    traffic: tuple[Path, TrafficTruth], tmp_path: Path, user_key: bytes
) -> None:
    first = ingest(tmp_path, f"{traffic[0]}/events-*").artifact
    user = next(iter(traffic[1].conversations.values())).user.user_id
    pseudonym = ids.pseudonym(user, user_key)
    assert forget(Store(first.storage.uri), user, user_key)["clean"]
    again = ingest(tmp_path, f"{traffic[0]}/events-*", "ingest.continue_minutes=11").artifact
    assert pseudonym not in again.table("conversations").read(["user"])["user"].to_pylist()
    assert pseudonym not in again.table("activity").read(["unit_id"])["unit_id"].to_pylist()
    quarantine = again.table("quarantine").read().to_pylist()
    gone = [row for row in quarantine if row["reason"] == "forgotten"]
    assert gone
    assert all(row["user"] is None for row in gone)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("log.csv", b"a,b\n", "not a log file"),
        ("log.jsonl.gz", b"not gzip", "cannot be read to its end"),
        ("log.jsonl.zst", b"not zstd", "cannot be read to its end"),
        ("log.parquet", b"not parquet", "not a readable Parquet file"),
    ],
)
def test_a_file_that_is_no_log_is_named(
    tmp_path: Path, user_key: bytes, name: str, content: bytes, problem: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as refusal:
        ingest(tmp_path, f"{tmp_path}/{name}")
    assert name in str(refusal.value)


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("missing", [3, 2000])
def test_a_log_cut_short_is_refused_rather_than_half_read(
    tmp_path: Path, user_key: bytes, kind: str, missing: int
) -> None:
    text = b"".join(b'{"event_id": "%d"}\n' % (n * 7919 % 10007) for n in range(10_000))
    whole = gzip.compress(text) if kind == "gz" else zstandard.ZstdCompressor().compress(text)
    (tmp_path / f"log.jsonl.{kind}").write_bytes(whole[:-missing])
    with pytest.raises(InputError, match="cannot be read to its end"):
        ingest(tmp_path, f"{tmp_path}/log.jsonl.{kind}")


def test_a_log_of_several_frames_is_read_to_its_end(tmp_path: Path, user_key: bytes) -> None:
    frame = zstandard.ZstdCompressor().compress(b'{"event_id": "1"}\n')
    (tmp_path / "log.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(GOOD) + frame * 3)
    rows = ingest(tmp_path, f"{tmp_path}/log.jsonl.zst").artifact.manifest.rows
    assert rows is not None
    assert rows.rows_rejected == 3


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_one_overlong_line_costs_that_line_alone(tmp_path: Path, user_key: bytes, suffix: str) -> None:
    text = GOOD + b'{"event_id": "' + b"x" * 6_000_000 + b'"}\n' + b'{"event_id": "1"}\n' * 500
    data = gzip.compress(text) if suffix.endswith("gz") else text
    (tmp_path / f"log.{suffix}").write_bytes(data)
    rows = ingest(tmp_path, f"{tmp_path}/log.{suffix}", "ingest.longest_line=1024").artifact.manifest.rows
    assert rows is not None
    assert rows.reasons == {"line longer than 1024 bytes": 1, "missing type": 500}


def test_a_log_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(GOOD)
    real = spill.parse_chunks

    def parse(task: spill.ParseTask) -> list[spill.Parsed]:
        with log.open("ab") as stream:
            stream.write(b'{"event_id": "2"}\n')
        return real(task)

    monkeypatch.setattr(spill, "parse_chunks", parse)
    with pytest.raises(InputError, match="changed while it was read"):
        ingest(tmp_path, str(log))


def test_no_logs_and_no_matching_logs_say_what_to_set(tmp_path: Path, user_key: bytes) -> None:
    with pytest.raises(ConfigError, match=r"ingest\.logs is empty"):
        ingest(tmp_path, "[]")
    with pytest.raises(InputError, match="no file matches"):
        ingest(tmp_path, f"{tmp_path}/*.jsonl")


@pytest.mark.parametrize(
    ("log", "said"),
    [(b"\n\n", "there is no event in log.jsonl"), (b"{}\nno json\n", "of 2 events none was accepted")],
)
def test_logs_without_one_good_event_are_the_wrong_files(
    tmp_path: Path, user_key: bytes, log: bytes, said: str
) -> None:
    (tmp_path / "log.jsonl").write_bytes(log)
    with pytest.raises(InputError, match=said):
        ingest(tmp_path, f"{tmp_path}/log.jsonl")


def test_a_parquet_log_means_the_same_as_its_lines(
    traffic: tuple[Path, TrafficTruth], tmp_path: Path, user_key: bytes
) -> None:
    import orjson
    import pyarrow.parquet as pq

    path = next(p for p in traffic[1].files if p.name.endswith(".jsonl"))
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict) and all(isinstance(v, str | None) for v in row.values()):
            rows.append(row)
    names = sorted({key for row in rows for key in row})
    pq.write_table(pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows]), tmp_path / "log.parquet")
    (tmp_path / "log.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    one, other = (ingest(tmp_path / kind, f"{tmp_path}/log.{kind}").artifact for kind in ("parquet", "jsonl"))
    assert conversations(one) == conversations(other)


def test_a_parquet_log_with_nanoseconds_bytes_and_categories_is_read_as_text(tmp_path: Path, user_key: bytes) -> None:
    import pyarrow.parquet as pq

    at = pa.array([1_763_300_000_000_000_001], pa.timestamp("ns", tz="UTC"))
    columns = {"event_id": "e", "type": "message", "conversation_id": "c", "message_id": "m", "character_id": "x"}
    table = pa.table(
        {name: [value] for name, value in columns.items()} | {"role": ["user"], "content": ["hi"], "at": at}
    )
    table = table.append_column("user_id", pa.array([b"u1"], pa.binary()))
    table = table.set_column(5, "role", table["role"].dictionary_encode())
    pq.write_table(table, tmp_path / "log.parquet")
    made = ingest(tmp_path, f"{tmp_path}/log.parquet").artifact.table("conversations").read()
    assert made["user"].to_pylist() == [ids.pseudonym("u1", user_key)]


def test_an_impossible_year_is_refused_whatever_stands_beside_it(tmp_path: Path, user_key: bytes) -> None:
    import json

    base = {
        "type": "message",
        "conversation_id": "c",
        "user_id": "u",
        "character_id": "x",
        "role": "user",
        "content": "hi",
    }
    times = ["2026-11-16T09:00:00Z", "9999-12-31T23:59:59-12:00", "0000-01-01T00:00:00Z"]
    lines = [json.dumps(base | {"event_id": str(n), "message_id": str(n), "at": at}) for n, at in enumerate(times)]
    for name, chosen in {"together": lines, "apart": [*lines, lines[0].replace("2026-11-16", "soon")]}.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.jsonl").write_text("\n".join(chosen))
        rows = ingest(folder, f"{folder}/log.jsonl").artifact.manifest.rows
        assert rows is not None
        assert rows.rows_out == 1
