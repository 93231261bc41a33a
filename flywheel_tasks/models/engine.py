"""The generation engine: prompts as token ids in, responses with the policy's own logprobs out (Sec. 2.4.1, 2.4.3).

One handle serves rejection sampling, pairs, evaluation, simulated chat and RL rollouts. Behind it run one or more
vLLM engines, fed from one queue. An engine that dies or falls silent is replaced, and what it had not finished, alone,
is done again. A prompt that keeps killing engines becomes an error row.

The replicas are Ray actors, not a Ray Data pool: a pool's actors can't be handed new weights between rounds, a call
into them has no deadline, and what a dead one had in work is redone in whole blocks.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models import engine_wire as wire
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.models.engine_link import EngineLost, Link, connect, ready
from flywheel_tasks.models.engine_round import SUSPECT, Round
from flywheel_tasks.models.engine_wire import Completion, Request
from flywheel_tasks.models.sync import SharedWeights, Weights

__all__ = ["STATS", "Completion", "Engine", "Request", "open_engine"]

STATS = (
    "prompts", "completions", "tokens", "prompt_tokens", "cached_tokens", "deaths", "redone",
    "seconds", "busy_seconds", "waiting_seconds",
)  # fmt: skip

_IDLE_SECONDS = 0.05
_SCORED_AT_ONCE = 16
"""Sequences of one order: it must end within `stall_seconds`."""
_log = logging.getLogger(__name__)
A = TypeVar("A", bound=wire.Answer)


@contextmanager
def open_engine(model: ModelConfig | str | Path, config: EngineConfig | None = None) -> Iterator[Engine]:
    """An engine that serves `model` until the block ends, for as many rounds of generation as wished."""
    if not isinstance(model, ModelConfig):
        model = ModelConfig(path=str(model))
    with Engine(model, config or EngineConfig()) as engine:
        yield engine


class Engine:
    """The handle. One round of generation at a time; weights are updated between rounds."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        self._config = config
        self._start = wire.Start(
            model=model.path if "://" in model.path or ":" in model.path else str(Path(model.path).absolute()),
            dtype=config.dtype,
            context=config.context,
            sequences=config.sequences,
            cache_bytes=int(config.cache_gib * (1 << 30)),
            gpu_memory=config.gpu_memory,
            tensor_parallel=model.tensor_parallel,
        )
        self._links: list[Link | None] = [None] * config.replicas
        self._about: list[wire.Described | None] = [None] * config.replicas
        self._loaded: list[list[str]] = [[]] * config.replicas
        self._shared = SharedWeights()
        self._served: str | None = None
        self._sent = False
        """Whether the engines serve what was sent from device to device, which no file holds."""
        self._round = threading.Lock()
        self._closed = False
        self._totals = dict.fromkeys(STATS, 0.0)
        self._totals_lock = threading.Lock()

    def __enter__(self) -> Engine:
        try:
            ready(len(self._links))
            with ThreadPoolExecutor(len(self._links)) as pool:
                for started in [pool.submit(self._ready, number) for number in range(len(self._links))]:
                    started.result()
        except EngineLost as why:
            self.close()
            raise FlywheelError(f"the engine for {self._start.model} did not start: {why}") from why
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        self._kill()
        self._shared.close()

    # -- what the engine is

    @property
    def replicas(self) -> int:
        return len(self._links)

    @property
    def tensor_parallel(self) -> int:
        """GPUs of each replica."""
        return self._start.tensor_parallel

    @property
    def model(self) -> str:
        """Folder or name of the model it started with."""
        return self._start.model

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its response together."""
        return self._description.context

    @property
    def vocabulary(self) -> int:
        return self._description.vocabulary

    @property
    def stop(self) -> tuple[int, ...]:
        """The token ids that end a response."""
        return tuple(self._description.stop)

    @property
    def platform(self) -> str:
        return self._description.platform

    @property
    def gpus(self) -> list[str]:
        """The GPU of every worker of every replica; none on CPU."""
        return [gpu for about in self._about if about for gpu in about.gpus]

    @property
    def pids(self) -> list[int]:
        return [about.pid for about, link in zip(self._about, self._links, strict=True) if about and link]

    @property
    def _description(self) -> wire.Described:
        return next(about for about in self._about if about)

    def stats(self) -> dict[str, float]:
        """Since the start, every name of STATS: what was drawn, deaths and redone prompts, and seconds: of all rounds,
        of engines at work (busy_seconds), and of the reader without a finished prompt (waiting_seconds)."""
        return dict(self._totals)

    # -- generation

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        deadline: float | None = None,
        replica: int | None = None,
    ) -> list[Completion]:
        """The k completions of every request, in the order of the requests; by one replica alone if it is named."""
        found = self.stream(requests, sampling, deadline, replica)
        done = {completions[0].id: completions for completions in found}
        return [completion for request in requests for completion in done[request.id]]

    def stream(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        deadline: float | None = None,
        replica: int | None = None,
    ) -> Iterator[list[Completion]]:
        """The k completions of each request as soon as it is finished; the engines go on while the reader works.
        After `deadline` seconds the round fails, whatever an engine is doing."""
        if self._closed:
            raise FlywheelError("this engine is closed: generate inside its `with` block")
        if not self._round.acquire(blocking=False):
            raise FlywheelError("a round of generation is running on this engine: finish or close it first")
        draw = wire.Draw(sampling.k, sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed)
        numbers = range(len(self._links)) if replica is None else (replica,)
        current = Round(requests, draw, self._config.restarts, len(numbers))
        feeders = [
            threading.Thread(target=self._feed, args=(number, current), name=f"engine-{number}", daemon=True)
            for number in numbers
        ]
        started = time.monotonic()
        try:
            for feeder in feeders:
                feeder.start()
            yield from self._read(current, started + deadline if deadline is not None else math.inf)
        finally:
            current.stop()
            for feeder in feeders:
                feeder.join()
            self._add(seconds=time.monotonic() - started, deaths=current.deaths, redone=current.redone)
            self._round.release()

    def score(self, requests: Sequence[Request], replica: int = 0) -> list[list[float]]:
        """How likely one replica holds given tokens: log p of each but the first, at temperature 1."""
        if not self._round.acquire(blocking=False):
            raise FlywheelError("a round of generation is running on this engine: finish or close it first")
        try:
            link, found = self._ready(replica), list[list[float]]()
            for first in range(0, len(requests), _SCORED_AT_ONCE):
                order = wire.Score(list(requests[first : first + _SCORED_AT_ONCE]))
                found += _call(link, order, self._config.stall_seconds, wire.Scored).logprobs
            return found
        except EngineLost as why:
            self._drop(replica)
            raise FlywheelError(f"the engine was lost while it scored: {why}") from why
        finally:
            self._round.release()

    def _read(self, current: Round, ends: float) -> Iterator[list[Completion]]:
        while True:
            asked = time.monotonic()
            # Past the deadline, which the reader may have spent on its own work, what is finished is still handed out.
            completions = current.read(max(0.0, min(ends - asked, threading.TIMEOUT_MAX)))
            self._add(waiting_seconds=time.monotonic() - asked)
            if completions is None:
                current.stop()
                self._kill()
                raise FlywheelError(
                    f"generation passed its deadline: {current.returned} prompts were finished; allow more time, fewer "
                    "prompts or a lower sampling.max_tokens"
                )
            if not completions:
                break
            yield completions
        if current.failure is not None:
            raise current.failure

    def _feed(self, number: int, current: Round) -> None:
        """Keep one engine supplied until the round is complete."""
        flying: dict[str, Request] = {}
        room = min(self._config.sequences, current.fair_share)
        try:
            while not current.halted.is_set():
                try:
                    link = self._ready(number)
                    fresh = current.take(flying, room)
                    flying |= {request.id: request for request in fresh}
                    if not flying and current.complete:
                        break
                    if not flying:
                        time.sleep(_IDLE_SECONDS)
                        continue
                    order = wire.Advance(fresh, current.draw, more=current.more_for(flying))
                    advanced = _call(link, order, self._config.stall_seconds, wire.Advanced)
                except EngineLost as why:
                    _log.warning("engine %d was lost: %s; %d prompts are redone", number, why, len(flying))
                    self._drop(number)
                    for request in current.lost(flying, why):
                        reason = f"engine_lost: {SUSPECT + 1} engines died with this prompt in work, one alone: {why}"
                        current.finish(wire.errors(request.id, current.draw.k, reason))
                    flying, room = {}, self._config.sequences
                    continue
                self._count(advanced)
                room = advanced.room
                for completions in advanced.finished:
                    del flying[completions[0].id]
                    current.finish(completions)
        except BaseException as error:
            current.fail(error)
        finally:
            if flying:
                self._forget(number)
            current.leave()

    def _forget(self, number: int) -> None:
        """A round that ends early leaves nothing in an engine that the next round would be given."""
        link = self._links[number]
        try:
            if link is not None:
                _call(link, wire.Abort(), self._config.stall_seconds, wire.Done)
        except EngineLost:
            self._drop(number)

    def _count(self, advanced: wire.Advanced) -> None:
        drawn = [completion for completions in advanced.finished for completion in completions]
        self._add(
            prompts=len(advanced.finished),
            completions=len(drawn),
            tokens=sum(len(completion.tokens) for completion in drawn),
            prompt_tokens=advanced.prompt_tokens,
            cached_tokens=advanced.cached_tokens,
            busy_seconds=advanced.seconds,
        )

    def _add(self, **amounts: float) -> None:
        with self._totals_lock:
            for name, amount in amounts.items():
                self._totals[name] += amount

    # -- weights

    def update(self, weights: Weights | Path | str) -> list[str]:
        """Serve new weights: a safetensors file or folder, which must stay, or (name, tensor) of the whole model.

        Returns the checksum of what each worker loaded. An engine that is replaced later gets the same weights."""
        if not self._round.acquire(blocking=False):
            raise FlywheelError("a round of generation is running: weights are updated between rounds")
        try:
            path = str(Path(weights).absolute()) if isinstance(weights, str | Path) else self._shared.write(weights)
            before, self._served = self._served, path
            try:
                with ThreadPoolExecutor(len(self._links)) as pool:
                    list(pool.map(self._refresh, range(len(self._links))))
            except InputError:
                self._served = before
                raise
            except EngineLost as why:
                raise FlywheelError(f"the engine did not take the new weights: {why}") from why
            self._shared.keep_only(path)
            self._sent = False
            return [checksum for loaded in self._loaded for checksum in loaded]
        finally:
            self._round.release()

    def _refresh(self, number: int) -> None:
        link = self._links[number]
        try:
            if link is not None:
                self._load(number, link)
        except EngineLost:
            self._drop(number)
        self._ready(number)

    def _load(self, number: int, link: Link) -> None:
        done = _call(link, wire.Update(str(self._served)), self._config.stall_seconds, wire.Done)
        self._loaded[number] = done.loaded

    def transfer(self, method: str, info: dict[str, object] | None = None) -> list[str]:
        """One step of vLLM's own weight transfer on every engine; `sync.Transfer` drives it. After the last one, the
        checksum of what each worker loaded."""
        if not self._round.acquire(blocking=False):
            raise FlywheelError("a round of generation is running: weights are updated between rounds")

        def step(number: int) -> list[str]:
            own = info
            if info and "rank_offset" in info:
                own = info | {"rank_offset": int(str(info["rank_offset"])) + number * self.tensor_parallel}
            order = wire.Transfer(method, own)  # type: ignore[arg-type]
            return _call(self._ready(number), order, self._config.stall_seconds, wire.Done).loaded

        try:
            with ThreadPoolExecutor(len(self._links)) as pool:
                return [checksum for loaded in pool.map(step, range(len(self._links))) for checksum in loaded]
        except EngineLost as why:
            raise FlywheelError(f"the engine did not take the new weights at {method}: {why}") from why
        finally:
            self._sent = self._sent or method == "start_weight_update"
            self._round.release()

    # -- processes

    def _ready(self, number: int) -> Link:
        link = self._links[number]
        if link is not None:
            return link
        if self._closed:
            raise FlywheelError("this engine is closed: generate inside its `with` block")
        if self._sent:
            raise FlywheelError(
                "an engine was lost after its weights had come from device to device, and a new one would serve those "
                "of its file: the next attempt goes on from the last checkpoint"
            )
        link = self._links[number] = connect(self._start.tensor_parallel, len(self._links))
        try:
            self._about[number] = _call(link, self._start, self._config.start_seconds, wire.Described)
            if self._served is not None:
                self._load(number, link)
        except BaseException:
            self._drop(number)
            raise
        return link

    def _drop(self, number: int) -> None:
        link, self._links[number] = self._links[number], None
        if link is not None:
            link.kill()

    def _kill(self) -> None:
        for number in range(len(self._links)):
            self._drop(number)


def _call(link: Link, order: wire.Order, seconds: float, kind: type[A]) -> A:
    answer = link.call(order, seconds)
    if isinstance(answer, wire.Failed):
        raise InputError(answer.message) if answer.refused else EngineLost(answer.message)
    if not isinstance(answer, kind):
        raise EngineLost(f"it answered {type(answer).__name__} where {kind.__name__} was due")
    return answer
