"""Stages `preference-pointwise` and `preference-pairwise`: the preference models of Sec. 2.3.1 (eq. 1 and 2, Table 8).

A version is named after the newest batch it was trained on. It starts from the configured base and learns all batches
until now; earlier versions are measured again on the batches they never saw.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Run, Stage
from flywheel_tasks.preherding.preference_config import PreferenceConfig

Kind = Literal["pointwise", "pairwise"]


def run_pointwise(inputs: Inputs, config: PreferenceConfig, out: Output) -> None:
    """Train r(x, y) on all batches until now and measure it on held-out pairs of every batch and mode, beside earlier
    versions and rules that read nothing. Gives the model, its Table 8 (CSV, figure), calibration, and what it lost on
    old batches. Its score guides rejection sampling and RL."""
    _run("pointwise", inputs, config, out)


def run_pairwise(inputs: Inputs, config: PreferenceConfig, out: Output) -> None:
    """Train s(x, y0, y1), which reads both responses at once, on all batches until now; in random order, and measured
    in both. A second judge beside the pointwise model: what games one of them shows in the other."""
    _run("pairwise", inputs, config, out)


def _run(kind: Kind, inputs: Inputs, config: PreferenceConfig, out: Output) -> None:
    from flywheel_tasks.models.chat import Card, Template, load_tokenizer
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.preherding import measure, variants
    from flywheel_tasks.style import monitor
    from flywheel_tasks.training import preference
    from flywheel_tasks.training.learn import learn

    read = inputs["preferences"].read()
    pairs, forgotten = without(read, inputs.forgotten, "preference_id")
    cards = {row["character_id"]: Card.of(row) for row in inputs["characters"].read().to_pylist()}
    is_train = pc.equal(pairs["split"], "train")
    known, held_out = pairs.filter(is_train), pairs.filter(pc.invert(is_train))
    if not known.num_rows or not held_out.num_rows:
        raise InputError(
            f"{known.num_rows} preferences to train on and {held_out.num_rows} held out: a preference model needs "
            "both; import more annotations (annotate-import.deliveries)"
        )
    sets = variants.sets(inputs, cards, out.seed) if config.variants else None
    base = local_folder(config.base.path)
    template = Template(load_tokenizer(base))
    encoded = preference.encode(known, cards, template, kind=kind, max_tokens=config.max_tokens)
    for rejected in (forgotten, encoded.rejected):
        out.reject(rejected)
    task = preference.task(base, kind=kind, lora=config.lora, seed=out.seed, max_tokens=config.max_tokens)
    training = learn(task, [encoded.table], config, out)
    trained = known.filter(pc.is_in(known["preference_id"], encoded.table["row_id"].combine_chunks()))
    before = inputs.json("before") or {"matrix": [], "versions": []}
    measured = measure.run(kind, held_out, cards, version(trained), before, config, out)
    out.reject(measured.rejected)
    if sets:
        measured.report["table9"] = variants.measure(kind, sets, cards, base, template, config, out)
    measured.report["style"] = monitor.preferences(trained, config.style).as_json()
    out.json("report", measured.report | {"training": training | {"dropped_turns": encoded.dropped_turns}})
    out.account("preference", rows_in=read.num_rows, rows_out=encoded.table.num_rows + measured.rows)


def version(trained: pa.Table) -> str:
    """RM_YYMMDD: the newest batch that was trained on (Table 8)."""
    return f"RM_{pc.max(trained['batch']).as_py()}"


def _stage(name: str, section: str, run: Run) -> Stage:
    return Stage(
        name=name,
        phase="preherding",
        paper=section,
        inputs={
            "preferences": Input("annotate-import", "preferences"),
            "characters": Input("ingest", "characters"),
            "annotations": Input("annotate-import", "annotations", optional=True),
            "tasks": Input("annotate-export", "tasks", optional=True),
            "before": Input(name, "report", optional=True, previous=True),
        },
        outputs={
            "model": "checkpoint",
            "steps": "checkpoints",
            "report": "json",
            "table8": "file",
            "figure": "file",
        },
        config=PreferenceConfig,
        run=run,
        models=("base",),
        data=("models/card.j2", "style"),
        resources=Resources(cpus=2, gpus=1, memory_gib=8),
    )


POINTWISE = _stage("preference-pointwise", "Sec. 2.3.1, eq. 1, Table 8", run_pointwise)
PAIRWISE = _stage("preference-pairwise", "Sec. 2.3.1, eq. 2, Table 8", run_pairwise)
