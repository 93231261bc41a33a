"""Where words may not go: hostile ones into no page and no shell, identifiers into nothing after the filter, those of
forgotten users nowhere."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from flywheel_tasks.core import ids, lineage, quarantine, schemas
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.store import Store
from flywheel_tasks.simulation import faults
from flywheel_tasks.simulation.chat import Mix
from flywheel_tasks.simulation.traffic import TrafficTruth, write_event_log
from tests.conftest import ROOT, USER_KEY
from tests.drills import poison, small_cycle
from tests.drills.lived import LEARNER, Lived, word_of

CANARIES, FORGOTTEN = 1000, 100
CURATED = ("ingest", "filter", "diversify", "constrain")


def test_the_poison_drill_sees_a_mark_wherever_it_may_not_be() -> None:
    said = poison.attack(2, "locale", "")
    assert poison.marks(html.escape(said)) == {(2, "locale")}
    table = "artifacts/constrain/key/attempt/prompts/rows-00000.parquet"
    report = "artifacts/constrain/key/attempt/report/report.json"
    words = poison.attack(2, "content", "")
    assert poison.leaks([(table, words)]) == {}
    assert poison.leaks([(table, said), (report, words), ("tracking/2026-W47", said)]) == {
        "locale in constrain/prompts": 1, "content in constrain/report": 1, "locale in tracking/": 1,
    }  # fmt: skip


def test_a_poisoned_log_reaches_no_page_unescaped_and_no_shell(
    tmp_path: Path, user_key: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    pwned = tmp_path / "pwned"
    write_event_log(tmp_path / "logs", users=10, days=7, seed=6, start=small_cycle.MONDAY, faults=faults.NONE)
    lines = poison.write(tmp_path / "logs" / "evil.jsonl", pwned)
    made = small_cycle.run_all(tmp_path, str(tmp_path / "logs" / "*"))
    ingested = made["ingest"].manifest.rows
    assert ingested
    assert ingested.rows_in == ingested.rows_out + ingested.rows_rejected
    files = list(small_cycle.texts(Store(made["ingest"].storage.uri)))
    there, leaks = {mark for _, text in files for mark in poison.marks(text)}, poison.leaks(files)
    answers = poisoned_page(tmp_path, made, pwned)
    said = cli(tmp_path, "status", "--cycle", small_cycle.CYCLE)
    said += cli(tmp_path, "lineage", "--user", poison.attack(0, "user_id", pwned))
    said += "".join(cli(tmp_path, "show", f"{name}/{artifact.manifest.key}") for name, artifact in made.items())
    with capsys.disabled():
        print(
            f"\n  {lines} poisoned lines, {len(poison.ATTACKS)} attacks in each of {len(poison.FIELDS)} fields: "
            f"{len(there)} marks are there, {sum(leaks.values())} where they may not be, in {len(files)} files; "
            f"{answers} on a page, all escaped; no shell"
        )
    assert leaks == {}
    assert there == {(n, field) for n in range(len(poison.ATTACKS)) for field in poison.WORDS}, "words stay words"
    for stage in ("filter", "diversify", "constrain"):
        prompts = "\n".join(small_cycle.strings(made[stage].table("prompts").read()))
        assert "content" in {field for _, field in poison.marks(prompts)}, f"some got as far as {stage}"
    assert "\x1b" not in said
    assert poison.marks(said) == set()
    assert not pwned.exists()


def poisoned_page(folder: Path, made: dict[str, Any], pwned: Path) -> int:
    """The page of the week with poisoned conversations side by side on it, and an attack in every label beside them;
    returns how many stand there."""
    from flywheel_tasks.evaluation import report
    from flywheel_tasks.evaluation.examples import side_by_side
    from flywheel_tasks.evaluation.history import Version

    conversations = made["ingest"].table("conversations").read().to_pylist()
    mine = [one for one in conversations if poison.marks(one["turns"][-1]["content"])]
    rows = []
    for number, one in enumerate(mine):
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in one["turns"]]
        labels = {name: poison.attack(number, name, pwned) for name in ("character_id", "locale")}
        for policy, value in (("candidate", 0.9), ("champion", 0.1)):
            rows.append({
                "completion_id": f"{policy}-{one['conversation_id']}", "prompt_id": one["conversation_id"],
                "user": one["user"], "split": "eval", "turns": turns[:-1], "text": turns[-1]["content"], "sample": 0,
                "tokens": 1, "finish": "stop", "policy": policy, "scores": [{"name": "pointwise", "value": value}],
                **labels,
            })  # fmt: skip
    scored = pa.Table.from_pylist(rows, schema=schemas.COMPLETION)
    names = [one["conversation_id"] for one in mine]
    sources = pa.table({"prompt_id": names, "source": ["production"] * len(names)})
    examples = side_by_side(scored, sources)
    assert examples
    reasons = tuple(poison.attack(number, "reasons", pwned) for number in range(len(poison.ATTACKS)))
    version = Version(
        small_cycle.CYCLE, decision="BLOCK", reasons=reasons, candidate=poison.attack(0, "candidate", pwned)
    )
    written = report.write([version], report.Page(source="drill", examples=examples), folder / "page")
    text = written[0].read_text()
    found = poison.marks(text)
    assert {"content", "character_id", "locale", "reasons"} <= {field for _, field in found}, "or nothing is proved"
    for unescaped in (poison.UNESCAPED, "<script>alert", "<img src=x", "<svg/onload", "\x1b", "\x00", "\u202e"):
        assert unescaped not in text, unescaped
    return len(found)


def cli(folder: Path, *arguments: str) -> str:
    """Everything that the command prints."""
    environment = os.environ | {ids.USER_KEY_VARIABLE: USER_KEY, "FLYWHEEL_HOME": str(folder / "home")}
    argv = [sys.executable, "-m", "flywheel_tasks.cli", *arguments, "--profile", "test"]
    argv += ["--set", f"store.uri={folder / 'store'}"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_a_thousand_planted_identifiers_are_in_no_artifact_after_the_filter(
    tmp_path: Path, user_key: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    truth: TrafficTruth = write_event_log(
        tmp_path / "logs", users=150, days=7, seed=8, start=small_cycle.MONDAY, faults=faults.NONE,
        mix=Mix(identifiers=0.4, unsafe=0),
    )  # fmt: skip
    canaries = sorted({planted.value for planted in truth.planted})
    assert len(canaries) >= CANARIES
    made = small_cycle.run_all(tmp_path, str(tmp_path / "logs" / "*"), stages=CURATED)
    store = Store(made["ingest"].storage.uri)
    before = "\n".join(text for _, text in small_cycle.texts(store))
    assert sum(value in before for value in canaries) == len(canaries), "they were there to be found"
    files = list(small_cycle.texts(store, without=("ingest",)))
    after = "\n".join(text for _, text in files)
    left = [value for value in canaries if value in after]
    with capsys.disabled():
        print(f"\n  {len(canaries):,} planted identifiers: {len(left)} in {len(files)} files after the filter")
    assert left == []
    assert made["constrain"].manifest.rows
    assert made["constrain"].manifest.rows.rows_out > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_forgotten_users_leave_no_word(
    lived: Lived, user_key: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, stayed = lived.users[:FORGOTTEN], lived.users[FORGOTTEN:]
    assert (len(gone), len(stayed) > 20) == (FORGOTTEN, True)
    store = lived.store
    # What a killed attempt leaves for the next one.
    left = Partial(store.storage, "sft", "0" * 32)
    left.put("chunk-00000", " ".join(map(word_of, lived.users)).encode())
    before = "\n".join(lived.everywhere().values())
    assert all(word_of(user) in before for user in gone)
    models = {
        "/".join(lineage.address(artifact.manifest))
        for artifact in store.artifacts()
        if any(output.contract in schemas.CHECKPOINTS for output in artifact.manifest.outputs.values())
    }
    assert {name.partition("/")[0] for name in models} == {LEARNER}
    for user in gone:
        report = forget(store, user, user_key)
        assert report["clean"], report
        assert set(report["retrain_needed"]) == models, "what learned from this user is named"
    files = lived.everywhere()
    after = "\n".join(files.values())
    names = [ids.pseudonym(user, user_key) for user in gone]
    assert [user for user in gone if word_of(user) in after or user in after] == []
    # A manifest says which pseudonyms were purged from it; nothing else names them.
    data = "\n".join(text for path, text in files.items() if not path.endswith("/manifest.json"))
    assert [name for name in names if name in data] == []
    assert left.names() == []
    assert sum(word_of(user) in after for user in stayed) > len(stayed) // 2, "the others' words stay"
    for artifact in store.artifacts():
        artifact.verify()
        if "/".join(lineage.address(artifact.manifest)) in models:
            marks = {entry.user for entry in artifact.manifest.forgotten if entry.retrain_needed}
            assert marks == set(names)
    with capsys.disabled():
        print(
            f"\n  {len(gone)} users forgotten: none of their words in {len(files)} files of the store and of tracking, "
            f"{len(models)} model to retrain"
        )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_forgotten_do_not_come_back_with_their_logs(lived: Lived, user_key: bytes) -> None:
    """The logs still hold them: a cycle made anew, under `python -O`, refuses their rows and learns from the others."""
    gone = lived.users[:FORGOTTEN]
    for user in gone:
        forget(lived.store, user, user_key)
    lived.live("seed=18", PYTHONOPTIMIZE="1")
    after = "\n".join(lived.everywhere().values())
    assert [user for user in gone if word_of(user) in after or user in after] == []
    ingested, model = (lived.store.pointed(small_cycle.CYCLE, stage) for stage in ("ingest", LEARNER))
    assert ingested
    assert model
    assert ingested.manifest.rows
    assert ingested.manifest.rows.reasons[quarantine.FORGOTTEN] >= FORGOTTEN
    assert model.manifest.forgotten == (), "the new model never met them"
