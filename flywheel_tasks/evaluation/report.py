"""`flywheel report`: the weekly page, about the latest version and over all of them (Figures 8 and 10, Table 10).

One HTML file that needs nothing else, and its figures as PNG. Every text is escaped; nothing is fetched, nothing runs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Store
from flywheel_tasks.evaluation import figures
from flywheel_tasks.evaluation.gate_view import html
from flywheel_tasks.evaluation.history import BENCHMARKS, CHARACTERISTICS, LANGUAGE, Number, Row, Version, groups
from flywheel_tasks.stats.winrate import difference

INDEX = "index.html"


class Page(NamedTuple):
    """What a report shows beside its versions."""

    source: str
    ledger: Sequence[Any] = ()
    examples: Sequence[Mapping[str, Any]] = ()
    waiting: str = ""


def write(versions: Sequence[Version], page: Page, out: Path) -> list[Path]:
    """Write the page and its figures into `out`."""
    images = {}
    if versions:
        images = {
            "band": figures.band(versions[-1]),
            "figure_8": figures.figure_8(versions),
            "figure_10": figures.figure_10(versions),
        }
    text = html(
        "report.html.j2",
        latest=versions[-1] if versions else None,
        versions=list(versions),
        source=page.source,
        waiting=page.waiting,
        cards=_cards(versions[-1]) if versions else [],
        changes=_changes(versions[-1]) if versions else [],
        table=_table(list(versions)),
        mark=figures.MARK,
        unproven=sorted({number.why for v in versions for number in v.numbers.values() if number.why}),
        images={name: base64.b64encode(data).decode() for name, data in images.items()},
        ledger=list(page.ledger),
        examples=list(page.examples),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [out / INDEX]
        written[0].write_text(text, encoding="utf-8")
        for name, data in images.items():
            written.append(out / f"{name}.png")
            written[-1].write_bytes(data)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}: give a folder that can be written to") from error
    return written


def log(versions: Sequence[Version], page: Page, uri: str) -> None:
    """Put the page into the run of its cycle."""
    import tempfile

    from mlflow.tracking import MlflowClient

    from flywheel_tasks.core.tracking import EXPERIMENT

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    cycle = versions[-1].name
    wanted = f"tags.cycle = '{cycle}' and tags.kind = 'cycle'"
    runs = client.search_runs([experiment.experiment_id], wanted, max_results=1) if experiment else []
    if not runs:
        raise InputError(f"MLflow has no run of cycle {cycle}: check tracking.uri")
    with tempfile.TemporaryDirectory(prefix="flywheel-") as folder:
        write(versions, page, Path(folder))
        client.log_artifacts(runs[0].info.run_id, folder, "report")


def page_of(store: Store, versions: Sequence[Version], *, examples: bool) -> Page:
    """The store's own page; `examples` puts conversations on it, which `forget` can't take back."""
    from flywheel_tasks.release.ledger import read

    latest = versions[-1] if versions else None
    waiting = ""
    if latest and latest.outcome == "held":
        answered = {e.cycle for e in read(store.storage).entries if e.action in ("nominate", "refuse")}
        if latest.name not in answered:
            waiting = (
                f"the gate held {latest.name}. Approve or reject it in Airflow, or with: "
                f"flywheel answer approve --cycle {latest.name} --why REASON"
            )
    return Page(
        source=store.uri,
        ledger=[e for e in reversed(read(store.storage).entries) if latest and e.cycle <= latest.name],
        examples=_examples(store, latest.name) if examples and latest else (),
        waiting=waiting,
    )


def _examples(store: Store, cycle: str) -> list[dict[str, Any]]:
    from flywheel_tasks.evaluation.examples import side_by_side

    winrate, constrain = store.pointed(cycle, "winrate"), store.pointed(cycle, "constrain")
    if winrate is None or constrain is None:
        return []
    sources = constrain.table("prompts").read(["prompt_id", "source"])
    return side_by_side(winrate.table("scored").read(), sources)


def _cards(version: Version) -> list[dict[str, Any]]:
    """The few numbers that a reader wants first."""
    rows = [row for rows in groups([version]).values() for row in rows]
    first = ("pointwise_internal", "pointwise_user", "pairwise_user", "breadth", "depth", "instruction_violation")
    shown = [row for name in first for row in rows if row.name == name]
    cards = [
        {"value": _text(number, r), "label": r.label, "notes": [n for n in (_span(number, r), number.why) if n]}
        for r, number in ((r, version.numbers[r.name]) for r in shown)
    ]
    models = {"candidate": version.candidate, "champion": version.champion}
    return cards + [{"value": _short(name), "label": role, "notes": []} for role, name in models.items() if name]


def _short(model: str) -> str:
    """Stage and key of what a store holds, wherever the store is; the last part of any other name."""
    parts = model.rpartition("/artifacts/")[2].split("/")
    if len(parts) > 1 and ("/artifacts/" in model or len(parts) == 2):
        return f"{parts[0]}/{parts[1][:8]}"
    return parts[-1].removeprefix("package:")


def _changes(version: Version) -> list[dict[str, str]]:
    """Every metric of both models, with the interval of the change where both have one; a change between numbers that
    can't decide is no better and no worse."""
    languages = [
        Row(n, f"Language match ({n.removeprefix(LANGUAGE)})", "up")
        for n in sorted(version.numbers)
        if n.startswith(LANGUAGE)
    ]
    found = []
    for row in (*CHARACTERISTICS, *languages, *BENCHMARKS):
        now, before = version.numbers.get(row.name), version.before.get(row.name)
        if now is None or before is None:
            continue
        scale, change = (100 if row.unit == "share" else 1), now.value - before.value
        interval, tone, why = "", "", now.why or before.why
        if None not in (now.low, now.high, before.low, before.high) and row.unit == "share":
            low, high = difference(
                now.value, (now.low or 0, now.high or 0), before.value, (before.low or 0, before.high or 0)
            )
            interval = f"{100 * low:+.1f} … {100 * high:+.1f}"
            certain = (low > 0 or high < 0) and not why
            tone = "" if not certain or not row.good else "up" if (change > 0) == (row.good == "up") else "down"
        found.append(
            {
                "label": row.label, "before": _text(before, row), "now": _text(now, row),
                "change": f"{scale * change:+.1f}", "interval": interval, "tone": tone, "why": why,
            }
        )  # fmt: skip
    return found


