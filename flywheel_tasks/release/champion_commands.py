"""`flywheel answer`, `crown`, `rollback` and `champion`: every way in which who reigns can change."""

from __future__ import annotations

import getpass
import json
import sys
from typing import Annotated

import typer

from flywheel_tasks.core.commands import Settings, configured
from flywheel_tasks.core.config import FlywheelConfig, without_password
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.core.terminal import Table, say
from flywheel_tasks.core.terminal import show as show_parts
from flywheel_tasks.release import champion as rules
from flywheel_tasks.release import ledger

UNCHANGED = 3

By = Annotated[str | None, typer.Option("--by", help="Who decides (default: the user at this machine).")]
Why = Annotated[str, typer.Option("--why", help="The reason; it is kept in the ledger.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def register(app: typer.Typer, settings: Settings) -> None:
    """Add the commands; `settings` builds the configuration from profile, file and overrides."""
    over = configured(settings, "Whose store and tracking server.")

    @app.command()
    @over
    def answer(
        config: FlywheelConfig,
        said: Annotated[str, typer.Argument(help="approve, reject, or timeout (nobody answered in time).")],
        cycle: Annotated[str, typer.Option("--cycle", help="The cycle whose gate said HOLD.")],
        why: Why = "",
        by: By = None,
        shown: Annotated[
            str | None, typer.Option("--gate", help="The gate that was looked at (STAGE/KEY): an answer to no other.")
        ] = None,
    ) -> None:
        """Answer a HOLD of the gate. The first answer stands; it is kept with who gave it and why."""
        if said not in ("approve", "reject", "timeout"):
            raise InputError(f"'{said}' is no answer: say approve, reject or timeout")
        store = Store(config.store.uri)
        gate = _artifact(store, cycle, "gate")
        if shown and shown != (now := f"gate/{gate.manifest.key}"):
            raise InputError(
                f"{cycle} was judged again: the answer is to {shown}, and its gate is now {now}; answer that"
            )
        record = gate.manifest.inputs["responses"]
        model = rules.answered_as(store.get(record.stage, record.key), "candidate")
        age = config.stages["promote"].max_age_days  # type: ignore[attr-defined]
        entry = rules.answer(store, gate, model, said, by or getpass.getuser(), why, age)  # type: ignore[arg-type]
        _report(entry, store, config)

    @app.command()
    @over
    def crown(
        config: FlywheelConfig,
        cycle: Annotated[str, typer.Option("--cycle", help="The cycle in which the readout ran.")],
        readout: Annotated[
            str | None, typer.Option("--readout", help="That readout's manifest URI or STAGE/KEY.")
        ] = None,
        by: By = None,
    ) -> None:
        """Make the candidate champion if its closed readout says ship; exit code 3 where nothing changes."""
        store = Store(config.store.uri)
        found = store.resolve(readout) if readout else _artifact(store, cycle, "readout")
        entry = rules.crown(store, found, by or "the readout")
        if entry is None:
            print("nothing changes: no closed readout of a candidate says ship, or it was crowned before")
            raise typer.Exit(UNCHANGED)
        _report(entry, store, config)

    @app.command()
    @over
    def rollback(
        config: FlywheelConfig,
        why: Why,
        by: By = None,
        champion: Annotated[
            str | None, typer.Option("--champion", help="Only if this one (STAGE/KEY) reigns now.")
        ] = None,
    ) -> None:
        """Put the champion before this one back into production, at once."""
        store = Store(config.store.uri)
        _report(rules.rollback(store, by or getpass.getuser(), why, champion), store, config)

    @app.command("champion")
    @over
    def show(
        config: FlywheelConfig,
        as_json: AsJson = False,
        sync: Annotated[bool, typer.Option("--sync", help="Also bring the registry's aliases up to date.")] = False,
        cycle: Annotated[
            str | None, typer.Option("--cycle", help="With --sync: log this cycle's numbers on its candidate too.")
        ] = None,
    ) -> None:
        """Who is champion and candidate, and every change with who made it and why."""
        if cycle and not sync:
            raise InputError("--cycle says which cycle's numbers --sync logs: give --sync too")
        store = Store(config.store.uri)
        state = ledger.read(store.storage)
        if sync:
            follow(store, config, cycle)
        if as_json:
            plain = {"champion": _path(state.champion, store), "candidate": _path(state.candidate, store)}
            print(json.dumps(plain | {"ledger": ledger.lines(state)}, indent=1))
            return
        _table(state)


def follow(store: Store, config: FlywheelConfig, cycle: str | None = None) -> None:
    """Bring the registry up to the ledger, and a cycle's numbers onto its candidate's logged model; a tracking server
    that is down costs a warning."""
    from flywheel_tasks.release import registry

    try:
        registry.follow(store, config.tracking.uri)
        if cycle:
            registry.publish(store, config.tracking.uri, cycle)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        where = without_password(config.tracking.uri)
        print(
            f"warning: the registry at {where} did not follow: {reason}; later: flywheel champion --sync",
            file=sys.stderr,
        )


def _artifact(store: Store, cycle: str, stage: str) -> Artifact:
    found = store.pointed(cycle, stage)
    if found is None:
        raise InputError(f"{cycle} has no {stage} in {store.uri}: run `flywheel run {stage} --cycle {cycle}` first")
    return found


def _report(entry: ledger.Entry, store: Store, config: FlywheelConfig) -> None:
    follow(store, config, entry.cycle)
    say(f"{entry.number}  {entry.action}  {ledger.title(entry.model)}  {entry.cycle}  by {entry.by}: {entry.why}")


def _path(model: ledger.Model | None, store: Store) -> str | None:
    return model.path(store.uri) if model else None


def _table(state: ledger.State) -> None:
    show_parts(f"champion   {ledger.title(state.champion)}", f"candidate  {state.candidate or 'none'}")
    if not state.entries:
        print("no change yet: the ledger is empty")
        return
    rows = [
        (str(e.number), e.action, ledger.title(e.model), e.cycle, f"{e.at:%Y-%m-%d %H:%M}", e.by, e.why)
        for e in state.entries
    ]
    show_parts(Table(("", "what", "model", "cycle", "when", "by", "why"), rows))
