"""The `flywheel gate` and `flywheel report` commands; `register` adds them to the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flywheel_tasks.core import ids
from flywheel_tasks.core.commands import Settings, configured, new_file, new_folder
from flywheel_tasks.core.config import FlywheelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Store
from flywheel_tasks.core.terminal import show

EXIT = {"PASS": 0, "HOLD": 3, "BLOCK": 4}


def register(app: typer.Typer, settings: Settings) -> None:
    """Add `gate` and `report`; `settings` builds the configuration from profile, file and overrides."""

    @app.command("gate")
    @configured(settings, "Whose thresholds and requirements.", "gate.require=[]")
    def gate(
        config: FlywheelConfig,
        evidence: Annotated[
            Path | None, typer.Option(help="Evidence as JSON: rm_win_rate and more; '-' reads standard input.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
        backtest: Annotated[
            Path | None, typer.Option(help="Instead: replay a history (CSV in the columns of Table 10).")
        ] = None,
        page: Annotated[Path | None, typer.Option(help="Also write the decision as an HTML page.")] = None,
        now: Annotated[
            str | None, typer.Option(help="Judge the evidence's age at this time, ISO 8601 (default: now).")
        ] = None,
    ) -> None:
        """Decide on a candidate from evidence: PASS (exit 0), HOLD (exit 3) or BLOCK (exit 4), with each rule's reason.

        A minimal document, where the profile requires no more:

        \b
        flywheel gate --set 'gate.require=[]' --evidence - <<END
        {"rm_win_rate": {"pointwise_user": {"rate": 0.58, "n": 2000}}}
        END

        Evidence that the profile requires (gate.require) and that is missing blocks.
        """
        if evidence and backtest:
            raise InputError("give --evidence FILE or --backtest FILE, not both")
        if page:
            new_file(page, "--page", ".html")
        found = config.stages["gate"]
        raise typer.Exit(
            _history(backtest, found, as_json) if backtest else _decision(evidence, found, now, as_json, page)
        )

    @app.command("report")
    @configured(settings, "Whose store.")
    def report(
        config: FlywheelConfig,
        out: Annotated[Path, typer.Option(help="Folder for index.html and its figures.")],
        cycle: Annotated[str | None, typer.Option("--cycle", help="Up to this cycle (default: all).")] = None,
        history: Annotated[
            Path | None, typer.Option(help="Instead of the store: a CSV in the columns of Table 10.")
        ] = None,
        examples: Annotated[
            bool, typer.Option(help="Show conversations side by side. `forget` can't take them back from a file.")
        ] = True,
        log: Annotated[
            bool, typer.Option("--log", help="Also log the page, without conversations, to the cycle's MLflow run.")
        ] = False,
    ) -> None:
        """Write the weekly page: decision, win-rates, metrics, lifts and benchmarks, of this version and over all."""
        _report(out, cycle, history, examples, log, config)


def log_page(store: Store, config: FlywheelConfig, cycle: str) -> None:
    """Put the page of the weeks until `cycle`, without conversations, into the cycle's MLflow run; a tracking server
    that is down costs a warning."""
    from flywheel_tasks.evaluation import report
    from flywheel_tasks.evaluation.history import from_store

    try:
        versions = [v for v in from_store(store) if v.name <= ids.cycle_id(cycle)]
        if versions:
            report.log(versions, report.page_of(store, versions, examples=False), config.tracking.uri)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        print(f"warning: the page of {cycle} is not in MLflow: {reason}; later: flywheel report --log", file=sys.stderr)


def _report(out: Path, cycle: str | None, csv: Path | None, examples: bool, log: bool, config: FlywheelConfig) -> None:
    from flywheel_tasks.evaluation import report
    from flywheel_tasks.evaluation.history import from_csv, from_store

    new_folder(out, "--out")
    if csv and (cycle or log):
        raise InputError(f"--history {csv}: {'--cycle' if cycle else '--log'} is about a store: leave one of them out")
    if csv:
        versions, page = from_csv(csv), report.Page(source=csv.name)
    else:
        store = Store(config.store.uri)
        versions = [v for v in from_store(store) if cycle is None or v.name <= ids.cycle_id(cycle)]
        page = report.page_of(store, versions, examples=examples)
    written = report.write(versions, page, out)
    if log and versions:
        report.log(versions, page._replace(examples=()), config.tracking.uri)
    print(written[0])


def _decision(path: Path | None, config: Any, now: str | None, as_json: bool, page_to: Path | None) -> int:
    from flywheel_tasks.evaluation import gate_view
    from flywheel_tasks.evaluation.evidence import parse
    from flywheel_tasks.evaluation.gate import decide

    if path is None:
        raise InputError("give --evidence FILE (JSON), or --backtest FILE (CSV)")
    found = decide(parse(_read(path), "standard input" if str(path) == "-" else str(path)), config, _moment(now))
    if page_to:
        _write(page_to, gate_view.page(found, "Gate", {"evidence": str(path)}))
    _show(found.as_json(), gate_view.render(found), as_json)
    return EXIT[found.decision]


def _history(path: Path, config: Any, as_json: bool) -> int:
    from flywheel_tasks.evaluation import gate_view
    from flywheel_tasks.evaluation.backtest import backtest
    from flywheel_tasks.evaluation.history import from_csv

    versions = backtest(from_csv(path), config)
    _show(gate_view.history_json(versions), gate_view.render_history(versions), as_json)
    return 0


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise InputError(f"evidence {path}: {error.strerror or error}: check the path") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--page {path}: {error.strerror or error}: check the folder") from error


def _moment(text: str | None) -> Any:
    from datetime import UTC, datetime

    if text is None:
        return datetime.now(UTC)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"--now '{text[:40]}' is not a time: write it like 2026-11-20T10:00:00+00:00") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _show(plain: dict[str, Any], table: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain, indent=1, allow_nan=False))
    else:
        show(*table)
