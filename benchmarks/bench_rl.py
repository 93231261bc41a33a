"""One full GRPO step (8 prompts × 4 responses × at most 48 tokens, SmolLM2-135M, LoRA, a scalar reward model on the
same trunk) against TRL's GRPOTrainer, and where the time goes.

The table's clock runs over a contender's whole call, start of the engine included; a step's median is in the notes.
Both learn by the same terms: token-mean loss, clip, KL to a reference, advantages over their group's spread. Ours does
more in a step: penalties of Table 7, hand-over of the weights to the engine, and the logprob probe that proves it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.generation_prompts import write_prompts
from benchmarks.harness import Contender, Report, compare
from benchmarks.rl_setting import ALLOCATOR, MAX_TOKENS, PARTS, PROMPTS, RANK, WARM_UP, K, write_reward_model

_TOLERANCE = 0.08
"""Responses are drawn, so their lengths differ; prompts are the same to the token."""
OURS, TRL, TRL_VLLM = "ours", "trl", "trl, vLLM colocate"


def main(quick: bool) -> Report:
    steps = WARM_UP + (1 if quick else 3)
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        arguments = {
            "prompts": str(write_prompts(Path(folder) / "prompts.parquet", PROMPTS * steps)),
            "reward_model": write_reward_model(Path(folder) / "reward"),
            "steps": steps,
        }
        contenders = [(OURS, "rl_flywheel:here"), (TRL, "rl_trl:plain")]
        if not quick:
            contenders += [("ours on Ray Train", "rl_flywheel:on_ray"), (TRL_VLLM, "rl_trl:with_vllm")]
        report = compare(
            "rl",
            f"GRPO: {steps} steps of {PROMPTS} × {K} responses × {MAX_TOKENS} tokens, SmolLM2-135M, LoRA r{RANK}",
            [Contender(name, f"benchmarks.{target}", arguments, env=ALLOCATOR) for name, target in contenders],
            repeats=1,
            unit="steps",
            agree=same_work,
            timeout_s=900,
        )
    report.notes.extend(notes({row.name: row.result for row in report.rows}))
    return report


def same_work(values: Mapping[str, Any]) -> None:
    """Every contender that ran must have read and written as many tokens."""
    tokens = {name: value["tokens"] for name, value in values.items() if "failed" not in value}
    if max(tokens.values()) > (1 + _TOLERANCE) * min(tokens.values()):
        raise SystemExit(f"the contenders did not do the same work: {tokens} tokens a step")


def notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Seconds and shares of a step for each contender, the ratio to TRL, and the scaling table."""
    lines = [f"{name}: could not run: {found['failed']}" for name, found in results.items() if "failed" in found]
    ran = {name: found for name, found in results.items() if "failed" not in found}
    for name, found in ran.items():
        seconds, parts = statistics.median(found["step_s"]), found["parts"]
        shares = ", ".join(f"{part} {parts[part]:.2f} s ({parts[part] / seconds:.0%})" for part in PARTS)
        lines.append(
            f"{name}: {seconds:.2f} s a step ({min(found['step_s']):.2f} to {max(found['step_s']):.2f}, after "
            f"{WARM_UP} of warm-up): {shares}"
        )
    ours = statistics.median(ran[OURS]["step_s"])
    lines += [
        f"{name} takes {statistics.median(found['step_s']) / ours:.1f} times as long as {OURS}"
        for name, found in ran.items()
        if name != OURS
    ]
    return lines + scaling(ran[OURS])


def scaling(found: Mapping[str, Any]) -> list[str]:
    """Steps per second with one and two engines on cores of their own, on paper: from the measured parts, and from the
    measured time in which one engine answers half of a step's prompts."""
    parts = found["parts"]
    generate = {1: parts["generate"], 2: found["generate_half"]}
    rest = statistics.median(found["step_s"]) - sum(parts.values())
    lines = ["on paper, from these parts:"]
    for engines, seconds in generate.items():
        in_turn = seconds + parts["score"] + parts["learn"] + parts["sync"] + rest
        ahead = max(seconds + parts["score"], parts["learn"]) + parts["sync"] + rest
        lines.append(
            f"  {engines} engine{'s' if engines > 1 else ''}: {1 / in_turn:.3f} steps/s in turn, {1 / ahead:.3f} with "
            "the next batch generated while this one is learned"
        )
    return lines