def _table(versions: list[Version]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Table 10's layout: a section for each kind of metric, a column for each version."""
    return [
        (
            title,
            [{"label": row.label, "cells": [_cell(v, row) for v in versions]} for row in rows],
        )
        for title, rows in groups(versions).items()
    ]


def _cell(version: Version, row: Row) -> dict[str, str]:
    number = version.numbers.get(row.name)
    if number is None:
        return {"text": "–", "span": "", "tone": ""}
    tone = ""
    if row.unit == "lift" and number.low is not None and number.high is not None:
        tone = "up" if number.low > 0 else "down" if number.high < 0 else ""
    if row.good == "band":
        band = version.win_rate
        tone = "down" if number.value >= band.block else "doubt" if number.value >= band.hold else ""
    return {"text": _text(number, row), "span": _span(number, row), "tone": tone}


def _text(number: Number, row: Row) -> str:
    text = {
        "share": f"{100 * number.value:.1f} %",
        "lift": f"{number.value:+.2f} %",
        "tokens": f"{number.value:.1f}",
    }[row.unit]
    return f"{text} {figures.MARK}" if number.why else text


def _span(number: Number, row: Row) -> str:
    if number.low is None or number.high is None:
        return ""
    scale = 100 if row.unit == "share" else 1
    sign = "+" if row.unit == "lift" else ""
    return f"{scale * number.low:{sign}.1f} … {scale * number.high:{sign}.1f}"
