"""A typo in any key of the configuration is refused, with the key that was meant; nothing runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from flywheel_tasks import cli, pipeline
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import ConfigError


def keys_of(cls: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys_of(inner, f"{prefix}{name}.")
        elif name not in ("stages", "profile"):
            found.append(prefix + name)
    return found


KEYS = keys_of(FlywheelConfig) + [key for s in pipeline.STAGES for key in keys_of(s.config, f"{s.name}.")]


def typos(word: str) -> list[str]:
    """One letter lost, doubled, or swapped with its neighbour."""
    middle = len(word) // 2
    made = [word[:middle] + word[middle + 1 :], word[:middle] + word[middle] + word[middle:]]
    if len(word) > 2 and word[middle - 1] != word[middle]:
        made.append(word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :])
    return [t for t in made if t]


def test_a_typo_in_any_key_is_refused_with_the_key_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    tried = 0
    for key in KEYS:
        parent, _, last = key.rpartition(".")
        siblings = {k.rpartition(".")[2] for k in KEYS if k.rpartition(".")[0] == parent}
        for typo in typos(last):
            if typo in siblings:
                continue
            wrong = f"{parent}.{typo}" if parent else typo
            with pytest.raises(ConfigError) as refused:
                pipeline.load_config(overrides=[f"{wrong}=1"])
            text = str(refused.value)
            assert f"'{wrong}'" in text or f"'{typo}'" in text, text
            assert f"did you mean '{key}'" in text, text
            assert "\n" not in text
            tried += 1
    with capsys.disabled():
        print(f"\n  {tried} typos in {len(KEYS)} keys, each refused with the key that was meant")
    assert tried > len(KEYS)


@pytest.mark.parametrize("key", sorted({k.split(".")[0] for k in KEYS if "." in k}))
def test_a_typo_in_a_section_is_refused_too(key: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{key}'"):
        pipeline.load_config(overrides=[f"{typos(key)[1]}.x=1"])


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("--set", "ingest.lgos=[x.jsonl]"), "ingest.logs"),
        (("--set", "stroe.uri=/tmp/x"), "store"),
        (("--profile", "dmeo"), "demo"),
    ],
)
def test_the_command_line_says_so_in_one_line_and_runs_nothing(
    arguments: tuple[str, ...],
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["flywheel", "run", "ingest", "--cycle", "2026-W47", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert meant in said
    assert not (tmp_path / "home").exists()
