"""The generation stage against bare `vllm.LLM.generate`: same model, prompts, seeds and settings; engine start apart.

Ours does more for its time: it renders the chat, commits chunks, and makes the table of completions. With scoring on,
a reward model of the policy's size reads every response, when generation has ended: engine and scorer share two cores
here. (Scored while the engine went on, ours took 59 s where the peer took 44: they fought for the cores.)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench_scoring import fresh_scorer
from benchmarks.generation_prompts import write_prompts
from benchmarks.harness import Contender, Report, compare

K, MAX_TOKENS = 4, 48
_TOLERANCE = 0.05
"""The batches differ, so bfloat16 rounds differently and a response in many turns another way."""


def same(values: dict[str, Any]) -> None:
    bare = values["vllm.LLM.generate"]
    if any(
        one["responses"] != bare["responses"] or abs(one["tokens"] / bare["tokens"] - 1) > _TOLERANCE
        for one in values.values()
    ):
        raise SystemExit(f"the contenders did not do the same work: {values}")


def main(quick: bool) -> Report:
    count = 24 if quick else 96
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(Path(folder) / "prompts.parquet", count)
        plain = {"prompts": str(prompts), "k": K, "max_tokens": MAX_TOKENS}
        scored = plain | {"scorer": fresh_scorer(Path(folder) / "scorer")}
        ours, bare = "benchmarks.generation_flywheel:generate", "benchmarks.generation_bare:generate"
        contenders = {
            "ours": (ours, plain), "vllm.LLM.generate": (bare, plain), "ours, scoring on": (ours, scored),
            "vllm.LLM.generate, then scores": (bare, scored),
        }  # fmt: skip
        report = compare(
            "generation",
            f"{count} chat prompts × {K} responses of at most {MAX_TOKENS} tokens, SmolLM2-135M",
            [Contender(name, target, arguments, work=count * K) for name, (target, arguments) in contenders.items()],
            repeats=1 if quick else 3,
            unit="responses",
            agree=same,
            notes=[
                "All draw the same tokens up to bfloat16 rounding; the rate counts responses, tokens are in the file."
            ],
        )
    report.notes.extend(
        f"{row.name}: {row.result['scoring_s']:.1f} s scoring" for row in report.rows if row.result["scoring_s"] > 0.1
    )
    return report
