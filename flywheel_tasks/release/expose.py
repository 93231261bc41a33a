"""expose: who is in which arm of which experiment, and since when (Sec. 2.5.2): the cumulative exposure log."""

from __future__ import annotations

import datetime as dt
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import FORGOTTEN
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.core.tables import TableReader
from flywheel_tasks.release import ledger
from flywheel_tasks.release.assign import Experiment, assign, conflicts
from flywheel_tasks.release.served import keeps_candidate, keeps_draw, served

LAYOUTS = "experiments.json"
"""The experiments that have a layout: the first one's is in folder 0."""


SEGMENTS = tuple(name for name in schemas.EXPOSURE_LOG.names if name not in schemas.EXPOSURE.names)
"""What the log says of a unit beside its exposure, so what a readout may split by."""


class ExposeConfig(StageConfig):
    experiments: tuple[Experiment, ...] = Field((Experiment(),), description="the experiments that run now")
    start: dt.date | None = Field(
        None,
        description="no unit is exposed before this day (empty: the first day of the activity), and none to a "
        "candidate before the day of its nomination",
    )
    min_sends: int = Field(
        1, ge=0, description="sends a unit needs on a day to be eligible, so to be served and exposed, on it"
    )
    layout: bool = Field(True, description="also write the layout that makes readouts of the running experiments fast")

    @field_validator("experiments")
    @classmethod
    def _exclusive(cls, experiments: tuple[Experiment, ...]) -> tuple[Experiment, ...]:
        if problem := conflicts(experiments):
            raise ValueError(problem)
        return experiments


def first_days(activity: Iterable[pa.RecordBatch], start: dt.date | None, min_sends: int) -> pa.Table:
    """The first day on which each unit is eligible: columns unit_id, day; sorted by day and unit."""
    parts = []
    for batch in activity:
        keep = pc.greater_equal(batch.column("sends"), min_sends)
        if start is not None:
            keep = pc.and_(keep, pc.greater_equal(batch.column("day"), pa.scalar(start, pa.date32())))
        parts.append(pa.Table.from_batches([batch.select(["unit_id", "day"]).filter(keep)]))
    if not parts:
        return pa.table({"unit_id": pa.array([], pa.string()), "day": pa.array([], pa.date32())})
    found = pa.concat_tables(parts).group_by("unit_id").aggregate([("day", "min")]).rename_columns(["unit_id", "day"])
    return found.sort_by([("day", "ascending"), ("unit_id", "ascending")])


def usual_locales(conversations: Iterable[pa.RecordBatch]) -> pa.Table:
    """The locale of most of each user's conversations, of equals the first by name: columns user, locale."""
    keys = ["user", "locale"]
    counts = [pa.Table.from_batches([b]).group_by(keys).aggregate([([], "count_all")]) for b in conversations]
    if not counts:
        return pa.table({"user": pa.array([], pa.string()), "locale": pa.array([], pa.string())})
    whole = pa.concat_tables(counts).group_by(keys).aggregate([("count_all", "sum")])
    ranked = whole.sort_by([("user", "ascending"), ("count_all_sum", "descending"), ("locale", "ascending")])
    first = ranked.group_by("user", use_threads=False).aggregate([("locale", "first")])
    return first.rename_columns(keys)


def new_exposures(first: pa.Table, experiment: Experiment, taken: pa.Array, locales: pa.Table) -> pa.Table:
    """Rows of the exposure log for the units that enter the experiment now. `taken` are the units in the log of its
    layer: those of the experiment stay as they are, those of another running one belong to that."""
    fresh = first.filter(pc.invert(pc.is_in(first.column("unit_id"), value_set=taken)))
    arm = assign(fresh.column("unit_id").to_pylist(), experiment)
    chosen = np.flatnonzero(arm >= 0)
    rows = fresh.take(chosen)
    names = pa.array(list(experiment.arms), pa.string())
    return pa.table(
        {
            "experiment": pa.array([experiment.name] * len(chosen), pa.string()),
            "unit_id": rows.column("unit_id"),
            "arm": names.take(pa.array(arm[chosen])),
            "exposed_at": rows.column("day").cast(pa.timestamp("us")).cast(schemas.TIMESTAMP),
            "locale": locales.column("locale").take(pc.index_in(rows.column("unit_id"), locales.column("user"))),
        },
        schema=schemas.EXPOSURE_LOG,
    )


