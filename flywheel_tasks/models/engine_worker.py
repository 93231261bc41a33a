"""The inside of an engine: vLLM in this process, driven by one order after the other.

    python -m flywheel_tasks.models.engine_worker FD     # FD: the inherited end of a socket pair to the parent

vLLM runs in-process: it starts in seconds, and no port is opened beyond loopback. Requests are fed step by step
instead of through `LLM.generate`, so finished ones leave while others still grow and the batch never drains
between chunks.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models import engine_wire as wire
from flywheel_tasks.models.resolve import local_folder

ADVANCE_SECONDS = 0.5
"""How long an order to advance goes on before it reports: what makes silence mean a hang."""
BLOCK_TOKENS = 32
"""Prompts share the prefix cache in whole blocks; vLLM's 128 on CPU is longer than many a chat prompt."""


class EngineWorker:
    """One vLLM engine. `call` takes an order and answers it; it never raises."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._context = self._vocabulary = self._sequences = 0
        self._stop: list[int] = []
        self._running: set[str] = set()
        self._refused: list[list[wire.Completion]] = []

    def call(self, message: bytes) -> bytes:
        order = wire.order(message)
        try:
            return wire.encode(self._obey(order))
        except InputError as error:
            return wire.encode(wire.Failed(str(error), refused=True))
        except Exception as error:
            # Whatever vLLM raises is an answer too: the parent replaces the engine and redoes what is unfinished.
            text = str(error).strip() or "no message"
            return wire.encode(wire.Failed(f"{type(error).__name__}: {text.splitlines()[0][:300]}", refused=False))

    def _obey(self, order: wire.Order) -> wire.Answer:
        started = time.perf_counter()
        match order:
            case wire.Start():
                return self._start(order, started)
            case wire.Advance():
                return self._advance(order, started)
            case wire.Score():
                return self._score(order)
            case wire.Abort():
                self._engine.abort_request(list(self._running), internal=False)
                self._running.clear()
                self._refused.clear()
            case wire.Update():
                loaded = self._rpc("load_synced", order.path)
                self._forget_prefixes()
                return wire.Done(time.perf_counter() - started, loaded)
            case wire.Transfer():
                return self._transfer(order, started)
        return wire.Done(time.perf_counter() - started)

    def _start(self, order: wire.Start, started: float) -> wire.Described:
        # A model that is not there is said before vLLM's imports.
        folder = local_folder(order.model)
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from flywheel_tasks.models.sync import EXTENSION

        cpu, share = current_platform.is_cpu(), order.gpu_memory
        arguments = EngineArgs(
            model=str(folder),
            dtype=order.dtype,
            max_model_len=order.context,
            max_num_seqs=order.sequences,
            tensor_parallel_size=order.tensor_parallel,
            gpu_memory_utilization=share if cpu else utilisation(share, gpu_memory(order.tensor_parallel)),
            kv_cache_memory_bytes=order.cache_bytes if cpu else None,
            block_size=BLOCK_TOKENS if cpu else None,
            # Compiling takes a minute on CPU and gains 8 %; on a GPU the graphs are worth their start.
            enforce_eager=cpu,
            enable_prefix_caching=True,
            # vLLM's seeded sampling on CPU fails on a prompt that is read in parts, so there each is read whole.
            enable_chunked_prefill=not cpu,
            skip_tokenizer_init=True,
            trust_remote_code=False,
            load_format="safetensors",
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            worker_extension_cls=EXTENSION,
            weight_transfer_config=None if cpu else {"backend": "nccl"},
            use_tqdm_on_load=False,
            disable_log_stats=True,
            seed=0,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        model = self._engine.model_config
        self._context, self._vocabulary = model.max_model_len, model.get_vocab_size()
        self._sequences = order.sequences
        self._stop = stop_tokens(folder)
        return wire.Described(
            pid=os.getpid(),
            platform="cpu" if cpu else "cuda",
            context=self._context,
            vocabulary=self._vocabulary,
            stop=self._stop,
            gpus=[] if cpu else self._rpc("gpu_name"),
            seconds=time.perf_counter() - started,
        )

    # -- generation

    def _advance(self, order: wire.Advance, started: float) -> wire.Advanced:
        for request in order.requests:
            self._add(request, order.draw)
        finished, self._refused = self._refused, []
        prompt_tokens = cached_tokens = 0
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                self._running.remove(output.request_id)
                prompt_tokens += len(output.prompt_token_ids)
                cached_tokens += output.num_cached_tokens or 0
                finished.append([_completion(output.request_id, drawn) for drawn in output.outputs])
            if order.more and self._room() > 0:
                break
            if time.perf_counter() - started > ADVANCE_SECONDS:
                break
        return wire.Advanced(
            finished=finished,
            room=self._room() + self._sequences // 2,
            seconds=time.perf_counter() - started,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
        )

    def _room(self) -> int:
        """Sequences that could start at once. Half as many again wait inside, so that none of the batch stays empty."""
        return self._sequences - self._engine.get_num_unfinished_requests()

    def _add(self, request: wire.Request, draw: wire.Draw) -> None:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        reason = refusal(request.tokens, self._context, self._vocabulary)
        if reason:
            self._refused.append(wire.errors(request.id, draw.k, reason))
            return
        params = SamplingParams(
            n=draw.k,
            temperature=draw.temperature,
            top_p=draw.top_p,
            max_tokens=min(draw.max_tokens, self._context - len(request.tokens)),
            seed=request_seed(draw.seed, request.id),
            stop_token_ids=self._stop,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(request.id, tokens_input(request.tokens), params)
        self._running.add(request.id)

    def _score(self, order: wire.Score) -> wire.Scored:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for request in order.requests:
            if reason := refusal(request.tokens, self._context, self._vocabulary):
                raise InputError(f"{request.id} can't be scored: {reason}")
        for request in order.requests:
            self._engine.add_request(request.id, tokens_input(request.tokens), params)
        found: dict[str, list[float]] = {}
        while self._engine.has_unfinished_requests():
            found |= {out.request_id: list(out.prompt_logprobs.logprobs) for out in self._engine.step()}
        return wire.Scored([found[request.id] for request in order.requests])

    # -- weights

    def _transfer(self, order: wire.Transfer, started: float) -> wire.Done:
        loaded: list[str] = []
        if order.method == "start_weight_update":
            self._rpc("begin_checksum")
        self._rpc(order.method, *([] if order.info is None else [order.info]))
        if order.method == "finish_weight_update":
            loaded = self._rpc("end_checksum")
            self._rpc("pack_tied_head")
            self._forget_prefixes()
        return wire.Done(time.perf_counter() - started, loaded)

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        found: list[Any] = self._engine.engine_core.collective_rpc(method, args=args)
        return found

    def _forget_prefixes(self) -> None:
        """Keys and values of the old weights must not meet the new ones; an update alone leaves them in the cache."""
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache is in use: weights are updated between rounds, not in one")


def refusal(tokens: list[int], context: int, vocabulary: int) -> str | None:
    """Why this prompt can't be generated from; vLLM itself dies of an id beyond the vocabulary."""
    if not tokens:
        return "empty_prompt: no tokens"
    if len(tokens) >= context:
        return f"too_long: {len(tokens)} tokens leave no room in a context of {context}"
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        return f"bad_token: ids from {min(tokens)} to {max(tokens)} in a vocabulary of {vocabulary}"
    return None


