"""The house keeps its floors: imports go down only, light modules stay light, and no file grows past reading."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flywheel_tasks"
FLOORS = (
    ("core",),
    ("compute", "models", "training", "style", "stats"),
    ("curation", "annotation", "preherding", "herding", "evaluation", "release", "simulation"),
)
HEAVY = (
    "torch",
    "ray",
    "vllm",
    "mlflow",
    "transformers",
    "faiss",
    "sklearn",
    "peft",
    "presidio_analyzer",
    "matplotlib",
)


def floor(module: str) -> int:
    part = module.split(".")[1] if "." in module else ""
    return next((number for number, parts in enumerate(FLOORS) if part in parts), len(FLOORS))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down_a_floor(path: Path) -> None:
    here = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        if name.startswith("flywheel_tasks."):
            assert floor(name) <= here, f"{path.name} on floor {here} imports {name} on floor {floor(name)}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "core"], ids=lambda path: path.name)
def test_the_ground_floor_never_imports_an_engine(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "ray", "vllm", "airflow"}


def test_the_simulation_is_imported_by_the_demo_alone() -> None:
    users = {p.name for p in FILES if any(n.startswith("flywheel_tasks.simulation") for n in imports(p))}
    assert {name for name in users if not (PACKAGE / "simulation" / name).exists()} <= {"demo.py", "demo_week.py"}


def test_the_pipeline_loads_nothing_heavy() -> None:
    code = f"import sys, flywheel_tasks.pipeline; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


def test_a_stage_that_runs_an_engine_asks_for_a_gpu() -> None:
    from flywheel_tasks.pipeline import STAGES

    generate = {stage.name: stage.resources.gpus for stage in STAGES if "engine" in stage.config.model_fields}
    assert {"pairs", "rejection-sample", "rl", "respond"} <= generate.keys()
    assert {name for name, gpus in generate.items() if not gpus} == set()


def test_no_file_is_too_long_to_read() -> None:
    long = {
        str(p.relative_to(ROOT)): n for p in [*FILES, *ROOT.glob("dags/*.py")] if (n := p.read_text().count("\n")) > 400
    }
    assert long == {}


def test_nothing_unpickles_or_runs_remote_code() -> None:
    forbidden = ("pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal")
    found = {f"{p.name}: {n}" for p in FILES for n in imports(p) if n.split(".")[0] in forbidden}
    words = ("trust_remote_code=True", "allow_pickle=True", "yaml.load(", "torch.load(", "yaml.unsafe_load")
    found |= {f"{p.name}: {word}" for p in FILES for word in words if word in p.read_text()}
    assert found == set()