def named(experiments: tuple[Experiment, ...], cycle: str) -> tuple[Experiment, ...]:
    """Experiments with their names; the unnamed one is the release of this cycle."""
    full = tuple(e if e.name else e.model_copy(update={"name": f"release-{cycle}"}) for e in experiments)
    if problem := conflicts(full):
        raise ConfigError(f"expose.experiments: {problem}")
    return full


def run(inputs: Inputs, config: ExposeConfig, out: Output) -> None:
    """Assign eligible units to arms by a keyed hash and append each unit's first exposure to the cumulative log.

    Eligible are units with activity, for a release from the day on which its candidate was nominated. A unit keeps its
    first arm for good: how units are drawn may change with a cycle, not within one. An experiment that ended in an
    earlier cycle stays in the log. Beside the log stands the layout of each running experiment: its units numbered, its
    activity by day.
    """
    previous = inputs.get("previous")
    earlier = inputs.json("previous_report") or {}
    log = previous.read() if previous else schemas.EXPOSURE_LOG.empty_table()
    log, gone = _without(log, inputs.forgotten)
    out.reject(gone)

    added, report = [], {}
    locales = usual_locales(inputs["conversations"].batches(["user", "locale"]))
    running = named(config.experiments, out.cycle)
    state, this_cycle = _known(out)
    firsts: dict[dt.date | None, pa.Table] = {}
    for experiment in running:
        mine = log.filter(pc.equal(log.column("experiment"), experiment.name))
        before = earlier.get(experiment.name, {})
        history = shares_in_force(before, experiment)
        tested = served(experiment.name, state)
        start = begins(before, experiment, config.start, tested.since, ids.cycle_start(out.cycle))
        said: dict[str, Any] = {
            "shares": experiment.arms,
            "arms": list(experiment.arms),
            "history": history,
            "salt": experiment.salt,
            "layer": experiment.layer,
            "slice": [experiment.slice_from, experiment.slice_to],
            "min_sends": config.min_sends,
            "start": str(start) if start else None,
        } | tested.as_json(out.store_uri)
        for known in (before, this_cycle.get(experiment.name, {})):
            keeps_candidate(experiment.name, known.get("candidate"), said["candidate"])
        keeps_draw(experiment.name, this_cycle.get(experiment.name, {}), said)
        if start not in firsts:
            found = first_days(inputs["activity"].batches(), start, config.min_sends)
            firsts[start] = _without(found, inputs.forgotten)[0]
        layer = pa.array([e.name for e in running if e.layer == experiment.layer])
        of_layer = log.filter(pc.is_in(log.column("experiment"), value_set=layer))
        fresh = new_exposures(firsts[start], experiment, of_layer.column("unit_id").combine_chunks(), locales)
        added.append(fresh)
        whole = pa.concat_tables([mine, fresh])
        sizes = Counter(whole.column("arm").to_pylist())
        report[experiment.name] = said | {
            "eligible_units": firsts[start].num_rows,
            "already_exposed": mine.num_rows,
            "newly_exposed": fresh.num_rows,
            "units": {arm: sizes[arm] for arm in experiment.arms},
            "stayed": stayed(whole, experiment, history),
        }
        out.metric(f"{experiment.name}.units", sum(sizes.values()))
        _lay_out(experiment.name, whole, inputs["activity"], config.layout, out)
    with out.table("exposures") as writer:
        for part in (log, *added):
            writer.write(part)
    rows = log.num_rows + sum(part.num_rows for part in added)
    out.account(unit="exposure", rows_in=rows + gone.num_rows, rows_out=rows)
    out.json("report", report)


def begins(
    before: Mapping[str, Any], experiment: Experiment, start: dt.date | None, nominated: dt.date | None, monday: dt.date
) -> dt.date | None:
    """The first day on which a unit may enter: as configured, yet not before the candidate was nominated, and not
    before the cycle that resized the arms, since a place that an arm gained was not served earlier."""
    resized = monday if before and before["shares"] != experiment.arms else None
    earlier = dt.date.fromisoformat(before["start"]) if before.get("start") else None
    return max((day for day in (start, nominated, resized, earlier) if day), default=None)


