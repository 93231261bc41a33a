"""Stage `signal-rm`: what users do after a response, predicted from the response (Sec. 2.3.2, Table 2, eq. 6)."""

from __future__ import annotations

from pydantic import Field

from flywheel_tasks.core.config import ModelConfig, model_of
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.training.learn import LearnConfig


class SignalConfig(LearnConfig):
    base: ModelConfig = model_of("signal", "where training starts")
    most_responses: int | None = Field(
        None, ge=1, description="responses to train on at most, whole conversations, chosen by hash (empty: all)"
    )


def run(inputs: Inputs, config: SignalConfig, out: Output) -> None:
    """Train p(continue), p(love), p(thumb up), p(thumb down) and p(feedback) on one shared trunk from the signals in
    this cycle's traffic, and measure them on held-out conversations: AUC, calibration, rates by job to be done, and the
    biases for which a signal may help to rank responses but never reward RL."""
    from flywheel_tasks.models.chat import Card, Template, load_tokenizer
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.preherding import signal_measure
    from flywheel_tasks.preherding.responses import SIGNALS, first, responses
    from flywheel_tasks.training import signal
    from flywheel_tasks.training.learn import learn

    cards = {row["character_id"]: Card.of(row) for row in inputs["characters"].read().to_pylist()}
    prompts = inputs["prompts"].read(["prompt_id", "jtbd"])
    jtbd = {p: j for p, j in zip(*(column.to_pylist() for column in prompts.columns), strict=True) if j}
    found = [without(table, inputs.forgotten, "row_id") for table in responses(inputs["conversations"].batches(), jtbd)]
    known, held_out, skipped = first((kept for kept, _ in found), config.most_responses, out.seed)
    if not known.num_rows or not held_out.num_rows:
        raise InputError(
            f"{known.num_rows} responses to train on and {held_out.num_rows} held out: signal models need both; give "
            "more traffic, or another ingest.eval_share"
        )
    base = local_folder(config.base.path)
    encoded = signal.encode(known, SIGNALS, cards, Template(load_tokenizer(base)), max_tokens=config.max_tokens)
    task = signal.task(base, names=SIGNALS, lora=config.lora, seed=out.seed, max_tokens=config.max_tokens)
    training = learn(task, [encoded.table], config, out)
    measured = signal_measure.run(held_out, cards, config.max_tokens, out)
    for rejected in (*(gone for _, gone in found), skipped, encoded.rejected, measured.rejected):
        out.reject(rejected)
    out.json("report", measured.report | {"training": training | {"dropped_turns": encoded.dropped_turns}})
    rows_in = sum(kept.num_rows + gone.num_rows for kept, gone in found)
    out.account("response", rows_in=rows_in, rows_out=encoded.table.num_rows + measured.rows)


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
