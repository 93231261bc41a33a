"""`flywheel status`, `show`, `lineage` and `forget`: a look at what the store holds, and at whose words."""

from __future__ import annotations

import datetime
from itertools import islice
from typing import Annotated, Any

import typer

from flywheel_tasks import pipeline
from flywheel_tasks.config_cli import as_yaml
from flywheel_tasks.core import ids, lineage
from flywheel_tasks.core.commands import AsJson, configured, print_json
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.manifest import Manifest
from flywheel_tasks.core.output import QUARANTINE
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.core.terminal import Table, say, show

_VALUE = 80
Made = list[tuple[str, Artifact | None]]


def register(app: typer.Typer) -> None:
    """Add the commands to the `flywheel` command."""
    over = configured(pipeline.load_config, "Whose store.")
    app.command("status")(over(status))
    app.command("show")(over(show_artifact))
    app.command("lineage")(over(lineage_of))
    app.command("forget")(over(forget))


def status(
    config: FlywheelConfig,
    cycle: Annotated[str | None, typer.Option("--cycle", help="One cycle instead of all.")] = None,
    as_json: AsJson = False,
) -> None:
    """What each cycle has made so far, and what is stale: made from an artifact that the cycle has since made anew."""
    store = Store(config.store.uri)
    cycles = [ids.cycle_id(cycle)] if cycle else store.cycles()
    found: dict[str, Made] = {n: [(s.name, store.pointed(n, s.name)) for s in pipeline.STAGES] for n in cycles}
    old = {name: stale(made) for name, made in found.items()}
    if as_json:
        print_json({n: {s: _summary(a.manifest, s in old[n]) if a else None for s, a in m} for n, m in found.items()})
        return
    if not cycles:
        print(f"no cycle has run in {store.uri}: start one with `flywheel cycle --cycle {_this_week()}`")
    for name, made in found.items():
        if not any(artifact for _, artifact in made):
            print(f"cycle {name} has not run in {store.uri}: start it with `flywheel cycle --cycle {name}`")
            continue
        head = ("stage", "artifact", "rows in", "out", "rejected", "finished", "")
        rows = [_status_row(stage, artifact, stage in old[name]) for stage, artifact in made]
        show(Table(head, rows, f"cycle {name}"))


def stale(made: Made) -> set[str]:
    """Stages whose artifact was made from another one than the cycle now has of its upstream, or from a stale one."""
    now = {stage: artifact for stage, artifact in made if artifact}
    found: set[str] = set()
    for stage in pipeline.STAGES:
        artifact = now.get(stage.name)
        for name, read in artifact.manifest.inputs.items() if artifact else ():
            wanted = stage.inputs.get(name)
            if wanted is None or wanted.previous or read.stage not in now:
                continue
            if now[read.stage].manifest.key != read.key or read.stage in found:
                found.add(stage.name)
    return found


