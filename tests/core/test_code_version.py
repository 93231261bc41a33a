"""The code version moves with meaning, not with comments, and follows imports however late they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_tasks.core import code_version as versions


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(versions, "_ROOT", tmp_path)
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "store.py").write_text("X = 1\n")
    (tmp_path / "core" / "prompts.py").write_text("MOST = 1\n")
    (tmp_path / "core" / "quarantine.py").write_text("KEPT = 1\n")
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "rules.py").write_text("LIMIT = 3\n")
    (tmp_path / "stage.py").write_text(
        '"""A stage."""\nfrom flywheel_tasks.core import quarantine, store\n'
        'from flywheel_tasks.core.prompts import MOST\n\ndef run():\n    """Doc."""\n'
        "    from flywheel_tasks.style import rules\n    return rules.LIMIT\n"
    )
    (tmp_path / "rules.yaml").write_text("a: 1\n")
    return tmp_path


def version() -> str:
    for cached in (versions.code_version, versions._imports, versions._tree, versions._meaning):
        cached.cache_clear()
    return versions.code_version("flywheel_tasks.stage", ("rules.yaml",))


@pytest.mark.parametrize(
    ("file", "old", "new", "moves"),
    [
        ("stage.py", "return rules.LIMIT", "return rules.LIMIT  # why", False),
        ("stage.py", '"""Doc."""', '"""Other words."""', False),
        ("core/store.py", "X = 1", "X = 2", False),
        ("stage.py", "return rules.LIMIT", "return rules.LIMIT + 1", True),
        ("core/prompts.py", "MOST = 1", "MOST = 2", True),
        ("core/quarantine.py", "KEPT = 1", "KEPT = 2", True),
        ("style/rules.py", "LIMIT = 3", "LIMIT = 4", True),
        ("rules.yaml", "a: 1", "a: 2", True),
    ],
)
def test_what_moves_the_version(package: Path, file: str, old: str, new: str, moves: bool) -> None:
    before = version()
    path = package / file
    path.write_text(path.read_text().replace(old, new))
    assert (version() != before) == moves
