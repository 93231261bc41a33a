"""The `flywheel` command. Results go to stdout, everything a person reads along the way to stderr."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flywheel_tasks import pipeline, services_cli
from flywheel_tasks.annotation import commands as annotation_commands
from flywheel_tasks.core import ids, receipts
from flywheel_tasks.core.commands import configured, told
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.stage import Stage
from flywheel_tasks.core.store import Artifact, Store
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
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

over = configured(pipeline.load_config, example="ingest.continue_minutes=15")


@app.command()
def stages(as_json: AsJson = False) -> None:
    """List the stages in the order of the loop: phase, paper section, what they read and write. With --json also what
    they do and their config."""
    if as_json:
        _print_json([stage.declaration() for stage in pipeline.STAGES])
        return
    reads = {s.name: dict.fromkeys(i.stage for i in s.inputs.values()) for s in pipeline.STAGES}
    rows = [(s.name, s.phase, s.paper, ", ".join(reads[s.name]), ", ".join(s.outputs)) for s in pipeline.STAGES]
    _print_table(("stage", "phase", "paper", "reads from", "writes"), rows)


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
        _print_json({"outcome": outcome, "uri": artifact.uri, "manifest": artifact.manifest.model_dump(mode="json")})
    else:
        print(artifact.uri)


@app.command()
@over
def cycle(
    config: FlywheelConfig,
    cycle: Cycle,
    skip: Annotated[list[str] | None, typer.Option("--skip", help="A stage to leave out. Repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole cycle in this process, stage after stage. Stages whose artifact exists are not run again."""
    left_out = {pipeline.by_name(name).name for name in skip or []}
    results = []
    for stage in pipeline.weekly():
        if stage.name not in left_out:
            artifact, outcome = _run_stage(stage, cycle, config, {})
            results.append({"stage": stage.name, "outcome": outcome, "key": artifact.manifest.key, "uri": artifact.uri})
    if as_json:
        _print_json(results)
    else:
        _print_table(("stage", "outcome", "artifact"), [(r["stage"], r["outcome"], r["key"]) for r in results])


@app.command()
@over
def status(
    config: FlywheelConfig,
    cycle: Annotated[str | None, typer.Option("--cycle", help="One cycle instead of all.")] = None,
    as_json: AsJson = False,
) -> None:
    """What each cycle has made so far."""
    store = Store(config.store.uri)
    cycles = [ids.cycle_id(cycle)] if cycle else store.cycles()
    found = {name: [(stage.name, store.pointed(name, stage.name)) for stage in pipeline.STAGES] for name in cycles}
    if as_json:
        _print_json({name: {s: _summary(a.manifest) if a else None for s, a in rows} for name, rows in found.items()})
        return
    if not cycles:
        print(f"no cycle has run in {store.uri}: start one with `flywheel cycle --cycle {_this_week()}`")
    for name, rows in found.items():
        print(f"cycle {name}")
        head = ("stage", "artifact", "rows in", "out", "rejected", "finished")
        _print_table(head, [_status_row(stage, artifact) for stage, artifact in rows])


@app.command()
@over
def show(
    config: FlywheelConfig,
    artifact: Annotated[str, typer.Argument(help="Manifest URI, STAGE/KEY, or the beginning of a key.")],
    check: Annotated[bool, typer.Option("--verify", help="Also read every file and check its digest.")] = False,
    as_json: AsJson = False,
) -> None:
    """One artifact's manifest: what it holds, its rows, inputs, config and environment."""
    found = Store(config.store.uri).resolve(artifact)
    if check:
        _say(f"{found.verify()} files verified")
    manifest = found.manifest
    if as_json:
        _print_json(manifest.model_dump(mode="json") | {"uri": found.uri, "digest": manifest.digest})
        return
    print(f"{manifest.stage}/{manifest.key}  cycle {manifest.cycle}\n{found.uri}\n{_accounting(manifest)}")
    rows = [
        (n, o.contract, len(o.files), o.rows or "", sum(f.bytes for f in o.files)) for n, o in manifest.outputs.items()
    ]
    _print_table(("output", "contract", "files", "rows", "bytes"), rows)
    _print_table(("reads", "artifact"), [(n, f"{r.stage}/{r.key}") for n, r in manifest.inputs.items()])
    _print_table(("source", "bytes", "sha256"), [(s.uri, s.bytes, s.sha256[:16]) for s in manifest.sources])
    _print_table(("metric", "value"), sorted(manifest.metrics.items()))
    _print_table(("config", "value"), sorted((k, str(v)) for k, v in manifest.config.items()))
    print(f"code {manifest.code_version}, commit {manifest.commit}, finished {manifest.finished:%Y-%m-%d %H:%M:%S} UTC")


