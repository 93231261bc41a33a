"""A judge model in this process, through vLLM with the rubric's schema as grammar."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.evaluation.judge import Answer, JudgeConfig
from flywheel_tasks.evaluation.rubric import Message, schema

_BATCH = 64
_CPU_CACHE_BYTES = 1 << 30


def ask(requests: Sequence[list[Message]], config: JudgeConfig) -> Iterator[Answer]:
    """One answer for every request, a batch at a time; past the deadline the rest is missing."""
    if not requests:
        return
    end = time.monotonic() + config.deadline_s
    engine = _engine(config)
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(json=schema())
    sampling = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, structured_outputs=grammar)
    room = engine.llm_engine.model_config.max_model_len - config.max_tokens
    for start in range(0, len(requests), _BATCH):
        batch = range(start, min(start + _BATCH, len(requests)))
        if time.monotonic() > end:
            yield from (Answer(index, None, "deadline") for index in batch)
            continue
        fitting = [index for index in batch if _tokens(engine, requests[index]) <= room]
        yield from (Answer(index, None, "too_long") for index in batch if index not in set(fitting))
        if not fitting:
            continue
        outputs = engine.chat([requests[index] for index in fitting], sampling, use_tqdm=False)
        for index, output in zip(fitting, outputs, strict=True):
            found = output.outputs[0]
            cut = found.finish_reason == "length"
            yield Answer(index, None if cut else found.text, "cut_off" if cut else None)


def _tokens(engine: Any, messages: list[Message]) -> int:
    return len(engine.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _engine(config: JudgeConfig) -> Any:
    from flywheel_tasks.models.engine_link import environment
    from flywheel_tasks.models.resolve import local_folder

    folder = local_folder(config.model or "")
    # vLLM reads these when it is imported; what the environment says already stays.
    for name, value in environment(session.cores()).items():
        os.environ.setdefault(name, value)
    import torch
    from vllm import LLM

    try:
        return LLM(
            model=str(folder), trust_remote_code=False, enforce_eager=True, disable_log_stats=True,
            kv_cache_memory_bytes=None if torch.cuda.is_available() else _CPU_CACHE_BYTES,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"config key 'metrics.judge.model': {config.model} cannot be loaded: {first}") from error
