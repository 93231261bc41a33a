"""respond: candidate, champion and the checkpoints between answer the held-out prompts (Sec. 2.5.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import ModelConfig, Operational, StageConfig, model_of
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import of_others, quarantined, without
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.evaluation.versus import CANDIDATE, CHAMPION, SETS
from flywheel_tasks.models.engine_config import EngineConfig, SamplingConfig

if TYPE_CHECKING:
    from flywheel_tasks.models.chat import Card

INTERMEDIATE = ("sft",)


class RespondConfig(StageConfig):
    champion: ModelConfig = model_of("policy", "the policy in production, that the candidate is compared with")
    intermediate: bool = Field(True, description="the SFT checkpoint answers too, for the style monitor")
    most_prompts: int = Field(
        1000, ge=1, description="prompts of each set (internal, user) that are answered, chosen by a hash of their id"
    )
    sampling: SamplingConfig = Field(SamplingConfig(), description="how responses are drawn")
    engine: EngineConfig = Field(EngineConfig(), description="how the policies are run")
    least_characters: int = Field(
        40, ge=1, description="a prompt of fewer characters may occur in training by chance: only its ids are compared"
    )
    most_leaked: float = Field(
        0,
        ge=0,
        lt=1,
        description="share of the prompts that may be left out because training has their text; more stop the stage",
    )
    deadline_s: float | None = Field(
        None, gt=0, description="time for one policy's responses", json_schema_extra=Operational
    )


class _Policy(NamedTuple):
    name: str
    folder: Path
    origin: str
    """Where its weights come from, as the report names it."""
    weights: str
    """Digest of the weights: equal weights give equal answers, under whatever name."""


def run(inputs: Inputs, config: RespondConfig, out: Output) -> None:
    """The held-out prompts of both sets, internal and user, answered once by the candidate, the champion and the SFT
    checkpoint. Prompts that training saw stop the stage, listed by id; a few whose text somebody else also said are
    left out where the config allows. An answer that the last cycle already has (same weights, card, turns and sampling)
    is taken from there."""
    from flywheel_tasks.models.generate import cards

    chosen = _chosen(inputs["prompts"].read(), config.most_prompts)
    known, forgotten = without(chosen, inputs.forgotten, "prompt_id")
    prompts, leaked, overlap = _unseen(inputs, known, config)
    characters = cards(inputs["characters"].read())
    earlier = _Earlier.of(inputs)
    counts: dict[str, dict[str, Any]] = {}
    contents: dict[str, set[str]] = {}
    written = 0
    policies = list(_policies(inputs, config))
    with out.table("responses") as writer:
        for number, policy in enumerate(policies):
            keys = _keys(prompts, policy, characters, config, out.seed)
            reused, left = earlier.take(prompts, keys)
            tables = [reused, *_answers(policy, prompts.take(pa.array(left, pa.int64())), characters, config, out)]
            answers = _named(pa.concat_tables(tables), policy.name)
            for prompt, completion in zip(
                answers["prompt_id"].to_pylist(), answers["completion_id"].to_pylist(), strict=True
            ):
                contents.setdefault(keys[prompt], set()).add(_draw(completion))
            writer.write(answers)
            written += answers.num_rows
            counts[policy.name] = _counts(policy, answers, reused.num_rows)
            out.progress(number + 1, len(policies), "policies")
    origin = {policy.name: policy.origin for policy in policies}
    sizes = {name: sum(found == source for found in prompts["source"].to_pylist()) for name, source in SETS.items()}
    out.json("report", {
        "candidate": origin[CANDIDATE], "champion": origin[CHAMPION], "overlap": overlap, "policies": counts,
        "prompts": sizes,
    })  # fmt: skip
    out.json("contents", {key: sorted(draws) for key, draws in contents.items()})
    out.reject(forgotten)
    out.reject(leaked)
    out.account("response", rows_in=written + forgotten.num_rows + leaked.num_rows, rows_out=written)
    for name, found in counts.items():
        out.metric(f"{name}.failed", found["failed"])


def _chosen(prompts: pa.Table, most: int) -> pa.Table:
    """The held-out prompts of each set, at most so many, by a hash that does not change from week to week."""
    held_out = prompts.filter(pc.equal(prompts["split"], "eval"))
    if not held_out.num_rows:
        raise InputError(
            f"respond: none of {prompts.num_rows} curated prompts is held out for evaluation: raise ingest's share of "
            "evaluation conversations, or curate more traffic"
        )
    ranks = [hashlib.sha256(prompt.encode()).digest() for prompt in held_out["prompt_id"].to_pylist()]
    source = held_out["source"].to_pylist()
    chosen: list[int] = []
    for wanted in SETS.values():
        rows = sorted((row for row in range(held_out.num_rows) if source[row] == wanted), key=lambda row: ranks[row])
        chosen += rows[:most]
    return held_out.take(pa.array(sorted(chosen), pa.int64())).combine_chunks()


def _unseen(inputs: Inputs, prompts: pa.Table, config: RespondConfig) -> tuple[pa.Table, pa.Table, dict[str, Any]]:
    """The prompts that nothing holds of what the policies were trained on, the quarantine of those left out, and the
    report; what leaked by its id, and too much of any, is refused."""
    from flywheel_tasks.evaluation import leakage
    from flywheel_tasks.evaluation.trained_on import trained_on

    known = inputs["prompts"].read(["prompt_id", "conversation_id"])
    conversation_of = dict(zip(known["prompt_id"].to_pylist(), known["conversation_id"].to_pylist(), strict=True))
    learnt = trained_on(inputs.artifact(name)[0] for name in (CANDIDATE, *INTERMEDIATE) if inputs.maybe(name))
    conversations = (turns for file in learnt.files for turns in leakage.delivered(file))
    seen = leakage.seen(learnt.read(), conversation_of, conversations)
    found = leakage.overlap(prompts, seen, config.least_characters)
    leakage.refuse(found, config.most_leaked)
    theirs = pc.is_in(prompts["prompt_id"], pa.array(sorted(found.leaked), pa.string()))
    left_out, kept = prompts.filter(theirs).select(["prompt_id"]), prompts.filter(pc.invert(theirs)).combine_chunks()
    report = {
        "prompts": kept.num_rows, "leaked": 0, "left_out": left_out["prompt_id"].to_pylist(),
        "compared_with": [*sorted(learnt.tables), *sorted({file.name for file in learnt.files})],
    }  # fmt: skip
    return kept, quarantined(left_out, "prompt_id", "text_in_training"), report


def _policies(inputs: Inputs, config: RespondConfig) -> Iterator[_Policy]:
    from flywheel_tasks.evaluation.weights import digest
    from flywheel_tasks.models.resolve import artifact_folder, local_folder

    for name in (CANDIDATE, *(INTERMEDIATE if config.intermediate else ())):
        if name == CANDIDATE or inputs.maybe(name):
            artifact, output = inputs.artifact(name)
            folder = artifact_folder(artifact, output)
            yield _Policy(name, folder, f"{artifact.manifest.stage}/{artifact.manifest.key}", digest(folder))
    folder = local_folder(config.champion.path)
    yield _Policy(CHAMPION, folder, config.champion.path, digest(folder))


def _keys(
    prompts: pa.Table, policy: _Policy, characters: Mapping[str, Card], config: RespondConfig, seed: int
) -> dict[str, str]:
    """Prompt id → a digest of everything that its answer depends on."""
    drawn = config.sampling.seeded(seed).model_dump(mode="json")
    run = {"weights": policy.weights, "sampling": drawn, "dtype": config.engine.dtype, "context": config.engine.context}
    keys = {}
    for row in prompts.select(["prompt_id", "character_id", "turns"]).to_pylist():
        card = characters.get(row["character_id"])
        body = run | {"id": row["prompt_id"], "card": card.system if card else None, "turns": row["turns"]}
        text = json.dumps(body, sort_keys=True, ensure_ascii=False)
        keys[row["prompt_id"]] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return keys


class _Earlier(NamedTuple):
    """The last cycle's answers, by content."""

    responses: pa.Table
    row_of: dict[str, int]
    contents: Mapping[str, list[str]]

    @classmethod
    def of(cls, inputs: Inputs) -> _Earlier:
        table, contents = inputs.get("earlier"), inputs.json("earlier_contents")
        if table is None or contents is None:
            return cls(schemas.COMPLETION.empty_table(), {}, {})
        responses = of_others(table.read(), inputs.forgotten)
        ids = responses["completion_id"].to_pylist()
        return cls(responses, {_draw(completion): row for row, completion in enumerate(ids)}, contents)

    def take(self, prompts: pa.Table, keys: Mapping[str, str]) -> tuple[pa.Table, list[int]]:
        """The answers that are there, whole or not at all, and the rows of the prompts that have none."""
        rows: list[int] = []
        left: list[int] = []
        for number, prompt in enumerate(prompts["prompt_id"].to_pylist()):
            found = [self.row_of.get(draw) for draw in self.contents.get(keys[prompt], ())]
            there = [row for row in found if row is not None and self.responses["finish"][row].as_py() != "error"]
            if there and len(there) == len(found):
                rows += there
            else:
                left.append(number)
        return self.responses.take(pa.array(rows, pa.int64())), left


