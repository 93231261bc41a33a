"""`flywheel gate` and `report` as a stranger uses them: exit codes, JSON, one-line errors, the page, the back-test."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flywheel_tasks.core.config import FlywheelConfig, load
from flywheel_tasks.evaluation.commands import register
from flywheel_tasks.evaluation.gate_config import GateConfig
from flywheel_tasks.pipeline import STAGES
from tests.evaluation.test_gate import MEASURED, good, rate

APP = typer.Typer()


def settings(profile: str | None, config: str | None, overrides: Any) -> FlywheelConfig:
    stages = {stage.name: stage.config for stage in STAGES} | {"gate": GateConfig}
    return load(stages, profile, config, ["gate.require=[rm_win_rate]", *(overrides or [])])


register(APP, settings)


@APP.callback()
def _main() -> None:
    """A second command makes `gate` a name, as in the real command line."""


def invoke(*arguments: Any, stdin: str | None = None, command: str = "gate") -> Any:
    return CliRunner().invoke(APP, [command, *map(str, arguments)], input=stdin)


def document(folder: Path, body: Any) -> Path:
    path = folder / "evidence.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return path


@pytest.mark.parametrize(("share", "decision", "code"), [(0.58, "PASS", 0), (0.66, "HOLD", 3), (0.71, "BLOCK", 4)])
def test_the_decision_is_the_exit_code(tmp_path: Path, share: float, decision: str, code: int) -> None:
    wins = {"pointwise_internal": rate(0.60), "pointwise_user": rate(share), "pairwise_user": rate(0.62)}
    found = invoke("--evidence", document(tmp_path, {"rm_win_rate": wins}), "--json")
    assert found.exit_code == code, found.output
    plain = json.loads(found.stdout)
    assert plain["decision"] == decision
    assert {"rule", "subject", "value", "threshold", "verdict", "reason"} == set(plain["rules"][0])
    assert bool(plain["reasons"]) == (decision != "PASS")


def test_the_table_says_why(tmp_path: Path) -> None:
    found = invoke("--evidence", document(tmp_path, {"rm_win_rate": {"pointwise_user": rate(0.71)}}))
    assert found.exit_code == 4
    assert "decision: BLOCK" in found.stdout
    assert "over-optimised" in " ".join(found.stdout.split())


def test_what_a_profile_requires_is_config(tmp_path: Path) -> None:
    path = document(tmp_path, {"rm_win_rate": {"pointwise_user": rate(0.55)}})
    assert invoke("--evidence", path).exit_code == 0
    assert invoke("--evidence", path, "--set", "gate.require=[rm_win_rate, red_team]").exit_code == 4
    assert invoke("--evidence", document(tmp_path, good()), "--now", MEASURED).exit_code == 0
    assert invoke("--evidence", document(tmp_path, good()), "--now", "2027-11-19").exit_code == 4


def test_evidence_may_come_through_a_pipe() -> None:
    assert invoke("--evidence", "-", stdin=json.dumps({"rm_win_rate": {"pairwise_user": rate(0.6)}})).exit_code == 0
    assert invoke("--evidence", "-", stdin="{}").exit_code == 4, "nothing was measured"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--evidence", "nowhere.json"], "No such file"),
        ([], "give --evidence"),
        (["--evidence", "-"], "not JSON"),
        (["--evidence", "-", "--set", "gate.win_rate={hold: 0.9, block: 0.7}"], "hold 0.9 is above block 0.7"),
        (["--evidence", "-", "--set", "gate.requires=[]"], "did you mean 'gate.require'"),
        (["--evidence", "-", "--profile", "tset"], "legal profiles are test, demo, cluster"),
        (["--evidence", "-", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--backtest", "nowhere.csv"], "cannot be read"),
        (["--backtest", "nowhere.csv", "--evidence", "-"], "not both"),
        (["--evidence", "-", "--page", "nowhere/page.html"], "there is no folder"),
    ],
)
def test_bad_input_is_exit_2_and_one_line(arguments: list[str], said: str) -> None:
    found = invoke(*arguments, stdin="prose, not evidence")
    assert found.exit_code == 2, found.output
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_bad_moment_is_refused(tmp_path: Path) -> None:
    found = invoke("--evidence", document(tmp_path, good()), "--now", "yesterday")
    assert (found.exit_code, "--now 'yesterday' is not a time" in found.stderr) == (2, True)


def test_the_page_holds_no_live_text(tmp_path: Path) -> None:
    body = good()
    body["style_drift"] = {"<script>alert(1)</script>": {"distance": 2.0, "n": 10}}
    page = tmp_path / "gate.html"
    found = invoke("--evidence", document(tmp_path, body), "--page", page, "--now", MEASURED)
    assert found.exit_code == 4
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html


def test_the_back_test_of_the_papers_history(data_dir: Path, tmp_path: Path) -> None:
    found = invoke("--backtest", data_dir / "paper/table10.csv", "--json")
    assert found.exit_code == 0, found.output
    plain = json.loads(found.stdout)
    verdicts = {v["version"]: v["decision"] for v in plain["versions"]}
    assert [v for v, d in verdicts.items() if d == "BLOCK"] == ["V12"]
    assert [v for v, d in verdicts.items() if d == "HOLD"] == ["V10", "V11", "V14"]
    every = {v["version"]: v["decision_by_all_rules"] for v in plain["versions"]}
    assert (every["V5"], every["V12"], every["V13"]) == ("BLOCK", "BLOCK", "HOLD")
    table = invoke("--backtest", data_dir / "paper/table10.csv").stdout
    assert "each rule alone" in table
    assert "on win-rates" in table
    assert all(len(line) <= 80 for line in table.splitlines())
    row = next(line.split() for line in table.splitlines() if line.startswith("V5 "))
    assert row[3:6] == ["PASS", "BLOCK", "steerability"]
    (tmp_path / "bad.csv").write_text("version,rm_pointwise_internal_win_pct,rm_pointwise_user_win_pct\nV1,abc,\n")
    broken = invoke("--backtest", tmp_path / "bad.csv")
    assert (broken.exit_code, "bad.csv:2" in broken.stderr) == (2, True)
    (tmp_path / "bad.csv").write_text("version,breadth_lift_pct,breadth_ci_minus,breadth_ci_plus\nV1,0.4,abc,1\n")
    assert "breadth_ci_minus 'abc' is not a number" in invoke("--backtest", tmp_path / "bad.csv").stderr


def test_the_documents_of_the_help_work_as_printed() -> None:
    lines = [line.strip() for line in invoke("--help").stdout.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.endswith("<<END"))
    arguments = shlex.split(lines[at].removesuffix("<<END"))[2:]
    found = invoke(*arguments, stdin=lines[at + 1])
    assert (lines[at + 2], found.exit_code) == ("END", 0), found.output


def test_the_page_gives_a_value_in_the_unit_of_its_threshold(tmp_path: Path) -> None:
    page = tmp_path / "gate.html"
    invoke("--evidence", document(tmp_path, {"rm_win_rate": {"pointwise_user": rate(0.66)}}), "--page", page)
    assert '<td class="num">66.0 %</td><td>HOLD &gt;= 65.0 %' in page.read_text()


@pytest.mark.parametrize("option", [("--cycle", "2026-W47"), ("--log",)])
def test_a_report_on_a_file_takes_no_option_about_a_store(
    data_dir: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    out, history = tmp_path / "out", data_dir / "paper/table10.csv"
    found = invoke("--out", out, "--history", history, *option, command="report")
    assert (found.exit_code, f"{option[0]} is about a store" in found.stderr) == (2, True)
    assert len(found.stderr.strip().splitlines()) == 1
    assert not out.exists()
