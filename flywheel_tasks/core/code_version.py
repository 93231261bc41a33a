"""The code version of a stage: a digest of the code that computes it, blind to comments and docstrings.

It covers the stage's module, every module that it imports (however late), and its data files. Of floor 0 only those
count that name or choose rows (`_DECIDE`); schemas enter the key by themselves, the rest moves bytes.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from pathlib import Path

PACKAGE = "flywheel_tasks"
_DECIDE = tuple(f"{PACKAGE}.core.{name}" for name in ("ids", "prompts", "quarantine"))
_ROOT = Path(__file__).resolve().parents[1]
_DATA = (".yaml", ".yml", ".json", ".j2", ".safetensors")


@cache
def code_version(module: str, data: tuple[str, ...] = ()) -> str:
    """Sixteen digits that change when the stage may compute something else. `data` are paths inside the package."""
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
        digest.update(f"{name}\n{_meaning(name)}\n".encode())
    for path in sorted(data):
        for file in _data_files(_ROOT / path):
            digest.update(f"{file.relative_to(_ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _data_files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.suffix in _DATA) if path.is_dir() else [path]


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += _imports(name)
    return seen


@cache
def _imports(module: str) -> tuple[str, ...]:
    found = []
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(name for name in found if name.startswith(PACKAGE + ".") and _counts(name))


def _counts(module: str) -> bool:
    return (module in _DECIDE or not module.startswith(f"{PACKAGE}.core")) and _file(module) is not None


def _file(module: str) -> Path | None:
    """A module's source: in this package, or wherever a stage of somebody's own was imported from."""
    if module.split(".")[0] != PACKAGE:
        own = getattr(sys.modules.get(module), "__file__", None)
        return Path(own) if own else None
    path = _ROOT.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    if file is None:
        raise ModuleNotFoundError(module)
    return ast.parse(file.read_bytes())


@cache
def _meaning(module: str) -> str:
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
