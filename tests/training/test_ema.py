"""The averaged reference equals its closed form, and borrowing the module leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flywheel_tasks.training.ema import Ema
from flywheel_tasks.training.task import After


def test_the_average_is_the_closed_form_over_initial_and_later_weights() -> None:
    """After n moves: decay^n θ_0 + Σ (1 - decay) decay^(n-i) θ_i."""
    torch.manual_seed(0)
    module, decay = nn.Linear(3, 2), 0.8
    seen = [module.weight.detach().clone()]
    ema = Ema(decay)
    ema.start(module)
    for step in range(6):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        seen.append(module.weight.detach().clone())
        ema.after_step(After(step, module, {}, 0))
    n = len(seen) - 1
    expected = decay**n * seen[0] + sum((1 - decay) * decay ** (n - i) * seen[i] for i in range(1, n + 1))
    assert torch.allclose(ema.average["weight"], expected, atol=1e-6)


def test_it_moves_only_as_often_as_asked() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(0.0, every=3)
    ema.start(module)
    first = ema.average["weight"].clone()
    for step in range(3):
        with torch.no_grad():
            module.weight.add_(1)
        ema.after_step(After(step, module, {}, 0))
        assert torch.equal(ema.average["weight"], first) == (step < 2)
    assert torch.equal(ema.average["weight"], module.weight)


def test_the_module_gets_its_own_weights_back_even_after_an_error() -> None:
    module = nn.Linear(2, 2, dtype=torch.bfloat16)
    ema = Ema(0.5)
    ema.start(module)
    with torch.no_grad():
        module.weight.add_(1)
    own = module.weight.detach().clone()

    def fail() -> None:
        with ema.swapped(module):
            assert not torch.equal(module.weight, own)
            raise RuntimeError("reference")

    with pytest.raises(RuntimeError, match="reference"):
        fail()
    assert torch.equal(module.weight, own)
