"""The schedule's shape, and why masters are fp32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flywheel_tasks.training.optim import Optimiser, rate


@given(st.integers(1, 500), st.floats(0, 0.9), st.floats(0, 1))
def test_the_rate_rises_to_one_then_falls_to_the_floor(steps: int, warmup: float, floor: float) -> None:
    shares = [rate(step, steps, warmup, floor) for step in range(steps)]
    peak = shares.index(max(shares))
    assert all(0 < share <= 1 + 1e-12 for share in shares) or floor == 0
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert rate(steps, steps, warmup, floor) == pytest.approx(floor)


def test_a_first_step_is_never_wasted_at_rate_zero() -> None:
    assert rate(0, 10, 0.5, 0.1) == pytest.approx(0.2)
    assert rate(0, 1, 0.5, 0.1) == 1


def _module(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8, dtype=dtype)


def test_updates_too_small_for_bf16_add_up_in_the_master() -> None:
    """200 updates of 1e-5 move a weight near 1 by 2e-3; in bf16 alone each would round away."""
    module = _module(torch.bfloat16)
    nn.init.ones_(module.weight)
    optimiser = Optimiser(module, learning_rate=1e-5, weight_decay=0)
    for _ in range(800):
        module(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        optimiser.gradients()
        optimiser.step(1.0)
    assert optimiser.masters["weight"].mean().item() == pytest.approx(1 - 8e-3, abs=1e-3)
    assert module.weight.float().mean() < 1 - 3e-3
    assert torch.tensor(1.0, dtype=torch.bfloat16) - 1e-5 == 1


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16; the sum of 100 such micro-batches is not."""
    module = _module(torch.bfloat16)
    optimiser = Optimiser(module, learning_rate=1e-3, weight_decay=0)
    for value in [256.0] + [1.0] * 100:
        (module.bias.sum() * value).backward()
        assert module.bias.grad is None, "the bf16 gradient is let go of at once"
    assert optimiser.masters["bias"].grad is not None
    assert (optimiser.masters["bias"].grad == 356).all()


def test_matrices_decay_and_biases_do_not() -> None:
    module = _module(torch.float32)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = Optimiser(module, learning_rate=0.1, weight_decay=0.5)
    optimiser.gradients()
    optimiser.step(1.0)
    assert torch.allclose(module.weight, before["weight"] * 0.95)
    assert torch.equal(module.bias, before["bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimiser_goes_on_to_the_last_bit(dtype: torch.dtype) -> None:
    def train(module: nn.Linear, optimiser: Optimiser, steps: range) -> None:
        for step in steps:
            module(torch.full((1, 8), 0.1 * step, dtype=dtype)).square().sum().backward()
            optimiser.gradients()
            optimiser.clip(1.0)
            optimiser.step(0.5)

    straight, broken = _module(dtype), _module(dtype)
    first = Optimiser(straight, learning_rate=0.01, weight_decay=0.1)
    train(straight, first, range(9))
    half = Optimiser(broken, learning_rate=0.01, weight_decay=0.1)
    train(broken, half, range(4))
    state = {name: tensor.clone() for name, tensor in half.state().items()}
    fresh = _module(dtype)
    again = Optimiser(fresh, learning_rate=0.01, weight_decay=0.1)
    again.restore(state)
    train(fresh, again, range(4, 9))
    assert torch.equal(fresh.weight, straight.weight)
    ours, theirs = again.state(), first.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_resumed_step_count_is_where_its_kernel_wants_it(sharded: bool) -> None:
    """`meta` stands in for a GPU: what was saved is on the CPU, and the fused kernel refuses a count that is not on the
    device of the weights."""
    first = Optimiser(_module(torch.float32), learning_rate=0.1, weight_decay=0)
    first.gradients()
    first.step(1.0)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    module = _module(torch.float32).to("meta")
    again = Optimiser(module, learning_rate=0.1, weight_decay=0, sharded=sharded)
    again.restore(saved)
    counts = {name: tensor.device.type for name, tensor in again.state().items() if name.startswith("step/")}
    assert set(counts.values()) == {"cpu" if sharded else "meta"}
    again.gradients()
    again.step(1.0)


def test_the_state_of_another_model_is_refused() -> None:
    optimiser = Optimiser(_module(torch.float32), learning_rate=0.1, weight_decay=0)
    with pytest.raises(ValueError, match="another model"):
        optimiser.restore({"master/other": torch.zeros(1)})


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        Optimiser(_module(torch.float32).requires_grad_(False), learning_rate=0.1, weight_decay=0)
