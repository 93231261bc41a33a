"""Hooks (the files in `hooks/`) that run in every Python process of a drill before anything else does."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import ROOT

HOOKS = Path(__file__).parent / "hooks"


def hooked(folder: Path, *names: str, **variables: str) -> dict[str, str]:
    """The environment in which a process, and whatever it starts, runs these hooks first; they read `variables`."""
    home = folder / "hooks"
    home.mkdir(parents=True, exist_ok=True)
    files = [str(HOOKS / f"{name}.py") for name in names]
    run = "exec(compile(open({0!r}).read(), {0!r}, 'exec'), {{'__name__': 'hook', '__file__': {0!r}}})\n"
    (home / "sitecustomize.py").write_text("".join(run.format(file) for file in files))
    return {"PYTHONPATH": f"{home}:{ROOT}"} | variables
