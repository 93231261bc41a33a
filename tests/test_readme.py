"""What the README promises can be pasted: its links, its commands, its example of a log, and its example of a stage."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flywheel_tasks.core.config import load
from flywheel_tasks.core.ids import USER_KEY_VARIABLE
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.evaluation.gate_config import GateConfig
from flywheel_tasks.pipeline import STAGES, by_name, load_config
from tests.conftest import USER_KEY

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "benchmarks/README.md")
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "flywheel_tasks"
CYCLE = "2026-W46"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert len(links) > 2
    assert [link for link in links if not link.startswith("https://") and not (here / link).exists()] == []


def test_the_paper_map_names_files_that_exist() -> None:
    rows = README.split("## Paper map")[1].split("\n## ")[0].splitlines()[4:]
    named = [
        (row, name) for row in rows for name in re.findall(r"`((?:test_)?[a-z_0-9/]+)`", row) if row.startswith("|")
    ]
    everywhere = {path.stem for folder in ("flywheel_tasks", "tests") for path in (ROOT / folder).rglob("*.*")}
    assert len(named) > 50
    assert [name for row, name in named if Path(name).stem not in everywhere and not (PACKAGE / name).is_dir()] == []


def test_every_command_and_option_exists() -> None:
    ask = subprocess.run(
        [sys.executable, "-m", "flywheel_tasks.cli", "--help"], capture_output=True, text=True, check=True
    )
    commands = set(re.findall(r"^  ([a-z-]+)  ", ask.stdout, re.MULTILINE))
    blocks = re.findall(r"^ {4,}(flywheel .*)$", README, re.MULTILINE)
    used = {word for line in blocks for word in re.findall(r"(?:flywheel|·) ([a-z-]+)(?! and)", line)}
    assert len(used) > 12
    assert used <= commands
    targets = set(re.findall(r"^([a-zA-Z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-zA-Z-]+)", README)) <= targets


def test_the_gate_is_told_as_it_is() -> None:
    gate = GateConfig()
    assert (gate.win_rate_ideal, gate.win_rate.hold, gate.win_rate.block) == (0.6, 0.65, 0.7)
    assert (gate.divergence.hold, gate.divergence.block) == (0.125, 0.15)
    assert (gate.style_drift.hold, gate.style_drift.block) == (0.5, 1.0)


def test_the_example_of_a_log_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_KEY_VARIABLE, USER_KEY)
    artifact = ingest(tmp_path)
    rows = artifact.manifest.rows
    assert rows is not None
    assert (rows.rows_in, rows.rows_out, rows.rows_rejected) == (20, 20, 0)
    assert artifact.table("characters").read().num_rows == 2
    turns = [turn for row in artifact.table("conversations").read()["turns"].to_pylist() for turn in row]
    assert len(turns) == 15


def test_the_example_of_a_stage_runs_as_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_KEY_VARIABLE, USER_KEY)
    (sample,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "shout.py").write_text(sample)
    spec = importlib.util.spec_from_file_location("shout", tmp_path / "shout.py")
    assert spec is not None
    assert spec.loader is not None
    shout = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "shout", shout)
    spec.loader.exec_module(shout)
    ingest(tmp_path)
    stage, store = shout.STAGE, Store(f"{tmp_path}/store")
    configs = {one.name: one.config for one in (*STAGES, stage)}
    config = load(configs, "test", None, [*settings(tmp_path), "shout.mark='?'"])
    prompts = run_stage(by_name("filter"), CYCLE, config, store).artifact.table("prompts").read()
    louder = run_stage(stage, CYCLE, config, store).artifact.table("prompts").read()
    assert louder["locale"].to_pylist() == [f"{locale.upper()}?" for locale in prompts["locale"].to_pylist()]
    assert run_stage(stage, CYCLE, config, store).outcome == "cached"


def settings(home: Path) -> list[str]:
    return [
        f"store.uri={home}/store", f"tracking.uri=sqlite:///{home}/mlflow.db",
        f"ingest.logs=[{ROOT}/docs/traffic.jsonl]", f"ingest.characters=[{ROOT}/docs/characters.jsonl]",
    ]  # fmt: skip


def ingest(home: Path) -> Artifact:
    config = load_config("test", None, settings(home))
    return run_stage(by_name("ingest"), CYCLE, config, Store(f"{home}/store")).artifact
