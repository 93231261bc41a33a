"""The generation stage against bare `vllm.LLM.generate`: same model, prompts, seeds and settings; engine start apart.

Ours does more for its time: it renders the chat, commits chunks, and makes the table of completions.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.generation_prompts import write_prompts
from benchmarks.harness import Contender, Report, compare

K, MAX_TOKENS = 4, 48
_TOLERANCE = 0.05
"""The batches differ, so bfloat16 rounds differently and a response in many turns another way."""


def same(values: dict[str, Any]) -> None:
    ours, bare = values["ours"], values["vllm.LLM.generate"]
    if ours["responses"] != bare["responses"] or abs(ours["tokens"] / bare["tokens"] - 1) > _TOLERANCE:
        raise SystemExit(f"the contenders did not do the same work: {values}")


def main(quick: bool) -> Report:
    count = 24 if quick else 96
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(Path(folder) / "prompts.parquet", count)
        arguments = {"prompts": str(prompts), "k": K, "max_tokens": MAX_TOKENS}
        return compare(
            "generation",
            f"{count} chat prompts × {K} responses of at most {MAX_TOKENS} tokens, SmolLM2-135M",
            [
                Contender("ours", "benchmarks.generation_flywheel:generate", arguments, work=count * K),
                Contender("vllm.LLM.generate", "benchmarks.generation_bare:generate", arguments, work=count * K),
            ],
            repeats=1 if quick else 3,
            unit="responses",
            agree=same,
            notes=[
                "Both draw the same tokens up to bfloat16 rounding; the rate counts responses, tokens are in the file."
            ],
        )
