"""Stage `dpo`: direct preference optimisation, a small patch for urgent safety and style fixes (Sec. 2.4.2)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from flywheel_tasks.core.config import Operational
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import quarantined, without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.herding.exported import ServingConfig, WatchConfig
from flywheel_tasks.training.config import TrainingConfig
from flywheel_tasks.training.learn import LearnConfig


class DpoConfig(LearnConfig):
    train: TrainingConfig = TrainingConfig(learning_rate=2e-5, publish_every=20)
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to its start")
    smoothing: float = Field(0.0, ge=0, lt=0.5, description="chance that a label is wrong")
    length_normalised: bool = Field(False, description="log-probabilities per token instead of per response")
    mask_eot: bool = Field(True, description="leave the end-of-turn token out of the loss (Table 7: infinity loops)")
    modes: tuple[Literal["static", "interactive", "steerability", "image"], ...] = Field(
        ("steerability", "image"), description="annotated pairs that enter the patch, by mode"
    )
    rows: int = Field(2000, ge=1, description="pairs at most: a patch stays small, delivered pairs come first")
    watch: WatchConfig = WatchConfig()
    serving: ServingConfig = Field(ServingConfig(), json_schema_extra=Operational)
    data: tuple[str, ...] = Field(
        (), description="globs of .jsonl files with safety, image and base preferences", json_schema_extra=Operational
    )

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def run(inputs: Inputs, config: DpoConfig, out: Output) -> None:
    """Patch the fine-tuned policy on a small set of preference pairs: sigmoid loss against its own log-probabilities,
    taken once before the first step, with the end-of-turn token masked. Margins and accuracy are logged by step; each
    exported checkpoint is served once, held against its trainer, and compared with the start: KL and style."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from flywheel_tasks.herding import exported, moved
    from flywheel_tasks.herding.files import read_preferences
    from flywheel_tasks.models.chat import Card, Template, load_tokenizer
    from flywheel_tasks.models.resolve import artifact_folder
    from flywheel_tasks.training import dpo
    from flywheel_tasks.training.learn import learn

    delivered, refused = read_preferences(inputs.sources["data"])
    read = inputs["preferences"].read()
    annotated, forgotten = without(read, inputs.forgotten, "preference_id")
    wanted = pc.and_(pc.is_in(annotated["mode"], pa.array(config.modes)), pc.equal(annotated["split"], "train"))
    other = annotated.filter(pc.invert(wanted))
    pairs = pa.concat_tables([delivered, annotated.filter(wanted).sort_by([("batch", "descending")])])
    if not pairs.num_rows:
        raise InputError(
            f"no pair to patch with: none was delivered (dpo.data), and no annotated pair has a mode of "
            f"{', '.join(config.modes)}: deliver pairs, or add a mode to dpo.modes (static pairs are the most common)"
        )
    used, over = pairs.slice(0, config.rows), pairs.slice(config.rows)
    cards = {row["character_id"]: Card.of(row) for row in inputs["characters"].read().to_pylist()}
    base = artifact_folder(*inputs.artifact("policy"))
    template = Template(load_tokenizer(base))
    encoded = dpo.encode(used, cards, template, max_tokens=config.max_tokens, mask_eot=config.mask_eot)
    task = dpo.task(
        base,
        beta=config.beta,
        smoothing=config.smoothing,
        length_normalised=config.length_normalised,
        lora=config.lora,
        seed=out.seed,
    )
    trained = used.filter(pc.is_in(used["preference_id"], encoded.table["row_id"].combine_chunks()))
    watch = moved.Watch(base, moved.prompts_of(trained), cards, config.watch, out.seed)
    if trained.num_rows and config.serving.engine.context:
        watch.choose(config.serving.engine.context)
    training = learn(task, [encoded.table], config, out)
    served = exported.prove(out, training["steps"], config.serving, watch.look)
    with exported.serve(base, config.serving) as start:
        distance = watch.against(start)
    for step, values in distance.by_step.items():
        for name, value in values.items():
            out.metric(name, value, step=step)
    for table in (refused, forgotten, encoded.rejected):
        out.reject(table)
    for table, reason in ((over, "over_the_limit"), (other, "not_of_the_patch")):
        out.reject(quarantined(table, "preference_id", reason))
    told = training | {"dropped_turns": encoded.dropped_turns}
    report = {"pairs": encoded.table.num_rows, "training": told, "served": served, "moved": distance.as_json()}
    out.json("report", report)
    rows_in = refused.num_rows + delivered.num_rows + read.num_rows
    out.account("preference", rows_in=rows_in, rows_out=encoded.table.num_rows)


STAGE = Stage(
    name="dpo",
    phase="herding",
    paper="Sec. 2.4.2, Table 7",
    inputs={
        "policy": Input("sft", "model"),
        "preferences": Input("annotate-import", "preferences"),
        "characters": Input("ingest", "characters"),
    },
    sources=("data",),
    outputs={"model": "checkpoint", "steps": "checkpoints", "report": "json"},
    config=DpoConfig,
    run=run,
    data=("models/card.j2",),
    resources=Resources(cpus=2, gpus=8, memory_gib=16),
)
