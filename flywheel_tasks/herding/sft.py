"""Stage `sft`: supervised fine-tuning on the mixture of six sources (Sec. 2.4.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from flywheel_tasks.core.config import ModelConfig, Operational, model_of
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import quarantined, without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding import mixture
from flywheel_tasks.herding.exported import ServingConfig
from flywheel_tasks.training.learn import LearnConfig


class SftConfig(LearnConfig):
    base: ModelConfig = model_of("base", "where training starts")
    ratios: dict[str, float] = Field(
        {
            "internal_rjs": 0.15,
            "user_rjs": 0.35,
            "safety": 0.1,
            "capability": 0.1,
            "failure_fix": 0.05,
            "base_post_training": 0.25,
        },
        description="share of each of the six sources; they sum to 1",
    )
    language: LanguageConfig = Field(LanguageConfig(), description="how the linter tells the language of a turn")
    rows: int | None = Field(None, ge=1, description="examples of the mixture (empty: the most that repeats none)")
    serving: ServingConfig = Field(ServingConfig(), json_schema_extra=Operational)
    data: tuple[str, ...] = Field(
        (), description="globs of .jsonl files with examples of the sources that are not made here",
        json_schema_extra=Operational,
    )  # fmt: skip

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("ratios")
    @classmethod
    def _sum_to_one(cls, ratios: dict[str, float]) -> dict[str, float]:
        try:
            mixture.check(ratios)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return ratios


def run(inputs: Inputs, config: SftConfig, out: Output) -> None:
    """Mix rejection-sampled, rewritten and delivered examples in the configured proportions, after the linter has
    repaired or dropped what would teach bad style, and fine-tune the base on the assistant's turns alone. The loss of
    every source is logged by itself. Each checkpoint is served once and held against its trainer."""
    from flywheel_tasks.herding import exported
    from flywheel_tasks.herding.files import read_examples
    from flywheel_tasks.models.chat import Card, Template, load_tokenizer
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.style import linter
    from flywheel_tasks.training import sft
    from flywheel_tasks.training.learn import learn

    delivered, refused = read_examples(inputs.sources["data"])
    sampled = [inputs["sampled"].read(), *(table.read() for table in [inputs.get("rewritten")] if table)]
    read = pa.concat_tables([*sampled, delivered])
    known, forgotten = without(read, inputs.forgotten, "example_id")
    examples, repeated = distinct(known)
    cleaned = linter.clean_examples(examples, languages(config.language))
    cards = {row["character_id"]: Card.of(row) for row in inputs["characters"].read().to_pylist()}
    base = local_folder(config.base.path)
    encode = partial(sft.encode, cards=cards, template=Template(load_tokenizer(base)), max_tokens=config.max_tokens)
    encoded, left = mixture.encoded(cleaned.table, config.ratios, config.rows, out.seed, encode)
    left_out = quarantined(cleaned.table.filter(pa.array(left)), "example_id", "not_drawn")
    sources = sorted(name for name, ratio in config.ratios.items() if ratio > 0)
    task = sft.task(base, sources=sources, lora=config.lora, seed=out.seed)
    training = learn(task, [encoded.table], config, out)
    served = exported.prove(out, training["steps"], config.serving)
    for table in (refused, forgotten, repeated, cleaned.rejected, left_out, encoded.rejected):
        out.reject(table)
    counts = {name: encoded.table["source"].to_pylist().count(name) for name in sources}
    report = {"served": served, "mixture": counts, "linter": [[*key, n] for key, n in sorted(cleaned.counts.items())]}
    out.json("report", report | {"training": training | {"dropped_turns": encoded.dropped_turns}})
    rows_in = read.num_rows + refused.num_rows
    out.account("example", rows_in=rows_in, rows_out=encoded.table.num_rows)


def distinct(examples: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The first example of every id, and the quarantine of later ones: the draw goes by id, so ids tell rows apart."""
    ids = np.asarray(examples["example_id"].to_pylist(), object).astype(str)
    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    again = examples.filter(pa.array(~first))
    return examples.filter(pa.array(first)), quarantined(again, "example_id", "example_id_repeats")


def languages(config: LanguageConfig) -> Callable[[pa.StringArray], list[str | None]]:
    """The curation's detector as the linter takes it: None where a text is too short to tell."""
    from flywheel_tasks.curation.language import UNDETERMINED, detect

    def told(texts: pa.StringArray) -> list[str | None]:
        return [None if tag == UNDETERMINED else tag for tag in detect(texts, config).language]

    return told


STAGE = Stage(
    name="sft",
    phase="herding",
    paper="Sec. 2.4.2",
    inputs={
        "sampled": Input("rejection-sample", "examples"),
        "rewritten": Input("annotate-import", "examples", optional=True),
        "characters": Input("ingest", "characters"),
    },
    sources=("data",),
    outputs={"model": "checkpoint", "steps": "checkpoints", "report": "json"},
    config=SftConfig,
    run=run,
    models=("base",),
    data=("models/card.j2", "style", "curation/weights"),
    resources=Resources(cpus=2, gpus=8, memory_gib=16),
)
