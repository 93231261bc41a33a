"""Stage `signal-rm`: what users do after a response, predicted from the response (Sec. 2.3.2, Table 2, eq. 6)."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pydantic import Field

from flywheel_tasks.core.config import ModelConfig, model_of
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.training.learn import LearnConfig

_COLUMNS, _CONVERSATIONS = ("conversation_id", "user", "character_id", "split", "turns"), 256
"""What is read of a conversation, and how many are in memory."""


class SignalConfig(LearnConfig):
    base: ModelConfig = model_of("signal", "where training starts")
    most_responses: int | None = Field(
        None, ge=1, description="responses to train on at most, whole conversations, chosen by hash (empty: all)"
    )
    most_held_out: int | None = Field(
        None, ge=1, description="responses to measure on at most, whole conversations, chosen by hash (empty: all)"
    )


def run(inputs: Inputs, config: SignalConfig, out: Output) -> None:
    """Train p(continue), p(love), p(thumb up), p(thumb down) and p(feedback) on one shared trunk from the signals in
    this cycle's traffic, and measure them on held-out conversations: AUC, calibration, rates by job to be done, and the
    biases for which a signal may help to rank responses but never reward RL."""
    from flywheel_tasks.models.chat import Card, Template, load_tokenizer
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.preherding import signal_measure
    from flywheel_tasks.preherding.responses import SIGNALS, first, listed, responses
    from flywheel_tasks.training import signal
    from flywheel_tasks.training.learn import learn

    cards = {row["character_id"]: Card.of(row) for row in inputs["characters"].read().to_pylist()}
    prompts = inputs["prompts"].read(["prompt_id", "jtbd"])
    jtbd = {p: j for p, j in zip(*(column.to_pylist() for column in prompts.columns), strict=True) if j}
    found = listed(inputs["conversations"].batches(_COLUMNS, _CONVERSATIONS))
    remembered, forgotten = without(found, inputs.forgotten, "row_id")
    known, held_out, skipped = first(remembered, config.most_responses, config.most_held_out, out.seed)
    if not known.num_rows or not held_out.num_rows:
        raise InputError(
            f"{known.num_rows} responses to train on and {held_out.num_rows} held out: signal models need both; give "
            "more traffic, another ingest.eval_share, or more signal-rm.most_responses and most_held_out"
        )
    for rejected in (forgotten, skipped):
        out.reject(rejected)

    def rows_of(chosen: pa.Table) -> Iterator[pa.Table]:
        names = set(chosen["conversation_id"].to_pylist())
        batches = inputs["conversations"].batches(_COLUMNS, _CONVERSATIONS)
        theirs = (b.filter(pa.array([n in names for n in b.column("conversation_id").to_pylist()])) for b in batches)
        return responses(theirs, jtbd)

    base = local_folder(config.base.path)
    template, dropped = Template(load_tokenizer(base)), 0

    def encoded() -> Iterator[pa.Table]:
        nonlocal dropped
        for table in rows_of(known):
            block = signal.encode(table, SIGNALS, cards, template, max_tokens=config.max_tokens)
            out.reject(block.rejected)
            dropped += block.dropped_turns
            yield block.table

    task = signal.task(base, names=SIGNALS, lora=config.lora, seed=out.seed, max_tokens=config.max_tokens)
    training = learn(task, encoded(), config, out)
    measured = signal_measure.run(rows_of(held_out), cards, config.max_tokens, out)
    out.reject(measured.rejected)
    out.json("report", measured.report | {"training": training | {"dropped_turns": dropped}})
    out.account("response", rows_in=found.num_rows, rows_out=training["rows"] + measured.rows)


STAGE = Stage(
    name="signal-rm",
    phase="preherding",
    paper="Sec. 2.3.2, 3.5.5, Table 2, eq. 6",
    inputs={
        "conversations": Input("filter", "conversations"),
        "characters": Input("ingest", "characters"),
        "prompts": Input("constrain", "prompts"),
    },
    outputs={"model": "checkpoint", "steps": "checkpoints", "report": "json"},
    config=SignalConfig,
    run=run,
    models=("base",),
    data=("models/card.j2",),
    resources=Resources(cpus=2, gpus=1, memory_gib=8),
)