def _answers(
    policy: _Policy, prompts: pa.Table, characters: dict[str, Card], config: RespondConfig, out: Output
) -> list[pa.Table]:
    from flywheel_tasks.models.engine import open_engine
    from flywheel_tasks.models.generate import complete, encoder, prompt_room, template_of

    if not prompts.num_rows:
        return []
    model = ModelConfig(path=str(policy.folder), tensor_parallel=config.champion.tensor_parallel)
    sampling = config.sampling.seeded(out.seed)
    with open_engine(model, config.engine) as engine:
        template = template_of(engine)
        encode = encoder(template, characters, prompt_room(engine, sampling))
        chunks = complete(
            engine, template, prompts, encode, sampling, policy.weights,
            partial=out.partial, name=f"answers-{policy.name}", deadline=config.deadline_s,
        )  # fmt: skip
        return [chunk.table for chunk in sorted(chunks, key=lambda chunk: chunk.name)]


def _named(answers: pa.Table, policy: str) -> pa.Table:
    """Under the policy's role; an answer of two roles with equal weights has an id in each."""
    roles = pa.array([policy] * answers.num_rows, pa.string())
    ids = [f"{policy}-{_draw(completion)}" for completion in answers["completion_id"].to_pylist()]
    columns = {"policy": roles, "completion_id": pa.array(ids, pa.string())}
    for name, column in columns.items():
        answers = answers.set_column(answers.schema.get_field_index(name), schemas.COMPLETION.field(name), column)
    return answers


def _draw(completion_id: str) -> str:
    """The part of an id that says what was drawn: the same under every role."""
    return completion_id.rpartition("-")[2]


def _counts(policy: _Policy, answers: pa.Table, reused: int) -> dict[str, Any]:
    finish = np.asarray(answers["finish"].to_pylist(), object)
    return {
        "model": policy.origin, "weights": policy.weights, "responses": answers.num_rows, "reused": reused,
        "failed": int((finish == "error").sum()), "cut_off": int((finish == "length").sum()),
    }  # fmt: skip


STAGE = Stage(
    name="respond",
    phase="evaluation",
    paper="Sec. 2.5.1",
    inputs={
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters"),
        "candidate": Input("rl", "model"),
        "sft": Input("sft", "model", optional=True),
        "earlier": Input("respond", "responses", optional=True, previous=True),
        "earlier_contents": Input("respond", "contents", optional=True, previous=True),
    },
    outputs={"responses": "completion", "report": "json", "contents": "json"},
    config=RespondConfig,
    run=run,
    models=("champion",),
    data=("models/card.j2",),
    resources=Resources(cpus=2, gpus=1, memory_gib=16),
)
