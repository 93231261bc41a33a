"""The `flywheel` command as a person or a scheduler meets it: real processes, exit codes, one-line errors."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flywheel_tasks import app, cli, pipeline
from flywheel_tasks.core.store import Store
from flywheel_tasks.simulation.traffic import write_event_log
from tests.conftest import USER_KEY

CYCLE = "2026-W47"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_event_log(folder / "logs", users=20, days=3, seed=1, start=dt.date(2026, 11, 16))
    return folder


def flywheel(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FLYWHEEL_HOME": str(home), "FLYWHEEL_USER_KEY": USER_KEY, "FLYWHEEL_PROFILE": "test"}
    environment["COLUMNS"] = "160"
    command = [sys.executable, "-m", "flywheel_tasks.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def uri(home: Path) -> str:
    done = flywheel(home, "run", "ingest", "--cycle", CYCLE, "--set", f"ingest.logs={home}/logs/*")
    assert done.returncode == 0, done.stderr
    assert "events in" in done.stderr
    return done.stdout.strip()


def test_the_last_line_of_a_run_is_the_manifests_uri(home: Path, uri: str) -> None:
    artifact = Store(f"{home}/store").by_uri(uri)
    assert artifact.manifest.stage == "ingest"
    again = flywheel(home, "run", "ingest", "--cycle", CYCLE, "--set", f"ingest.logs={home}/logs/*")
    assert again.stdout.strip() == uri
    assert "already there" in again.stderr


def test_a_run_closes_the_folder_that_chats_are_kept_in(home: Path, uri: str) -> None:
    """A folder that was there before, open to everybody, as `git clean` or a person may leave it."""
    home.chmod(0o755)
    done = flywheel(home, "run", "ingest", "--cycle", CYCLE, "--set", f"ingest.logs={home}/logs/*")
    assert done.stdout.splitlines()[-1] == uri
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_cycle_stops_before_people_judge_when_told_to(home: Path, uri: str) -> None:
    arguments = ("--cycle", CYCLE, "--set", f"ingest.logs={home}/logs/*", "--until", "filter", "--json")
    done = flywheel(home, "cycle", *arguments)
    assert done.returncode == 0, done.stderr
    assert [one["stage"] for one in json.loads(done.stdout)] == ["ingest", "filter"]


def test_a_cached_stage_is_quick(home: Path, uri: str) -> None:
    arguments = ("run", "ingest", "--cycle", CYCLE, "--set", f"ingest.logs={home}/logs/*")
    began = time.monotonic()
    flywheel(home, *arguments)
    assert (
        time.monotonic() - began < 10
    )  # the budget of 2 s is measured on a quiet machine by benchmarks/bench_startup.py


def test_stages_describe_themselves(home: Path) -> None:
    listed = json.loads(flywheel(home, "stages", "--json").stdout)
    assert [stage["name"] for stage in listed] == [stage.name for stage in pipeline.STAGES]
    assert all({"name", "phase", "inputs", "outputs", "config", "resources", "paper"} <= set(stage) for stage in listed)
    assert all(stage["doc"] and stage["paper"] for stage in listed)
    row = next(line for line in flywheel(home, "stages").stdout.splitlines() if line.strip().startswith("filter "))
    assert row.split()[-4:] == ["ingest", "conversations,", "prompts,", "report"], "what it reads from, what it writes"
    assert flywheel(home, "--version").stdout.startswith("flywheel 0.")


def test_status_show_and_lineage_tell_people_and_machines_the_same(home: Path, uri: str) -> None:
    key = uri.split("/")[-2]
    status = json.loads(flywheel(home, "status", "--json").stdout)
    assert status[CYCLE]["ingest"]["key"] == key
    assert key[:12] in flywheel(home, "status").stdout
    shown = json.loads(flywheel(home, "show", key, "--json", "--verify").stdout)
    assert (shown["uri"], shown["key"]) == (uri, key)
    assert "conversations" in flywheel(home, "show", f"ingest/{key}").stdout
    lineage = json.loads(flywheel(home, "lineage", uri, "--json").stdout)
    assert lineage["artifact"] == f"ingest/{key}"
    assert {Path(source["uri"]).name for source in lineage["sources"]} == {p.name for p in (home / "logs").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "ingst", "--cycle", CYCLE), "no stage 'ingst'"),
        (("run", "ingest", "--cycle", "2026-W60"), "not an ISO week"),
        (("run", "ingest", "--cycle", "../../etc"), "not an ISO week"),
        (
            ("run", "ingest", "--cycle", CYCLE, "--set", "ingest.continu_minutes=3"),
            "did you mean 'ingest.continue_minutes'",
        ),
        (("run", "ingest", "--cycle", CYCLE, "--profile", "tset"), "legal profiles are test, demo, cluster"),
        (("run", "ingest", "--cycle", CYCLE, "--input", "ingest"), "not STAGE=MANIFEST_URI"),
        (
            ("run", "ingest", "--cycle", CYCLE, "--set", "ingest.logs=/nowhere/*.jsonl"),
            "no file matches '/nowhere/*.jsonl'",
        ),
        (("show", "../../etc/passwd"), "not a plain name"),
        (("show", "file:///etc/passwd"), "not a manifest of this store"),
        (("show", "zzz"), "no artifact matches"),
        (("lineage",), "give either an artifact or --user"),
        (("cycle", "--cycle", CYCLE, "--skip", "nothing"), "no stage 'nothing'"),
        (("cycle", "--cycle", CYCLE, "--until", "nothing"), "no stage 'nothing'"),
        (("cycle", "--cycle", CYCLE, "--until", "readout"), "it runs every day"),
        (("run", "ingest"), "Missing option '--cycle': see `flywheel run --help`"),
        (("run", "--cycle", CYCLE), "Missing argument 'stage': see `flywheel run --help`"),
        (("run", "ingest", "--cycel", CYCLE), "No such option: --cycel"),
        (("runn", "ingest"), "No such command 'runn'"),
        (("readout", "--activity", "a.parquet", "--days", "soon"), "Invalid value for '--days'"),
        (("status", "--set", "store.uri=/etc/passwd"), "/etc/passwd is a file: name a folder"),
        (("run", "ingest", "--cycle", CYCLE, "--config", "/etc/passwd/x"), "/etc/passwd/x cannot be read"),
        (("run", "ingest", "--cycle", CYCLE, "--config", "/nowhere.yaml"), "/nowhere.yaml cannot be read"),
        (("run", "ingest", "--cycle", CYCLE, "--set", "seed"), "not KEY=VALUE"),
        (("run", "ingest", "--cycle", CYCLE, "--set", "seed=abc"), "'seed'"),
        (("status", "--set", "store.uri=ftp://x/y"), "use file://, s3:// or gs://"),
        (("run", "filter", "--cycle", "2030-W01"), "run `flywheel run ingest --cycle 2030-W01` first"),
        (("answer", "maybe", "--cycle", CYCLE), "say approve, reject or timeout"),
        (("gate", "--evidence", "/nowhere.json"), "/nowhere.json"),
        (("gate", "--evidence", "-", "--set", "gate.win_rat={}"), "did you mean 'gate.win_rate'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(home: Path, arguments: tuple[str, ...], said: str) -> None:
    done = flywheel(home, *arguments)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("──")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert done.stdout == ""


def test_a_failing_disk_is_one_line_and_exit_2_where_the_path_is_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    for error, code in ((PermissionError(errno.EACCES, "Permission denied", "/root/x\x1b"), 2), (full, 1)):

        def fails(arguments: list[str], error: OSError = error) -> int:
            raise error

        monkeypatch.setattr(app, "run_app", fails)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (code, 1)
        assert str(error.strerror) in said
        assert "\x1b" not in said
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1", "no bar of transformers' where nobody watches"


def test_an_interrupt_is_one_line_even_while_the_program_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "flywheel_tasks.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "flywheel_tasks.app")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted; run it again\n")


def test_every_command_has_help_a_stranger_can_use(home: Path) -> None:
    overview = flywheel(home, "--help").stdout
    assert flywheel(home).stdout == overview
    assert "..." not in overview.partition("Commands:")[2], "no sentence is cut"
    for command in ("stages", "run", "cycle", "status", "show", "lineage", "forget", "readout", "up"):
        assert command in overview
        said = flywheel(home, command, "--help")
        assert said.returncode == 0
        assert len(said.stdout.splitlines()) >= 6


def test_a_cancelled_stage_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    from flywheel_tasks.simulation.bulk import write_benchmark_log

    write_benchmark_log(tmp_path / "big.jsonl", 400_000, seed=2)
    environment = os.environ | {"FLYWHEEL_HOME": str(tmp_path), "FLYWHEEL_USER_KEY": USER_KEY}
    arguments = ["run", "ingest", "--cycle", CYCLE, "--profile", "test", "--set", f"ingest.logs={tmp_path}/big.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flywheel_tasks.cli", *arguments], env=environment, stderr=subprocess.PIPE
    )
    artifacts = tmp_path / "store" / "artifacts"
    deadline = time.monotonic() + 60
    while not any(p.is_file() for p in artifacts.rglob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert [p for p in artifacts.rglob("*") if p.is_file()] == []
