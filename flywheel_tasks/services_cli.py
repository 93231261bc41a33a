"""`flywheel up` and `flywheel demo`."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands that need Airflow to the `flywheel` command."""
    app.command("up")(up)
    app.command("demo")(demo)


def up() -> None:
    """Run Airflow and MLflow on this machine, on 127.0.0.1 behind a generated password, until Ctrl-C."""
    from flywheel_tasks import services

    services.up(typer.echo)


def demo(
    cycle: Annotated[str, typer.Option(help="Cycle to run, an ISO week such as 2026-W47 (empty: this week)")] = "",
    cycles: Annotated[int, typer.Option(min=1, max=52, help="How many weeks in a row, from that one on")] = 1,
) -> None:
    """Simulate a week of traffic, run one whole cycle through the Airflow DAG on this machine, and the A/B week that
    decides on its candidate."""
    from flywheel_tasks.demo import run_demo

    raise typer.Exit(run_demo(cycle, typer.echo, cycles))
