"""The commands of `flywheel`. Results go to stdout, everything a person reads along the way to stderr."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flywheel_tasks import config_cli, pipeline, services_cli, store_cli
from flywheel_tasks.annotation import commands as annotation_commands
from flywheel_tasks.core import ids, receipts
from flywheel_tasks.core.commands import AsJson, configured, print_json, told
from flywheel_tasks.core.config import FlywheelConfig, home
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.stage import Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.core.terminal import Table, show
from flywheel_tasks.evaluation import commands as evaluation_commands
from flywheel_tasks.release import champion_commands
from flywheel_tasks.release import commands as release_commands
from flywheel_tasks.release.reign import for_stage


class Overview(TyperGroup):
    """The list of commands with the whole first sentence of each, where click would cut it to the line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(300)) for name, command in commands if command])


app = typer.Typer(
    name="flywheel",
    cls=Overview,
    help="Run the CharacterFlywheel loop: one stage, one cycle, or a look at what it made.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Cycle = Annotated[str, typer.Option("--cycle", help="ISO week, such as 2026-W47.")]

over = configured(pipeline.load_config, example="ingest.continue_minutes=15")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"flywheel {version('character-flywheel')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def stages(as_json: AsJson = False) -> None:
    """List the stages in the order of the loop: phase, paper section, what they read and write. With --json also what
    they do and their config."""
    if as_json:
        print_json([stage.declaration() for stage in pipeline.STAGES])
        return
    rows: list[tuple[object, ...]] = []
    for number, stage in enumerate(pipeline.STAGES):
        if number == 0 or pipeline.STAGES[number - 1].phase != stage.phase:
            rows.append(((f"{stage.phase}:", "bold"), "", "", ""))
        reads = ", ".join(dict.fromkeys(wanted.stage for wanted in stage.inputs.values()))
        rows.append((f"  {stage.name}", stage.paper, reads, ", ".join(stage.outputs)))
    show(Table(("stage", "paper", "reads from", "writes"), rows))


@app.command()
@over
def run(
    config: FlywheelConfig,
    stage: Annotated[str, typer.Argument(help="A stage name; see `flywheel stages`.")],
    cycle: Cycle,
    input_: Annotated[
        list[str] | None,
        typer.Option("--input", help="STAGE=MANIFEST_URI to read instead of this cycle's artifact. Repeatable."),
    ] = None,
    receipt: Annotated[
        str | None,
        typer.Option(
            help="Also leave the manifest's URI in the store under this name, for a caller that sees no stdout."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run one stage of one cycle. The last line of stdout is the URI of the artifact's manifest."""
    artifact, outcome = _run_stage(pipeline.by_name(stage), cycle, config, _given(input_ or []))
    if receipt:
        receipts.leave(Store(config.store.uri), receipt, artifact)
    if as_json:
        print_json({"outcome": outcome, "uri": artifact.uri, "manifest": artifact.manifest.model_dump(mode="json")})
    else:
        print(artifact.uri)


@app.command()
@over
def cycle(
    config: FlywheelConfig,
    cycle: Cycle,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="A stage to leave out. Repeatable.")] = None,
    until: Annotated[
        str | None, typer.Option(help="The last stage to run: annotate-export, before people judge what it sent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole cycle in this process, stage after stage. Stages whose artifact exists are not run again."""
    left_out = {pipeline.by_name(name).name for name in skip or []}
    last = pipeline.by_name(until) if until else None
    if last and last not in pipeline.weekly():
        raise InputError(f"--until {until}: it runs every day, not in a cycle; see `flywheel stages`")
    results = []
    for stage in pipeline.until(last):
        if stage.name not in left_out:
            artifact, outcome = _run_stage(stage, cycle, config, {})
            results.append({"stage": stage.name, "outcome": outcome, "key": artifact.manifest.key, "uri": artifact.uri})
    if as_json:
        print_json(results)
    else:
        show(Table(("stage", "outcome", "artifact"), [(r["stage"], r["outcome"], r["key"]) for r in results]))


def run_app(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    try:
        return app(arguments, prog_name="flywheel", standalone_mode=False) or 0
    except FlywheelError as error:
        return told(error)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except typer.TyperException as error:
        return told(InputError(_usage(error)))


def _usage(error: Any) -> str:
    """What is wrong with the command line, in one line."""
    what = " ".join(error.format_message().split()).rstrip(".")
    return f"{what}: see `{error.ctx.command_path if error.ctx else 'flywheel'} --help`"


def _run_stage(stage: Stage, cycle: str, config: FlywheelConfig, given: dict[str, str]) -> tuple[Artifact, str]:
    from flywheel_tasks.core.runner import run_stage

    started, store, cycle = time.monotonic(), Store(config.store.uri), ids.cycle_id(cycle)
    if store.uri.startswith(f"file://{home().absolute()}/"):
        from flywheel_tasks.services import state_dir

        state_dir()  # readable by its owner only: chats are in the store before they are scrubbed
    _say(f"── {stage.name} · {cycle} · {stage.paper}")
    result = run_stage(stage, cycle, for_stage(config, stage.name, store, cycle), store, given)
    if stage.name in ("promote", "readout"):
        champion_commands.follow(store, config, cycle)
        if result.outcome == "made":
            evaluation_commands.log_page(store, config, cycle)
    manifest = result.artifact.manifest
    outcome = {"made": "made", "cached": "already there:", "lost": "another attempt was first:"}[result.outcome]
    _say(f"{stage.name}: {store_cli.accounting(manifest)}")
    _say(f"{stage.name}: {outcome} {manifest.folder} ({time.monotonic() - started:.1f} s)")
    return result.artifact, result.outcome


def _given(pairs: list[str]) -> dict[str, str]:
    given = {}
    for pair in pairs:
        stage, equals, uri = pair.partition("=")
        if not equals:
            raise InputError(f"--input '{pair}' is not STAGE=MANIFEST_URI")
        given[pipeline.by_name(stage).name] = uri
    return given


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


store_cli.register(app)
config_cli.register(app)
release_commands.register(app)
services_cli.register(app)
annotation_commands.register(app, pipeline.load_config)
evaluation_commands.register(app, pipeline.load_config)
champion_commands.register(app, pipeline.load_config)