def show_artifact(
    config: FlywheelConfig,
    artifact: Annotated[str, typer.Argument(help="Manifest URI, STAGE/KEY, or the beginning of a key.")],
    check: Annotated[bool, typer.Option("--verify", help="Also read every file and check its digest.")] = False,
    quarantine: Annotated[
        int | None,
        typer.Option("--quarantine", min=1, help="Instead: the first N rejected rows, each with its reason."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One artifact's manifest: what it holds, its rows, inputs, config and environment."""
    found = Store(config.store.uri).resolve(artifact)
    manifest = found.manifest
    if quarantine is not None:
        _show_rejected(found, quarantine, as_json)
        return
    verified = found.verify() if check else None
    if as_json:
        print_json(manifest.model_dump(mode="json") | {"uri": found.uri, "digest": manifest.digest})
        return
    say(f"{manifest.stage}/{manifest.key}  cycle {manifest.cycle}", found.uri, accounting(manifest), *_purged(manifest))
    if verified is not None:
        say(f"{verified} files verified")
    outputs = [
        (n, o.contract, len(o.files), o.rows or "", sum(f.bytes for f in o.files)) for n, o in manifest.outputs.items()
    ]
    _table(("output", "contract", "files", "rows", "bytes"), outputs)
    _table(("reads", "artifact"), [(n, f"{r.stage}/{r.key}") for n, r in manifest.inputs.items()])
    _table(("source", "bytes", "sha256"), [(s.uri, s.bytes, s.sha256[:16]) for s in manifest.sources])
    _table(("metric", "value"), [(n, f"{value:.6g}") for n, value in sorted(manifest.metrics.items())])
    _table(("config", "value"), sorted(_flat(manifest.config)))
    say(f"code {manifest.code_version}, commit {manifest.commit}, finished {manifest.finished:%Y-%m-%d %H:%M:%S} UTC")


def lineage_of(
    config: FlywheelConfig,
    artifact: Annotated[str | None, typer.Argument(help="Manifest URI, STAGE/KEY, or the beginning of a key.")] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="Instead: every artifact that holds this user's words.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What an artifact came from and what came of it, or where a user's words are."""
    store = Store(config.store.uri)
    if (artifact is None) == (user is None):
        raise InputError("give either an artifact or --user ID")
    if user is not None:
        _where_words_are(store, user, as_json)
        return
    found = lineage.describe(store, store.resolve(str(artifact)))
    if as_json:
        print_json(found)
        return
    say(f"{found['artifact']}  commit {found['commit']}  code {found['code_version']}")
    for direction in ("upstream", "downstream"):
        rows = [(e["artifact"], e["cycle"], _minute(e["finished"])) for e in found[direction]]
        _table((direction, "cycle", "finished"), rows)
    _table(("source", "sha256"), [(s["uri"], s["sha256"][:16]) for s in found["sources"]])
    for fault in found["damaged"].values():
        say(f"not told here: {fault}")


def forget(
    config: FlywheelConfig,
    user: Annotated[str, typer.Option("--user", help="The user's id as it stands in the raw logs.")],
    even_if_unknown: Annotated[
        bool, typer.Option("--even-if-unknown", help="Refuse the user's future rows also where no artifact holds them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Purge a user's words from every artifact, mark the models that learned from them, and prove it."""
    from flywheel_tasks.core.forget import check_key
    from flywheel_tasks.core.forget import forget as purge

    store, secret = Store(config.store.uri), ids.user_key()
    check_key(store, secret)
    if user.strip() and not even_if_unknown and not _is_known(store, ids.pseudonym(user, secret)):
        raise InputError(
            f"no artifact in {store.uri} holds a row of this user, so nothing was done: check the spelling "
            "against user_id in the raw logs (case counts), or give --even-if-unknown to refuse their future rows"
        )
    report = purge(store, user, secret)
    if as_json:
        print_json(report)
    else:
        _table(("purged from", "rows"), list(report["purged"].items()))
        _table(("must retrain",), [(name,) for name in report["retrain_needed"]])
        _table(("unfinished attempt",), [(name,) for name in report["unfinished_attempts"]])
        unknown = "no artifact ever held a row of this user (is the id spelt as in the raw logs?)"
        verdict = "no row of this user is left" if report["known"] else unknown
        verdict = f"rows are left: {report['remaining']}" if report["remaining"] else verdict
        say(f"user {report['user']}: {verdict}; new logs that hold them will be refused row by row")
    if not report["clean"]:
        raise FlywheelError("not clean yet: wait for the unfinished attempts to end, then run the same command again")


def accounting(manifest: Manifest) -> str:
    """In one line how many rows went in, came out and were rejected, and why."""
    rows = manifest.rows
    if rows is None:
        return "no rows to account for"
    reasons = sorted(rows.reasons.items(), key=lambda item: -item[1])
    why = f" ({'; '.join(f'{reason}: {count:,}' for reason, count in reasons)})" if reasons else ""
    return f"{rows.rows_in:,} {rows.unit}s in, {rows.rows_out:,} out, {rows.rows_rejected:,} rejected{why}"


def _purged(manifest: Manifest) -> list[str]:
    gone = [entry for entry in manifest.forgotten if entry.rows]
    lines = []
    if gone:
        users, last = len({entry.user for entry in gone}), max(entry.at for entry in gone)
        rows = sum(entry.rows for entry in gone)
        lines.append(
            f"since then purged: {rows:,} rows of {users:,} forgotten users, last on {last:%Y-%m-%d %H:%M} UTC"
        )
    if any(entry.retrain_needed for entry in manifest.forgotten):
        lines.append("must retrain: it learned from users who were forgotten since")
    return lines


def _show_rejected(artifact: Artifact, limit: int, as_json: bool) -> None:
    if QUARANTINE not in artifact.manifest.outputs:
        print_json([]) if as_json else print("no row was rejected")
        return
    batches = artifact.table(QUARANTINE).batches(["reason", "where", "row_id", "raw"], batch_size=limit)
    rows = list(islice((row for batch in batches for row in batch.to_pylist()), limit))
    if as_json:
        print_json(rows)
        return
    _table(("reason", "where", "row"), [(r["reason"], _cut(r["where"]), _cut(r["raw"] or r["row_id"])) for r in rows])
    total = artifact.manifest.outputs[QUARANTINE].rows
    print(f"{len(rows):,} of {total:,} rejected rows")


def _where_words_are(store: Store, user: str, as_json: bool) -> None:
    pseudonym = ids.pseudonym(user, ids.user_key())
    held = {"/".join(lineage.address(a.manifest)): lineage.held_rows(a, pseudonym) for a in store.artifacts()}
    held = {name: rows for name, rows in held.items() if rows}
    if as_json:
        print_json({"user": pseudonym, "artifacts": held})
    elif held:
        _table(("artifact", "rows"), [(n, ", ".join(f"{o} {c:,}" for o, c in r.items())) for n, r in held.items()])
    else:
        gone = (
            ": new rows of theirs are refused (forget)"
            if pseudonym in store.forgotten()
            else ": check the spelling in the raw logs"
        )
        say(f"no artifact in {store.uri} holds a row of this user{gone}")


def _is_known(store: Store, pseudonym: str) -> bool:
    """Whether there is anything to purge, or was once."""
    return pseudonym in store.forgotten() or any(
        lineage.held_rows(artifact, pseudonym) for artifact in store.artifacts()
    )


def _summary(manifest: Manifest, is_stale: bool) -> dict[str, Any]:
    plain = manifest.model_dump(mode="json", include={"key", "rows", "finished", "metrics", "commit"})
    return plain | {"digest": manifest.digest, "stale": is_stale}


def _status_row(stage: str, artifact: Artifact | None, is_stale: bool) -> tuple[object, ...]:
    if artifact is None:
        return stage, "—", "", "", "", "", ""
    manifest, rows = artifact.manifest, artifact.manifest.rows
    counts = (f"{rows.rows_in:,}", f"{rows.rows_out:,}", f"{rows.rows_rejected:,}") if rows else ("", "", "")
    return (
        stage,
        manifest.key[:12],
        *counts,
        f"{manifest.finished:%m-%d %H:%M}",
        ("stale" if is_stale else "", "yellow"),
    )


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys, and their values as YAML."""
    if isinstance(value, dict) and value:
        return [
            pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, as_yaml(value))]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    if rows:
        show(Table(head, rows))


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _VALUE else text[: _VALUE - 1] + "…"


def _this_week() -> str:
    return ids.cycle_of(datetime.datetime.now(datetime.UTC).date())