def gpu_memory(gpus: int) -> list[tuple[int, int]]:
    """Free and total bytes of each GPU that an engine is spread over."""
    import torch

    if (seen := torch.cuda.device_count()) < gpus:
        raise InputError(
            f"an engine over {gpus} GPUs sees {seen}: lower tensor_parallel, or give its process more GPUs"
        )
    return [torch.cuda.mem_get_info(gpu) for gpu in range(gpus)]


def utilisation(share: float, memory: list[tuple[int, int]]) -> float:
    """What vLLM is told. It counts in shares of the whole GPU, and refuses to start where a scoring model has taken so
    much that the rest is less."""
    return share * min(free / total for free, total in memory)


def request_seed(seed: int, request_id: str) -> int:
    """vLLM adds the sample's number to this, so a response depends on (seed, prompt, sample) alone."""
    digest = hashlib.blake2b(f"{seed}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def stop_tokens(folder: Path) -> list[int]:
    """Every id that ends a response: the model's end-of-text list and the end-of-turn of its chat template."""
    from flywheel_tasks.models.chat import Template, load_tokenizer

    found = set(Template(load_tokenizer(folder)).stop_ids)
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        found |= {listed} if isinstance(listed, int) else set(listed or ())
    return sorted(found)


def _completion(request_id: str, drawn: Any) -> wire.Completion:
    return wire.Completion(
        id=request_id,
        sample=drawn.index,
        tokens=list(drawn.token_ids),
        logprobs=list(drawn.logprobs.logprobs),
        finish="stop" if drawn.finish_reason == "stop" else "length",
    )


def main(descriptor: int) -> None:
    _follow_parent()
    parent = Connection(descriptor)
    worker = EngineWorker()
    while True:
        try:
            message = parent.recv_bytes()
        except EOFError:
            break
        parent.send_bytes(worker.call(message))
    # vLLM's own teardown may wait for threads that wait for each other; there is nothing left to save.
    os._exit(0)


def _follow_parent() -> None:
    """End with the parent even in the middle of a step, when nobody reads the socket."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
