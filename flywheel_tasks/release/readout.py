"""readout: did users come back more often, and stay longer? (Sec. 2.5.2, eq. 9-18, Appendix 6)"""

from __future__ import annotations

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
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
    shares = {} if inputs.sources.get("exposures") else _planned(inputs, experiment)
    result = read_out(
        exposures,
        activity,
        config.model_copy(update={"experiment": experiment, "allocation": config.allocation or shares}),
    )
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


def _planned(inputs: Inputs, experiment: str) -> dict[str, float]:
    """The share of each arm that expose drew units by; nothing about an experiment that it no longer runs."""
    artifact, output = inputs.artifact("report")
    found: dict[str, float] = artifact.json(output).get(experiment, {}).get("shares", {})
    return found


STAGE = Stage(
    name="readout",
    phase="release",
    paper="Sec. 2.5.2, eq. 9-18, Appendix 6",
    inputs={
        "exposures": Input("expose", "exposures"),
        "activity": Input("ingest", "activity"),
        "report": Input("expose", "report"),
    },
    outputs={"readout": "json", "report": "file"},
    config=ReadoutConfig,
    run=run,
    sources=("exposures", "activity"),
    resources=Resources(cpus=2, memory_gib=4),
    schedule="daily",
    uses_cycle=True,
)
