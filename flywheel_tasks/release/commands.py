"""The `flywheel readout` command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flywheel_tasks.core.terminal import show, visible

RUNNING, REFUSED = 3, 2


def register(app: typer.Typer) -> None:
    """Add `readout` to the command line."""
    app.command("readout")(readout)
    app.command("layout")(layout)


Activity = Annotated[
    list[str], typer.Option(help="Activity Parquet (unit_id, day, sends): a file or a glob; may repeat.")
]
Exposures = typer.Option(help="Exposure Parquet (experiment, unit_id, arm, exposed_at): a file or a glob; may repeat.")
Experiment = Annotated[str | None, typer.Option(help="Which experiment, where the log holds several.")]
NaiveZone = Annotated[str | None, typer.Option(help="Zone of exposure times without one (default: refuse them).")]
BadRows = Annotated[str, typer.Option(help="Rows with nulls or negative sends: refuse, or drop (and count).")]


def readout(
    activity: Activity,
    exposures: Annotated[list[str] | None, Exposures] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Before launch: power and minimum detectable lift from past activity.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the forest plot to this PNG.")] = None,
    experiment: Experiment = None,
    control: Annotated[str, typer.Option(help="The arm with the current baseline.")] = "control",
    allocation: Annotated[
        str | None, typer.Option(help="Planned weight of each arm: control=0.9,test=0.1 (default: all equal).")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="First day of the window, YYYY-MM-DD (default: from the data).")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=28, help="Days in the window.")] = 7,
    as_of: Annotated[
        str | None, typer.Option(help="Data is complete before this day (default: the last day with activity).")
    ] = None,
    estimand: Annotated[
        str, typer.Option(help="calendar_window, days_since_exposure or per_user_window.")
    ] = "calendar_window",
    time_zone: Annotated[str, typer.Option(help="Zone whose days the exposures follow.")] = "UTC",
    naive_zone: NaiveZone = None,
    missing_day: Annotated[list[str] | None, typer.Option(help="Declare a day without data; may repeat.")] = None,
    pre_days: Annotated[int, typer.Option(min=0, max=28, help="Days before the window for CUPED.")] = 0,
    segment: Annotated[
        list[str] | None, typer.Option(help="Column of the exposure log to split by; may repeat.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of every interval and test.")] = 0.05,
    bad_rows: BadRows = "refuse",
    partition_bits: Annotated[
        int, typer.Option(min=0, max=12, help="Read the units in 2^bits parts, to save memory.")
    ] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Ray tasks over the parts.")] = 0,
    share: Annotated[float, typer.Option(help="With --plan: share of the units in each arm, at most 0.5.")] = 0.1,
    units: Annotated[int | None, typer.Option(help="With --plan: units per arm, instead of a share.")] = None,
    power: Annotated[float, typer.Option(help="With --plan: chance to declare a true lift, below 1.")] = 0.8,
    tests: Annotated[int, typer.Option(min=1, help="With --plan: primary claims that share alpha.")] = 2,
) -> None:
    """Read an A/B test: breadth and depth lifts with Fieller's confidence sets, checks, and a decision.

    Exit code 0: the readout is closed. 2: bad input, or a check refused the readout. 3: its window is not complete.
    """
    from flywheel_tasks.core.commands import new_file, told
    from flywheel_tasks.core.errors import FlywheelError
    from flywheel_tasks.release.readout_cli import flagged, in_flags, plan_files, read_out_files, render_plan
    from flywheel_tasks.release.table import render

    choices: dict[str, Any] = {
        "experiment": experiment, "control": control, "start": start, "days": days, "as_of": as_of,
        "estimand": estimand, "time_zone": time_zone, "naive_zone": naive_zone,
        "missing_days": tuple(missing_day or ()), "pre_days": pre_days,
        "segments": tuple(segment or ()), "alpha": alpha, "bad_rows": bad_rows, "partition_bits": partition_bits,
        "workers": workers,
    }  # fmt: skip
    try:
        config = _config(choices | {"allocation": _weights(allocation)})
        if plot is not None:
            new_file(plot, "--plot", ".png")
        if plan:
            found = plan_files(activity, config, share, power, tests, units)
            _print(found.as_json(), render_plan(found), as_json)
            return
        if not exposures:
            raise typer.BadParameter("give --exposures, or --plan to plan from the activity alone")
        result = in_flags(read_out_files(exposures, activity, config, plot))
    except FlywheelError as error:
        error.args = (flagged(str(error)),)
        raise typer.Exit(told(error)) from error
    _print(result.as_json(), render(result, problems=False), as_json)
    if result.status != "closed":
        print(visible(f"{result.status}: {'; '.join(result.problems)}"), file=sys.stderr)
        raise typer.Exit(RUNNING if result.status == "running" else REFUSED)


def layout(
    exposures: Annotated[list[str], Exposures],
    activity: Activity,
    out: Annotated[Path, typer.Option(help="Folder to write units.parquet and activity-DAY.parquet to.")],
    experiment: Experiment = None,
    naive_zone: NaiveZone = None,
    bad_rows: BadRows = "refuse",
    segment: Annotated[
        list[str] | None, typer.Option(help="A column of the exposures that readouts may split by; may repeat.")
    ] = None,
) -> None:
    """Number the units of an experiment once and sort its activity by day, for readouts that are many times faster.

    The store's `expose` does this by itself. For files of your own, run it when the day's activity arrives, then
    point `readout` (command or stage) at FOLDER/units.parquet and FOLDER/activity-*.parquet: the lifts, sets and
    decision are the same to the bit, for any window. Of the exposures' columns only those named with --segment are
    written beside the arm and the time.
    """
    from flywheel_tasks.core.commands import new_folder, told
    from flywheel_tasks.core.errors import FlywheelError
    from flywheel_tasks.release.layout import write_layout
    from flywheel_tasks.release.parts import find
    from flywheel_tasks.release.readout_cli import flagged

    choices = {"experiment": experiment, "naive_zone": naive_zone, "bad_rows": bad_rows}
    try:
        config = _config(choices | {"segments": segment or []})
        new_folder(out, "--out")
        counts = write_layout(find(exposures, "exposures"), find(activity, "activity"), config, out)
    except FlywheelError as error:
        error.args = (flagged(str(error)),)
        raise typer.Exit(told(error)) from error
    for rule, rows in sorted(counts.items()):
        typer.echo(f"{rows:,} {rule}", err=True)
    typer.echo(str(out))


def _config(choices: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from flywheel_tasks.core import problems
    from flywheel_tasks.core.errors import ConfigError
    from flywheel_tasks.release.readout_cli import flagged, option
    from flywheel_tasks.release.readout_config import ReadoutConfig

    try:
        return ReadoutConfig(**choices)
    except ValidationError as error:
        at, what = problems.first(error, ReadoutConfig)
        where = option(at.partition(".")[0]) if at else "readout"
        raise ConfigError(f"{where}: {flagged(what)}{problems.given(error)}") from error


def _weights(text: str | None) -> dict[str, float]:
    from flywheel_tasks.core.errors import ConfigError

    weights: dict[str, float] = {}
    for pair in text.split(",") if text else ():
        arm, _, weight = pair.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not arm.strip() or not 0 < number < math.inf or arm.strip() in weights:
            raise ConfigError(
                f"--allocation '{text}': write ARM=WEIGHT once for each arm, such as control=0.9,test=0.1"
            )
        weights[arm.strip()] = number
    return weights


def _print(plain: dict[str, Any], table: list[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plain, indent=1, allow_nan=False))
    else:
        show(*table)
