"""What goes to an engine and what comes back, as MessagePack: an engine is another process, maybe another machine."""

from __future__ import annotations

from typing import Literal

import msgspec


class Request(msgspec.Struct, frozen=True):
    """One prompt. Its id and the seed of the sampling decide the k responses, so ids are unique within a round."""

    id: str
    tokens: list[int]


class Completion(msgspec.Struct, frozen=True):
    """One response. `logprobs` are those of the distribution it was drawn from, temperature and top_p applied: the
    behaviour policy of Sec. 2.4.3. The stop token is the last of `tokens` where the finish is `stop`."""

    id: str
    sample: int
    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length", "error"]
    reason: str | None = None


def errors(request_id: str, k: int, reason: str) -> list[Completion]:
    """The k completions of a prompt that can't be generated from."""
    return [Completion(request_id, sample, [], [], "error", reason) for sample in range(k)]


class Draw(msgspec.Struct, frozen=True):
    """A sampling as the engine needs it."""

    k: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load the model; answered by `Described`."""

    model: str
    dtype: str
    context: int | None
    sequences: int
    cache_bytes: int
    gpu_memory: float
    tensor_parallel: int


class Advance(msgspec.Struct, frozen=True, tag=True):
    """Take these requests and go on for a moment; `more` says that others wait, so come back when there is room."""

    requests: list[Request]
    draw: Draw
    more: bool


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget every request."""


class Score(msgspec.Struct, frozen=True, tag=True):
    """How likely are these tokens? Answered by `Scored`."""

    requests: list[Request]


class Update(msgspec.Struct, frozen=True, tag=True):
    """Serve the weights in this safetensors file from now on."""

    path: str


class Transfer(msgspec.Struct, frozen=True, tag=True):
    """One step of vLLM's own weight transfer, by the name of its method."""

    method: Literal["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
    info: dict[str, object] | None


Order = Start | Advance | Abort | Score | Update | Transfer


class Described(msgspec.Struct, frozen=True, tag=True):
    pid: int
    platform: str
    context: int
    vocabulary: int
    stop: list[int]
    gpus: list[str]
    seconds: float


class Advanced(msgspec.Struct, frozen=True, tag=True):
    """All k completions of every request that finished, and how many sequences more the engine wants."""

    finished: list[list[Completion]]
    room: int
    seconds: float
    prompt_tokens: int
    cached_tokens: int


class Scored(msgspec.Struct, frozen=True, tag=True):
    """log p of every token but the first, given those before it, at temperature 1; for each request in order."""

    logprobs: list[list[float]]


class Done(msgspec.Struct, frozen=True, tag=True):
    """`loaded` is what each worker of the engine loaded, as a checksum, where the order gave it weights."""

    seconds: float
    loaded: list[str] = []


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The order failed: refused for what it asked for, or else the engine is in no known state and must go."""

    message: str
    refused: bool


Answer = Described | Advanced | Scored | Done | Failed

_encoder = msgspec.msgpack.Encoder()
_orders = msgspec.msgpack.Decoder(Order)
_answers = msgspec.msgpack.Decoder(Answer)


def encode(message: Order | Answer) -> bytes:
    return _encoder.encode(message)


def order(data: bytes) -> Order:
    return _orders.decode(data)


def answer(data: bytes) -> Answer:
    return _answers.decode(data)
