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


PICKLERS = ("pickle", "_pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal")
READERS = {"read_pickle", "to_pickle", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}
SWITCHES = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What in a file could unpickle, or run code that comes with data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names]
            modules = named if isinstance(node, ast.Import) else [node.module or ""]
            yield from (name for name in modules if name.split(".")[0] in PICKLERS)
            yield from (name for name in named if name.split(".")[-1] in {*PICKLERS, *READERS})
        elif isinstance(node, ast.Attribute) and node.attr in {*PICKLERS, *READERS}:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in {*PICKLERS, *READERS}:
            yield f"'{node.value}'"  # for import_module or getattr
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            switches = {word.arg: word.value for word in node.keywords if word.arg in SWITCHES}
            for name, value in switches.items():
                if not (isinstance(value, ast.Constant) and value.value is SWITCHES[name]):
                    yield f"{called}({name}={ast.unparse(value)})"
            if called in ("yaml.load", "yaml.load_all") or (called == "torch.load" and "weights_only" not in switches):
                yield called


@pytest.mark.parametrize(
    "guilty",
    [
        "import pickle", "from joblib import load", "import pandas.io.pickle", "from pandas import read_pickle",
        "import importlib\nimportlib.import_module('pickle')", "frame = pandas.read_pickle(path)",
        "np.load(path, allow_pickle = True)", "np.load(path, mmap_mode='r', allow_pickle=choice)", "yaml.load(text)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "auto.from_pretrained(x, trust_remote_code= True)",
        "getattr(pandas, 'read_pickle')(path)", "yaml.unsafe_load(text)", "multiprocessing.reduction.pickle.loads(x)",
    ],
)  # fmt: skip
def test_the_house_sees_what_could_unpickle(guilty: str) -> None:
    assert list(unsafe(ast.parse(guilty)))


def test_nothing_unpickles_or_runs_remote_code() -> None:
    innocent = "np.load(p, allow_pickle=False)\nnp.load(p)\nm(x, trust_remote_code=False)\nyaml.safe_load(t)"
    assert list(unsafe(ast.parse(innocent))) == []
    files = [*FILES, *ROOT.glob("dags/*.py")]
    found = {f"{path.relative_to(ROOT)}: {what}" for path in files for what in unsafe(ast.parse(path.read_bytes()))}
    assert found == set()
