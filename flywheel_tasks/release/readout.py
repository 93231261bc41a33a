"""readout: did users come back more often, and stay longer? (Sec. 2.5.2, eq. 9-18, Appendix 6)"""

from __future__ import annotations

import json
from dataclasses import replace

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.release.expose import LAYOUTS
from flywheel_tasks.release.readout_config import ReadoutConfig


def run(inputs: Inputs, config: ReadoutConfig, out: Output) -> None:
    """Breadth and depth of every test arm against control: percentage lifts with Fieller's 95 % sets, and a decision.

    Status is `running` while the window is not complete (with the looks so far), `refused` when a check failed,
    `closed` when there are lifts.
    """
    from flywheel_tasks.release.parts import Part
    from flywheel_tasks.release.plot import forest
    from flywheel_tasks.release.population import choose_experiment
    from flywheel_tasks.release.read import read_out
    from flywheel_tasks.release.table import plain_text
    from flywheel_tasks.release.versions import across

    def parts(name: str) -> list[Part]:
        """Files of another platform, by their URIs, beside those of the store."""
        table = inputs.get(name)
        stored = [Part(path, table.storage.uri) for path in table.files] if table is not None and table.rows else []
        return stored + [outside(record.uri) for record in inputs.sources.get(name, ())]

    def outside(uri: str) -> Part:
        if uri.startswith("file://"):
            return Part(uri.removeprefix("file://"))
        folder, file = uri.rsplit("/", 1)
        return Part(file, folder)

    exposures, activity = parts("exposures"), parts("activity")
    if not exposures or not activity:
        raise InputError(
            "nothing to read: no unit is exposed, or there is no activity; run expose, or set readout.exposures"
        )
    experiment = config.experiment or choose_experiment(exposures, f"release-{out.cycle}")
    known = {} if inputs.sources.get("exposures") else (inputs.json("report") or {}).get(experiment, {})
    if laid := None if any(inputs.sources.values()) else _layout(inputs, experiment):
        exposures, activity = ([Part(path, inputs["activity"].storage.uri) for path in files] for files in laid)
    resized = known.get("stayed") if len(known.get("history", ())) > 1 and not config.allocation else None
    shares = resized["shares"] if resized else known.get("shares", {})
    told = {
        "experiment": experiment,
        "allocation": config.allocation or shares,
        "scratch": config.scratch or f"{out.store_uri}/{out.scratch()}",
    }
    result = read_out(
        exposures,
        activity,
        config.model_copy(update=told),
        resized["units"] if resized else None,
    )
    result = replace(result, candidate=known.get("candidate"), versions=across(inputs.json("earlier"), result))
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


def _layout(inputs: Inputs, experiment: str) -> tuple[list[str], list[str]] | None:
    """Units and days of the experiment's layout, where expose wrote one of the very activity that is read here and
    nobody was purged from either since."""
    from flywheel_tasks.release.layout import UNITS

    artifact, output = inputs.artifact("layout")
    activity, _ = inputs.artifact("activity")
    record = artifact.manifest
    same = record.inputs["activity"].key == activity.manifest.key
    known = json.loads(artifact.file(output, LAYOUTS))
    if experiment not in known or not same or record.forgotten or activity.manifest.forgotten:
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
