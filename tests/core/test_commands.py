"""Options and errors that commands of several parts share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from flywheel_tasks import pipeline
from flywheel_tasks.app import app
from flywheel_tasks.core.commands import configured
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import FlywheelError, InputError


def invoke(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer(rich_markup_mode=None)

    def settings(profile: str | None, config: str | None, set_: Sequence[str] | None) -> FlywheelConfig:
        if config:
            raise InputError(f"{config} is not there")
        return FlywheelConfig.model_validate({"store": {"uri": f"file:///{profile}/{'/'.join(set_ or ())}"}})

    @app.command()
    @configured(settings, "Whose store.", "x=[1]")
    def show(config: FlywheelConfig, word: Annotated[str, typer.Argument(help="Any.")], times: int = 1) -> None:
        """Say a word."""
        if times < 0:
            error = FlywheelError("less than nothing")
            error.add_note("and nothing could be removed")
            raise error
        print(config.store.uri, word * times)

    found = CliRunner().invoke(app, [*arguments])
    return found.exit_code, found.stdout, found.stderr


def test_a_command_is_given_its_configuration_and_its_own_options() -> None:
    assert invoke("ho", "--profile", "p", "--set", "a", "--times", "2", "--set", "b") == (0, "file:///p/a/b hoho\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("ho", "--times", "-1"), 1, "less than nothing\n       and nothing could be removed"),
        (("ho", "--config", "x.yaml"), 2, "x.yaml is not there"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code_and_what_else_went_wrong_beneath(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert invoke(*arguments) == (code, "", f"error: {said}\n")


def test_the_help_names_the_shared_options_behind_the_commands_own() -> None:
    text = invoke("--help")[1]
    words = ("Say a word.", "--times", "--profile", "Whose store.", "test, demo, cluster", "--config", "--set", "x=[1]")
    places = [text.index(word) for word in words]
    assert places == sorted(places)


def test_every_setting_that_a_help_or_an_error_shows_is_accepted() -> None:
    helps = [p.help or "" for c in typer.main.get_command(app).commands.values() for p in c.params]  # type: ignore[attr-defined]
    sources = [path.read_text() for path in Path(pipeline.__file__).parent.rglob("*.py")]
    shown = re.compile(r"--set '?([a-z][a-z-]*\.[a-z_]+=[^\s;'\"]+)")
    examples = {example for text in (*helps, *sources) for example in shown.findall(text)}
    assert {"gate.require=[]", "ingest.continue_minutes=15", "store.uri=s3://bucket/x"} <= examples
    for example in examples:
        pipeline.load_config("test", overrides=[example])
    known = {f"{stage.name}.{field}" for stage in pipeline.STAGES for field in stage.config.model_fields}
    named = {key for text in sources for key in re.findall(r"[ (]set ([a-z][a-z-]*\.[a-z_]+)\b", text)}
    stages = {stage.name for stage in pipeline.STAGES}
    assert [key for key in named - known if key.partition(".")[0] in stages] == []


def test_a_file_where_the_store_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/store"):
        code, said, error = run_in(f"file://{tmp_path}/{place}")
        assert (code, said) == (2, "")
        assert error == f"error: store.uri 'file://{tmp_path}/{place}': {tmp_path}/file is a file: name a folder\n"
    assert run_in(f"file://{tmp_path}/new")[0] == 0


def run_in(store: str) -> tuple[int, str, str]:
    one = typer.Typer(rich_markup_mode=None)

    @one.command()
    @configured(lambda profile, config, set_: FlywheelConfig.model_validate({"store": {"uri": store}}))
    def look(config: FlywheelConfig) -> None:
        pass

    found = CliRunner().invoke(one, [])
    return found.exit_code, found.stdout, found.stderr
