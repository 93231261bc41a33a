"""A guard model as safety classifier (Sec. 2.6): Llama-Guard-style, behind an endpoint or in this process through vLLM.

The guard's own chat template turns a conversation into its prompt and judges the last turn. It answers `safe`, or
`unsafe` and the hazard categories on the next line. Any other answer is an error: the turn is not judged.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.curation.safety import SAFE_SHARE, Classifier, FloatArray, SafetyConfig, Turns

Message = dict[str, str]
_ANSWER = re.compile(r"\s*(?:safe\s*|unsafe\s*\n\s*(?P<codes>[A-Za-z]\w*(?:\s*,\s*[A-Za-z]\w*)*)\s*|unsafe\s*)")
_ANSWER_TOKENS = 32
_LONGEST_ANSWER = 1 << 20


def messages(turns: Turns, context: int) -> list[list[Message]]:
    """For every turn, the conversation that ends with it, of at most `context` turns."""
    content, role = turns.content.to_pylist(), turns.role.to_pylist()
    said = [Message(role=r, content=c) for r, c in zip(role, content, strict=True)]
    return [_alternating(said[max(int(turns.first[at]), at - context + 1) : at + 1]) for at in range(len(said))]


def _alternating(said: Sequence[Message]) -> list[Message]:
    """User and assistant by turns, the user first: the chat templates of guard models refuse anything else."""
    joined = [
        Message(role=role, content="\n\n".join(turn["content"] for turn in turns))
        for role, turns in groupby(said, itemgetter("role"))
    ]
    if joined[0]["role"] == "user":
        return joined
    return joined[1:] or [Message(role="user", content=""), *joined]


def verdict(answer: str, allowed: Sequence[str] = ()) -> float:
    """1.0 for unsafe, 0.0 for safe; raises on anything a guard does not say."""
    match = _ANSWER.fullmatch(answer)
    if match is None:
        raise ValueError("the guard model answered neither 'safe' nor 'unsafe'")
    if "unsafe" not in answer:
        return 0.0
    codes = {code.strip().upper() for code in (match["codes"] or "").split(",") if code.strip()}
    return 0.0 if codes and codes <= {code.upper() for code in allowed} else 1.0


def over_http(config: SafetyConfig) -> Classifier:
    """A guard behind an OpenAI-compatible endpoint, such as `vllm serve`; one request per turn, several at once."""
    url = f"{(config.guard_url or '').rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(config.guard_key_variable):
        headers["Authorization"] = f"Bearer {key}"
    pool = ThreadPoolExecutor(config.guard_parallel, thread_name_prefix="guard")

    def ask(conversation: list[Message], deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            return float("nan")
        body = {"model": config.guard_model, "messages": conversation, "temperature": 0, "max_tokens": _ANSWER_TOKENS}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - scheme checked by SafetyConfig
        try:
            with urllib.request.urlopen(request, timeout=min(left, config.request_timeout_s)) as reply:  # noqa: S310
                answer = json.loads(reply.read(_LONGEST_ANSWER))["choices"][0]["message"]["content"]
            return verdict(answer, config.guard_allowed)
        except (OSError, ValueError, KeyError, IndexError, TypeError, urllib.error.URLError):
            return float("nan")

    def classify(turns: Turns) -> FloatArray:
        # What still waits at the deadline answers at once: no request of a batch that is given up delays the next one.
        asked = partial(ask, deadline=time.monotonic() + SAFE_SHARE * config.timeout_s)
        return np.array(list(pool.map(asked, messages(turns, config.guard_context))), np.float64)

    return classify


def in_process(config: SafetyConfig) -> Classifier:
    """A guard loaded from a local folder into vLLM in this process."""
    from vllm import LLM, SamplingParams

    try:
        engine: Any = LLM(model=config.guard_model, trust_remote_code=False, enforce_eager=True)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"config key 'filter.safety.guard_model': {config.guard_model} cannot be loaded: {first}"
        ) from error
    greedy = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS)

    def classify(turns: Turns) -> FloatArray:
        outputs = engine.chat(messages(turns, config.guard_context), greedy, use_tqdm=False)
        return np.array(
            [_verdict_or_nan(output.outputs[0].text, config.guard_allowed) for output in outputs], np.float64
        )

    return classify


def _verdict_or_nan(answer: str, allowed: Sequence[str]) -> float:
    try:
        return verdict(answer, allowed)
    except ValueError:
        return float("nan")
