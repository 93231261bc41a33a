"""Weights from device to device: vLLM's own sender and receiver, as far as they go without NCCL."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models import engine_wire as wire
from flywheel_tasks.models.arrival import Checksum
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.engine_config import EngineConfig
from flywheel_tasks.models.engine_link import EngineLost
from flywheel_tasks.models.sync import Calls, Transfer, WeightSync, from_device

REPLICAS, PER_ENGINE = 2, 2
WEIGHTS = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.zeros(6, 4, dtype=torch.bfloat16)}


class Line:
    """A link to an engine that does what it is told, or is lost; orders go through the wire's own encoding."""

    def __init__(self, lost_at: str = "", loaded: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        self.orders: list[wire.Transfer] = []
        self.lost_at = lost_at
        checksum = Checksum()
        deque(checksum.over(loaded), maxlen=0)
        self.loaded = [checksum.value()] * PER_ENGINE

    def call(self, order: wire.Order, seconds: float) -> wire.Answer:
        found = wire.order(wire.encode(order))
        assert isinstance(found, wire.Transfer)
        if found.method == self.lost_at:
            raise EngineLost("its process ended")
        self.orders.append(found)
        return wire.Done(0.0, self.loaded if found.method == "finish_weight_update" else [])

    def kill(self) -> None: ...


def engine_of(*lines: Line) -> Engine:
    engine = Engine(ModelConfig(path="/nowhere", tensor_parallel=PER_ENGINE), EngineConfig(replicas=len(lines)))
    engine._links = list(lines)
    return engine


@pytest.mark.parametrize(
    ("engines", "own", "expected"),
    [
        ([], None, False),  # CPU at both ends
        ([], "a", False),
        (["b"], None, False),  # a learner on CPU beside engines on a GPU of this machine
        (["a"], "a", False),  # one GPU for both: NCCL has no place for two ranks on it
        (["b", "c"], "a", True),
    ],
)
def test_the_platform_says_how_weights_travel(engines: list[str], own: str | None, expected: bool) -> None:
    assert from_device(engines, own) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_learner_without_a_gpu_is_refused_in_one_line() -> None:
    with pytest.raises(FlywheelError, match="needs a GPU in the learner too"):
        Transfer(print, dict, lambda: iter(()), engine_gpus=1, address="127.0.0.1")  # type: ignore[arg-type]


@pytest.mark.slow
def test_vllms_handshake_gives_every_worker_of_every_engine_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but NCCL is vLLM's: what its sender says reaches its receiver's parser through our wire."""
    from vllm.distributed.weight_transfer import nccl_engine

    opened: list[Any] = []
    sent: list[tuple[str, torch.Tensor]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info))
    monkeypatch.setattr(
        nccl_engine.NCCLTrainerWeightTransferEngine, "_broadcast",
        lambda self, source, meta: sent.extend(self._checked_iter(source, meta)),
    )  # fmt: skip
    lines = [Line(loaded=WEIGHTS.items()) for _ in range(REPLICAS)]
    engine = engine_of(*lines)
    way = Transfer(
        engine.transfer, lambda: [(n, t.dtype, tuple(t.shape)) for n, t in WEIGHTS.items()],
        lambda: iter(WEIGHTS.items()), engine_gpus=REPLICAS * PER_ENGINE, address="127.0.0.1",
    )  # fmt: skip
    receiver = object.__new__(nccl_engine.NCCLWeightTransferEngine)
    inits = [receiver.parse_init_info(dict(line.orders[0].info or {})) for line in lines]
    assert {(one.master_address, one.master_port, one.world_size) for one in inits} == {
        ("127.0.0.1", opened[0].master_port, 1 + REPLICAS * PER_ENGINE)
    }
    assert all(one.packed for one in inits)
    ranks = [one.rank_offset + worker for one in inits for worker in range(PER_ENGINE)]
    assert ranks == list(range(1, inits[0].world_size))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    way.send()
    for line in lines:
        assert [order.method for order in line.orders] == [
            "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update",
        ]  # fmt: skip
        update = receiver.parse_update_info(dict(line.orders[2].info or {}))
        assert dict(zip(update.names, update.shapes, strict=True)) == {n: list(t.shape) for n, t in WEIGHTS.items()}
        assert [getattr(torch, name) for name in update.dtype_names] == [t.dtype for t in WEIGHTS.values()]
    assert sent == list(WEIGHTS.items())
    lines[1].loaded[1] = "another"
    with pytest.raises(FlywheelError, match="did not load the weights that the learner sent: 1 of 4 workers"):
        way.send()


def test_nothing_is_sent_before_the_learners_step_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order alone: without a GPU there is no stream to wait for."""
    came: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: came.append("step done"))
    )
    way = object.__new__(Transfer)
    way._checksum, way._calls = Checksum(), Calls(lambda *_: None)
    way._calls.loaded = [Checksum().value()]
    way._sender = SimpleNamespace(send_weights=lambda: came.append("sent"))
    way.send()
    assert came == ["step done", "sent"]


def test_an_engine_lost_while_it_takes_weights_is_one_line() -> None:
    engine = engine_of(Line(), Line(lost_at="update_weights"))
    engine.transfer("start_weight_update")
    with pytest.raises(FlywheelError, match="did not take the new weights at update_weights: its process ended"):
        engine.transfer("update_weights", {"names": []})


def test_no_engine_is_replaced_by_one_with_the_weights_of_its_file() -> None:
    engine = engine_of(Line())
    engine.transfer("start_weight_update")
    engine._drop(0)
    with pytest.raises(FlywheelError, match="an engine was lost after its weights had come from device to device"):
        engine.score([wire.Request("p", [5, 6])])


def test_nothing_is_sent_into_a_round() -> None:
    engine = engine_of(Line())
    entered: Callable[[], object] = engine._round.acquire
    threading.Thread(target=entered).start()
    with pytest.raises(FlywheelError, match="updated between rounds"):
        engine.transfer("start_weight_update")


def test_what_comes_in_pieces_is_counted_once_and_the_model_left_as_it_was() -> None:
    class Model(torch.nn.Module):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            return {name for name, _ in weights}

    model, worker, whole = Model(), WeightSync(), Checksum()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    deque(whole.over(WEIGHTS.items()), maxlen=0)
    expected = whole.value()
    for _ in range(2):
        worker.begin_checksum()
        for one in WEIGHTS.items():
            assert model.load_weights([one]) == {one[0]}
        assert worker.end_checksum() == expected
        assert "load_weights" not in vars(model)