def shares_in_force(before: Mapping[str, Any], experiment: Experiment) -> list[dict[str, float]]:
    """The shares of the arms since the experiment began, oldest first."""
    if before and before["arms"] != list(experiment.arms):
        raise InputError(
            f"experiment '{experiment.name}' ran with the arms {', '.join(before['arms'])} in that order: keep them "
            "and change their shares only, or start an experiment under a new name"
        )
    history: list[dict[str, float]] = list(before.get("history", ()))
    return history if history and history[-1] == experiment.arms else [*history, dict(experiment.arms)]


def stayed(log: pa.Table, experiment: Experiment, history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The arms as they are without the places that resizing gave or took away: what the sample ratio is true of.

    A larger arm takes in old users of its new places, a smaller one loses only users to come; users of a place that
    was the arm's under all shares enter when they come, whatever the shares are then.
    """
    least = {arm: min(shares[arm] for shares in history) for arm in experiment.arms}
    units = log.column("unit_id").to_pylist() if len(history) > 1 else []
    arms = np.array(log.column("arm").to_pylist(), object)
    kept = assign(units, experiment.model_copy(update={"arms": least})) >= 0 if units else np.ones(len(arms), bool)
    sizes = Counter(arms[kept].tolist())
    return {"shares": least, "units": {arm: sizes[arm] for arm in experiment.arms}}


def _known(out: Output) -> tuple[ledger.State, dict[str, Any]]:
    """The ledger, and what this cycle's last run of the stage said, where it ran before."""
    from flywheel_tasks.core.store import Store

    store = Store(out.store_uri)
    found = store.pointed(out.cycle, STAGE.name)
    return ledger.read(store.storage), dict(found.json("report")) if found else {}


def _lay_out(name: str, log: pa.Table, activity: TableReader, wanted: bool, out: Output) -> None:
    """Write the layout of one experiment under a number, and which experiment that is."""
    from flywheel_tasks.release.layout import write_layout
    from flywheel_tasks.release.parts import Part
    from flywheel_tasks.release.readout_config import ReadoutConfig

    folder = out.folder("layout")
    config = ReadoutConfig(experiment=name, segments=SEGMENTS)
    index = folder / LAYOUTS
    known: list[str] = json.loads(index.read_text()) if index.exists() else []
    if wanted and log.num_rows and activity.rows:
        with tempfile.TemporaryDirectory() as scratch:
            pq.write_table(log, f"{scratch}/log.parquet")
            parts = [Part(path, activity.storage.uri) for path in activity.files]
            write_layout([Part(f"{scratch}/log.parquet")], parts, config, folder / str(len(known)))
        known.append(name)
    index.write_text(json.dumps(known), encoding="utf-8")


def _without(table: pa.Table, forgotten: frozenset[str]) -> tuple[pa.Table, pa.Table]:
    """The rows of users who may be kept, and quarantine rows that name no one for the others."""
    if not forgotten:
        return table, schemas.QUARANTINE.empty_table()
    gone = pc.is_in(table.column("unit_id"), value_set=pa.array(sorted(forgotten), pa.string()))
    count = int(pc.sum(gone).as_py() or 0)
    rows = [
        {"row_id": f"exposure-{i}", "reason": FORGOTTEN, "where": "previous exposures", "user": None, "raw": None}
        for i in range(count)
    ]
    return table.filter(pc.invert(gone)), pa.Table.from_pylist(rows, schema=schemas.QUARANTINE)


STAGE = Stage(
    name="expose",
    phase="release",
    paper="Sec. 2.5.2",
    inputs={
        "activity": Input("ingest", "activity"),
        "conversations": Input("ingest", "conversations"),
        "previous": Input("expose", "exposures", optional=True, previous=True),
        "previous_report": Input("expose", "report", optional=True, previous=True),
    },
    outputs={"exposures": "exposure", "report": "json", "layout": "derived"},
    config=ExposeConfig,
    run=run,
    resources=Resources(cpus=1, memory_gib=4),
    schedule="daily",
    uses_cycle=True,
    state=(ledger.FOLDER,),
)
