"""readout: did users come back more often, and stay longer? (Sec. 2.5.2, eq. 9-18, Appendix 6)"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.release.expose import LAYOUTS
from flywheel_tasks.release.readout_config import ReadoutConfig

if TYPE_CHECKING:
    from flywheel_tasks.release.parts import Part
    from flywheel_tasks.release.result import ReadoutResult


def run(inputs: Inputs, config: ReadoutConfig, out: Output) -> None:
    """Breadth and depth of every test arm against control: percentage lifts with Fieller's 95 % sets, and a decision.

    Status is `running` while the window is not complete (with the looks so far), `refused` when a check failed,
    `closed` when there are lifts.
    """
    from flywheel_tasks.release.plot import forest
    from flywheel_tasks.release.table import plain_text
    from flywheel_tasks.release.versions import across

    result = _result(inputs, config, out)
    result = replace(result, versions=across(inputs.json("earlier"), result))
    out.json("readout", result.as_json())
    forest(result, out.file("report", "forest.png"))
    out.file("report", "readout.txt").write_text(plain_text(result), encoding="utf-8")
    out.metric("closed", float(result.status == "closed"))
    for c in result.comparisons:
        if c.lift.lift_pct is not None:
            out.metric(f"{c.arm}.{c.metric}.lift_pct", c.lift.lift_pct)
        if c.lift.kind == "bounded" and c.lift.lift_pct_bounds:
            out.metric(f"{c.arm}.{c.metric}.lift_pct_lower", c.lift.lift_pct_bounds[0])
            out.metric(f"{c.arm}.{c.metric}.lift_pct_upper", c.lift.lift_pct_bounds[1])
        out.metric(f"{c.arm}.{c.metric}.significant", float(c.lift.significant))
    for d in result.decisions:
        out.metric(f"{d.arm}.ship", float(d.verdict == "ship"))
        out.metric(f"{d.arm}.roll_back", float(d.verdict == "roll back"))


def _result(inputs: Inputs, config: ReadoutConfig, out: Output) -> ReadoutResult:
    """What is read of the experiment, from the store's files and those of another platform."""
    from flywheel_tasks.release.population import choose_experiment
    from flywheel_tasks.release.read import nobody_yet, read_out

    if config.time_zone != "UTC" and not all(inputs.sources.values()):
        raise InputError(
            f"readout.time_zone is {config.time_zone}, and the store's exposures and activity are whole days of UTC: "
            "leave it at UTC, or name both readout.exposures and readout.activity"
        )
    exposures, activity = _parts(inputs, "exposures"), _parts(inputs, "activity")
    report: Mapping[str, Any] = {} if inputs.sources.get("exposures") else inputs.json("report") or {}
    experiment = config.experiment or f"release-{out.cycle}"
    known = report.get(experiment, {})
    if activity and known.get("start") and not all(known["units"].values()):
        waits = nobody_yet(experiment, known["arms"], dt.date.fromisoformat(known["start"]), config)
        return replace(waits, candidate=known.get("candidate"), champion=known.get("champion"))
    if not exposures or not activity:
        raise InputError(
            "nothing to read: no unit is exposed, or there is no activity; run expose, or set readout.exposures"
        )
    experiment = config.experiment or choose_experiment(exposures, experiment)
    known = report.get(experiment, {})
    if laid := None if any(inputs.sources.values()) else _layout(inputs, experiment):
        exposures, activity = (_stored(files, inputs["activity"].storage.uri) for files in laid)
    resized = known.get("stayed") if len(known.get("history", ())) > 1 and not config.allocation else None
    shares = resized["shares"] if resized else known.get("shares", {})
    told = {
        "experiment": experiment,
        "allocation": config.allocation or shares,
        "scratch": config.scratch or f"{out.store_uri}/{out.scratch()}",
    }
    result = read_out(exposures, activity, config.model_copy(update=told), resized["units"] if resized else None)
    nominated = known.get("nominated")
    if nominated and result.window["first"] < nominated:
        raise InputError(
            f"{experiment}: the window starts on {result.window['first']}, before its candidate was nominated: set "
            f"readout.start to {nominated} or later"
        )
    return replace(result, candidate=known.get("candidate"), champion=known.get("champion"))


def _parts(inputs: Inputs, name: str) -> list[Part]:
    """Files of another platform, by their URIs, beside those of the store."""
    table = inputs.get(name)
    stored = _stored(table.files, table.storage.uri) if table is not None and table.rows else []
    return stored + [_outside(record.uri) for record in inputs.sources.get(name, ())]


def _stored(files: Sequence[str], store_uri: str) -> list[Part]:
    from flywheel_tasks.release.parts import Part

    return [Part(path, store_uri) for path in files]


def _outside(uri: str) -> Part:
    from flywheel_tasks.release.parts import Part

    if uri.startswith("file://"):
        return Part(uri.removeprefix("file://"))
    folder, file = uri.rsplit("/", 1)
    return Part(file, folder)


def _layout(inputs: Inputs, experiment: str) -> tuple[list[str], list[str]] | None:
    """Units and days of the experiment's layout, where expose wrote one of the very activity that is read here and
    nobody was purged from either since."""
    from flywheel_tasks.release.layout import UNITS

    artifact, output = inputs.artifact("layout")
    activity, _ = inputs.artifact("activity")
    record = artifact.manifest
    same = record.inputs["activity"].key == activity.manifest.key
    if not same or record.forgotten or activity.manifest.forgotten:
        return None
    known = json.loads(artifact.file(output, LAYOUTS))
    if experiment not in known:
        return None
    artifact.verify()
    files = [f"{record.folder}/{file.path}" for file in record.outputs[output].files]
    mine = [path for path in files if f"/{output}/{known.index(experiment)}/" in path]
    units = [path for path in mine if path.endswith(f"/{UNITS}")]
    return units, [path for path in mine if path not in units]


STAGE = Stage(
    name="readout",
    phase="release",
    paper="Sec. 2.5.2, eq. 9-18, Appendix 6",
    inputs={
        "exposures": Input("expose", "exposures"),
        "activity": Input("ingest", "activity"),
        "report": Input("expose", "report"),
        "layout": Input("expose", "layout"),
        "earlier": Input("readout", "readout", optional=True, previous=True),
    },
    outputs={"readout": "json", "report": "file"},
    config=ReadoutConfig,
    run=run,
    sources=("exposures", "activity"),
    resources=Resources(cpus=2, memory_gib=4),
    schedule="daily",
    uses_cycle=True,
)