@app.command()
@over
def lineage(
    config: FlywheelConfig,
    artifact: Annotated[str | None, typer.Argument(help="Manifest URI, STAGE/KEY, or the beginning of a key.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="Instead: every artifact that holds this user's words.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What an artifact came from and what came of it, or where a user's words are."""
    from flywheel_tasks.core import lineage as graph

    store = Store(config.store.uri)
    if (artifact is None) == (user is None):
        raise InputError("give either an artifact or --user ID")
    if user is not None:
        pseudonym = ids.pseudonym(user, ids.user_key())
        held = {"/".join(graph.address(a.manifest)): graph.held_rows(a, pseudonym) for a in store.artifacts()}
        held = {name: rows for name, rows in held.items() if rows}
        if as_json:
            _print_json({"user": pseudonym, "artifacts": held})
        else:
            _print_table(
                ("artifact", "rows"), [(n, ", ".join(f"{o} {c}" for o, c in r.items())) for n, r in held.items()]
            )
        return
    found = graph.describe(store, store.resolve(str(artifact)))
    if as_json:
        _print_json(found)
        return
    print(f"{found['artifact']}  commit {found['commit']}  code {found['code_version']}")
    for direction in ("upstream", "downstream"):
        _print_table(
            (direction, "cycle", "finished"), [(e["artifact"], e["cycle"], e["finished"]) for e in found[direction]]
        )
    _print_table(("source", "sha256"), [(s["uri"], s["sha256"][:16]) for s in found["sources"]])


@app.command()
@over
def forget(
    config: FlywheelConfig,
    user: Annotated[str, typer.Option("--user", help="The user's id as it stands in the raw logs.")],
    as_json: AsJson = False,
) -> None:
    """Purge a user's words from every artifact, mark the models that learned from them, and prove it."""
    from flywheel_tasks.core.forget import forget as purge

    report = purge(Store(config.store.uri), user, ids.user_key())
    if as_json:
        _print_json(report)
    else:
        _print_table(("purged from", "rows"), list(report["purged"].items()))
        _print_table(("must retrain",), [(name,) for name in report["retrain_needed"]])
        _print_table(("unfinished attempt",), [(name,) for name in report["unfinished_attempts"]])
        verdict = "no row of this user is left" if report["known"] else "no artifact ever held a row of this user"
        verdict = f"rows are left: {report['remaining']}" if report["remaining"] else verdict
        print(f"user {report['user']}: {verdict}; new logs that hold them will be refused row by row")
    if not report["clean"]:
        raise FlywheelError("not clean yet: wait for the unfinished attempts to end, then run the same command again")


def main() -> None:
    """Entry point: errors meant for people are one line, and SIGTERM unwinds so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="flywheel", standalone_mode=False) or 0)
    except FlywheelError as error:
        sys.exit(told(error))
    except typer.TyperException as error:
        sys.exit(told(InputError(_usage(error))))
    except BrokenPipeError:
        sys.exit(1)


def _usage(error: Any) -> str:
    """What is wrong with the command line, in one line."""
    what = " ".join(error.format_message().split()).rstrip(".")
    return f"{what}: see `{error.ctx.command_path if error.ctx else 'flywheel'} --help`"


def _run_stage(stage: Stage, cycle: str, config: FlywheelConfig, given: dict[str, str]) -> tuple[Artifact, str]:
    from flywheel_tasks.core.runner import run_stage

    started, store, cycle = time.monotonic(), Store(config.store.uri), ids.cycle_id(cycle)
    _say(f"── {stage.name} · {cycle} · {stage.paper}")
    result = run_stage(stage, cycle, for_stage(config, stage.name, store, cycle), store, given)
    if stage.name in ("promote", "readout"):
        champion_commands.follow(store, config, cycle)
        if result.outcome == "made":
            evaluation_commands.log_page(store, config, cycle)
    manifest = result.artifact.manifest
    outcome = {"made": "made", "cached": "already there:", "lost": "another attempt was first:"}[result.outcome]
    _say(f"{stage.name}: {_accounting(manifest)}")
    _say(f"{stage.name}: {outcome} {manifest.folder} ({time.monotonic() - started:.1f} s)")
    return result.artifact, result.outcome


def _accounting(manifest: Manifest) -> str:
    rows = manifest.rows
    if rows is None:
        return "no rows to account for"
    reasons = sorted(rows.reasons.items(), key=lambda item: -item[1])
    why = f" ({'; '.join(f'{reason}: {count:,}' for reason, count in reasons)})" if reasons else ""
    return f"{rows.rows_in:,} {rows.unit}s in, {rows.rows_out:,} out, {rows.rows_rejected:,} rejected{why}"


def _summary(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json", include={"key", "rows", "finished", "metrics", "commit"}) | {
        "digest": manifest.digest
    }


def _status_row(stage: str, artifact: Artifact | None) -> tuple[object, ...]:
    if artifact is None:
        return stage, "—", "", "", "", ""
    manifest, rows = artifact.manifest, artifact.manifest.rows
    counts = (f"{rows.rows_in:,}", f"{rows.rows_out:,}", f"{rows.rows_rejected:,}") if rows else ("", "", "")
    return stage, manifest.key[:12], *counts, f"{manifest.finished:%Y-%m-%d %H:%M}"


def _given(pairs: list[str]) -> dict[str, str]:
    given = {}
    for pair in pairs:
        stage, equals, uri = pair.partition("=")
        if not equals:
            raise InputError(f"--input '{pair}' is not STAGE=MANIFEST_URI")
        given[pipeline.by_name(stage).name] = uri
    return given


def _this_week() -> str:
    import datetime

    return ids.cycle_of(datetime.datetime.now(datetime.UTC).date())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str, ensure_ascii=False))


def _print_table(head: Iterable[str], rows: list[tuple[Any, ...]]) -> None:
    if not rows:
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
    Console(soft_wrap=False).print(table)


release_commands.register(app)
services_cli.register(app)
annotation_commands.register(app, pipeline.load_config)
evaluation_commands.register(app, pipeline.load_config)
champion_commands.register(app, pipeline.load_config)

if __name__ == "__main__":
    main()
