"""`flywheel readout` as a stranger uses it: exit codes, one-line errors, JSON, plan, plot."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flywheel_tasks.release.commands import register
from flywheel_tasks.release.plot import forest
from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.release.readout_config import ReadoutConfig
from tests.release.worlds import START, day, world, write

APP = typer.Typer()
register(APP)


@APP.callback()
def _main() -> None:
    """A second command makes `readout` a name, as in the real command line."""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return write(tmp_path, *world(1, staggered=False, pre=3))


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(APP, ["readout", *map(str, arguments)])


def test_json_and_plot(files: tuple[str, str], tmp_path: Path) -> None:
    found = invoke(
        "--exposures", files[0], "--activity", files[1], "--json", "--start", START, "--plot", tmp_path / "f.png"
    )
    assert found.exit_code == 0, found.output
    plain = json.loads(found.stdout)
    assert set(plain["comparisons"]["test"]) == {"breadth", "depth", "sends_per_exposed", "active_share"}
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_tables_fit_a_terminal(files: tuple[str, str]) -> None:
    found = invoke("--exposures", files[0], "--activity", files[1], "--start", START)
    assert found.exit_code == 0
    for word in ("breadth", "depth", "sends_per_exposed", "active_share", "decision for", "estimand: calendar_window"):
        assert word in found.stdout
    assert all(len(line) <= 80 for line in found.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--exposures", "nothing.parquet"], "no exposures file matches"),
        (["--start", "soon"], "--start"),
        (["--time-zone", "Mars/Base"], "no time zone"),
        (["--estimand", "guess"], "--estimand"),
        (["--control", "base"], "no unit in control arm 'base'"),
        (["--segment", "returning"], "needs --pre-days above 0"),
        (["--segment", "colour"], "no column colour"),
        (["--missing-day", "2027-01-01"], "--missing-day must name"),
    ],
)
def test_bad_input_is_exit_2_and_one_line(files: tuple[str, str], arguments: list[str], said: str) -> None:
    found = invoke("--exposures", files[0], "--activity", files[1], *arguments)
    assert found.exit_code == 2, found.output
    assert said in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_running_is_exit_3_and_refused_is_exit_2(files: tuple[str, str], tmp_path: Path) -> None:
    running = invoke("--exposures", files[0], "--activity", files[1], "--json", "--start", START, "--as-of", day(5))
    assert running.exit_code == 3
    assert json.loads(running.stdout)["status"] == "running"
    exposures, activity = world(1, staggered=False)
    refused = invoke(
        "--start",
        START,
        *_named(write(tmp_path / "b", exposures[:200] + [e for e in exposures[200:] if e[1] == "test"], activity)),
    )
    assert refused.exit_code == 2
    assert "sample ratio" in refused.stderr


def _named(found: tuple[str, str]) -> list[str]:
    return ["--exposures", found[0], "--activity", found[1]]


def test_plan_before_launch(files: tuple[str, str]) -> None:
    found = invoke("--plan", "--activity", files[1], "--json", "--share", 0.2, "--start", START, "--tests", 1)
    assert found.exit_code == 0, found.output
    plain = json.loads(found.stdout)
    assert plain["units_seen"] == 450
    breadth = plain["metrics"][0]
    assert breadth["units_per_arm"] == 90
    n = (1.959964 + 0.841621) ** 2 * 2 * (breadth["sd"] / breadth["mean"] / 0.05) ** 2
    assert breadth["units_for_lift_pct"]["5"] == pytest.approx(n, rel=0.02)
    assert invoke("--plan", "--activity", files[1]).exit_code == 0
    assert invoke("--activity", files[1]).exit_code == 2


@pytest.mark.parametrize(
    "options", [["--power", 2], ["--power", 1], ["--power", "nan"], ["--power", 0.01], ["--units", 1]]
)
def test_a_plan_that_nothing_reaches_is_refused_at_once(files: tuple[str, str], options: list[Any]) -> None:
    found = invoke("--plan", "--activity", files[1], *options)
    assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert "power" in found.stderr or "units per arm" in found.stderr


def test_a_test_that_was_not_split_in_half_is_read_with_its_weights(files: tuple[str, str], tmp_path: Path) -> None:
    exposures, activity = world(1, staggered=False)
    few = _named(write(tmp_path / "b", exposures[:200] + [e for e in exposures[200:] if e[1] == "test"], activity))
    refused = invoke("--start", START, *few)
    assert refused.exit_code == 2
    assert "set --allocation" in refused.stderr
    assert "sample ratio mismatch" not in refused.stdout, "it is said once"
    shares = json.loads(invoke("--start", START, "--json", *few).stdout)["sample_ratio"]["observed"]
    weights = ",".join(f"{arm}={n}" for arm, n in shares.items())
    assert invoke("--start", START, *few, "--allocation", weights).exit_code == 0
    for wrong in ("control", "control=0", "control=x,test=1", "control=1,control=2"):
        assert "ARM=WEIGHT" in invoke("--start", START, *few, "--allocation", wrong).stderr


def test_where_a_plot_and_a_layout_go_is_checked_before_anything_is_read(
    files: tuple[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for plot, said in (("nowhere/x.png", "no folder"), ("p.txt", "ends in .png"), (".", "is a folder")):
        found = invoke("--exposures", "none", "--activity", "none", "--plot", tmp_path / plot)
        assert (found.exit_code, said in found.stderr) == (2, True), found.output
    out = str(tmp_path / "file" / "layout")
    found = CliRunner().invoke(APP, ["layout", "--exposures", "none", "--activity", "none", "--out", out])
    assert (found.exit_code, "is a file: name a folder" in found.stderr) == (2, True)


def test_an_unfinished_window_says_which_as_of_would_close_it(files: tuple[str, str]) -> None:
    source = ["--exposures", files[0], "--activity", files[1], "--start", START]
    waiting = invoke(*source, "--as-of", day(6))
    assert waiting.exit_code == 3
    assert f"--as-of {day(7)} closes it" in waiting.stderr
    assert invoke(*source, "--as-of", day(7)).exit_code == 0


def test_a_name_cannot_command_the_terminal(tmp_path: Path) -> None:
    exposures, activity = world(1, staggered=False)
    arm = "\x1b[31mred\x07"
    odd = [(e[0], arm if e[1] == "test" else e[1], *e[2:]) for e in exposures]
    found = invoke("--start", START, "--as-of", day(7), *_named(write(tmp_path / "b", odd, activity)))
    assert found.exit_code == 0, found.output
    assert "\x1b" not in found.output
    assert r"\x1b[31mred\x07 breadth" in found.output


def test_a_plan_counts_the_units_of_its_days_only(files: tuple[str, str], tmp_path: Path) -> None:
    """All who ever came are more than an experiment of a week would expose."""
    _, activity = world(1, staggered=False, pre=3)
    past = [(10**9 + i, day(-20), 2) for i in range(500)]
    _, longer = write(tmp_path / "past", world(1)[0], activity + past)
    week = ["--json", "--start", START, "--days", 5]
    plain, padded = (json.loads(invoke("--plan", "--activity", f, *week).stdout) for f in (files[1], longer))
    assert padded == plain
    assert (padded["first"], padded["last"]) == (str(day(0)), str(day(4)))


def test_every_kind_of_set_can_be_drawn(files: tuple[str, str], tmp_path: Path) -> None:
    """The plot must not depend on luck: two rays, a whole line, an empty set, and a hostile experiment name."""
    from dataclasses import replace

    from flywheel_tasks.stats.fieller import fieller

    result = read_out_files(*files, ReadoutConfig(start=START))
    sets = [fieller(5, 0.25, 0.5, 0.25), fieller(0.5, 1, 0.5, 1), fieller(1, 0.01, 0, 0), fieller(1.1, 0, 1, 0)]
    drawn = [replace(c, lift=s) for c, s in zip(result.comparisons, sets, strict=True)]
    forest(replace(result, comparisons=drawn, experiment="$\\frac{1}{$ <b>"), tmp_path / "odd.png")
    assert (tmp_path / "odd.png").stat().st_size > 10_000


def test_a_layout_gives_the_same_readout_as_the_raw_files(files: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "layout"
    source = ["--exposures", files[0], "--activity", files[1]]
    written = CliRunner().invoke(APP, ["layout", *source, "--out", str(out)])
    assert written.exit_code == 0, written.output
    fast = ["--exposures", out / "units.parquet", "--activity", out / "activity-*.parquet", "--start", START]
    raw, laid = (json.loads(invoke(*options, "--json").stdout) for options in (source, fast))
    assert laid["comparisons"] == raw["comparisons"]
    assert laid["decisions"] == raw["decisions"]
