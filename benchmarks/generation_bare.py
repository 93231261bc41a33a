"""Bare `vllm.LLM.generate`, engine already started: all prompts as token ids in one call, text and logprobs out."""

from __future__ import annotations

import os
import time

import pyarrow.parquet as pq

from flywheel_tasks.models.engine_link import environment

os.environ.update(environment(sorted(os.sched_getaffinity(0))))

from vllm import LLM, SamplingParams  # it reads the environment when it is imported
from vllm.inputs import TokensPrompt

from benchmarks.generation_prompts import CHARACTERS, CONFIG, MODEL, sampling, to_score
from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.engine_worker import BLOCK_TOKENS, request_seed
from flywheel_tasks.models.generate import cards, encoder, policy_seed
from flywheel_tasks.models.resolve import local_folder
from flywheel_tasks.models.score import Scorer

FOLDER = local_folder(MODEL)
TEMPLATE = Template(load_tokenizer(FOLDER))


ENGINE = LLM(
    model=str(FOLDER),
    dtype=CONFIG.dtype,
    max_num_seqs=CONFIG.sequences,
    kv_cache_memory_bytes=int(CONFIG.cache_gib * (1 << 30)),
    block_size=BLOCK_TOKENS,
    # With it, seeded sampling fails on CPU as soon as a prompt is read in parts.
    enable_chunked_prefill=False,
    enforce_eager=True,
    seed=0,
)


def generate(prompts: str, k: int, max_tokens: int, scorer: str | None = None) -> dict[str, float]:
    """With `scorer`, the same model as ours scores everything when generation has ended."""
    rows, draw = pq.read_table(prompts).to_pylist(), sampling(k, max_tokens)
    encode = encoder(TEMPLATE, cards(CHARACTERS), ENGINE.llm_engine.model_config.max_model_len - max_tokens)
    seed = policy_seed(draw, "bench")
    shared = {"n": k, "temperature": 1.0, "max_tokens": max_tokens, "logprobs": 0}
    stop = list(TEMPLATE.stop_ids)
    params = [SamplingParams(**shared, seed=request_seed(seed, row["prompt_id"]), stop_token_ids=stop) for row in rows]
    outputs = ENGINE.generate(
        [TokensPrompt(prompt_token_ids=list(encode(row))) for row in rows], params, use_tqdm=False
    )
    began = time.perf_counter()
    if scorer:
        texts = [row | {"text": drawn.text} for row, out in zip(rows, outputs, strict=True) for drawn in out.outputs]
        Scorer(scorer).pointwise(to_score(texts))
    return {
        "responses": sum(len(output.outputs) for output in outputs),
        "tokens": float(sum(len(drawn.token_ids) for output in outputs for drawn in output.outputs)),
        "scoring_s": round(time.perf_counter() - began, 3),
    }
