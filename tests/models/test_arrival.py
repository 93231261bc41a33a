"""A checksum of weights: blind to how they travel, and to nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.arrival import Checksum, bits, check

Pairs = Iterable[tuple[str, torch.Tensor]]


def total(weights: Pairs) -> str:
    checksum = Checksum()
    deque(checksum.over(weights), maxlen=0)
    return checksum.value()


def weights(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (5, 7), "b": (8,), "c": (3, 4), "d": (1,)}
    kinds = (torch.bfloat16, torch.float32, torch.float16, torch.uint8)
    return {
        name: torch.randint(0, 99, shape, generator=draw).to(kind)
        for (name, shape), kind in zip(shapes.items(), kinds, strict=True)
    }


def test_weights_pass_unchanged() -> None:
    found = weights(0)
    assert all(tensor is found[name] for name, tensor in Checksum().over(found.items()))


@given(st.integers(0, 1000), st.permutations(range(4)))
def test_the_order_and_the_way_do_not_matter(seed: int, order: list[int]) -> None:
    """The packed buffer in which NCCL delivers puts tensors at any place, and a shard may be a view."""
    found = list(weights(seed).items())
    buffer = torch.cat([torch.zeros(6, dtype=torch.uint8), *(t.flatten().view(torch.uint8) for _, t in found)])
    ends, moved = 6, []
    for name, tensor in found:
        if ends % tensor.element_size():
            continue
        moved.append((name, buffer[ends : ends + tensor.nbytes].view(tensor.dtype).view(tensor.shape)))
        ends += tensor.nbytes
    arrived = dict(found) | dict(moved) | {"c": dict(found)["c"].t().contiguous().t()}
    shuffled = [(found[i][0], arrived[found[i][0]]) for i in order]
    assert total(shuffled) == total(found)


@given(st.integers(0, 1000), st.sampled_from("abcd"), st.integers(0, 34))
def test_one_bit_of_one_weight_shows(seed: int, name: str, place: int) -> None:
    found = weights(seed)
    other = {key: tensor.clone() for key, tensor in found.items()}
    raw = other[name].flatten().view(torch.uint8)
    raw[place % len(raw)] ^= 1
    assert total(other.items()) != total(found.items())


def test_two_tensors_that_change_places_show() -> None:
    one, other = torch.ones(8), torch.zeros(8)
    assert total([("a", one), ("b", other)]) != total([("a", other), ("b", one)])


def test_a_sum_is_of_what_passed_since_the_last_one() -> None:
    checksum, found = Checksum(), weights(1)
    for _ in range(2):
        deque(checksum.over(found.items()), maxlen=0)
        assert checksum.value() == total(found.items())


def test_a_billion_weights_would_not_overflow_into_an_error() -> None:
    assert int(bits(torch.full((64,), -1, dtype=torch.int64))) == -64
    assert total([("a", torch.full((64,), -1, dtype=torch.int64))])


def test_every_worker_must_have_loaded_what_was_sent() -> None:
    check("aa", ["aa", "aa"])
    for loaded in ([], ["aa", "bb"]):
        with pytest.raises(FlywheelError, match="did not load the weights that the learner sent"):
            check("aa", loaded)
