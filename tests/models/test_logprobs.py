"""log p and its gradients against torch's own log_softmax, and no tensor of tokens × vocabulary on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models import logprobs as logprobs_module
from flywheel_tasks.models.load import load_policy
from flywheel_tasks.models.logprobs import logprobs, token_logprobs
from flywheel_tasks.models.packed import pack
from tests.models.small import flat_targets, token_rows

TOKENS, WIDTH, WORDS = 1100, 24, 5000


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
    head = torch.randn(WORDS, WIDTH, generator=draw).to(dtype)
    return states, head, torch.randint(WORDS, (TOKENS,), generator=draw), torch.randn(TOKENS, generator=draw)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("learn_head", [False, True])
def test_values_and_gradients_are_log_softmax(temperature: float, learn_head: bool) -> None:
    states, head, tokens, weights = problem(torch.float32)
    ours, theirs = ([states.clone().requires_grad_(), head.clone().requires_grad_(learn_head)] for _ in range(2))
    logprob, entropy = token_logprobs(*ours, tokens, temperature)
    whole = torch.log_softmax(theirs[0] @ theirs[1].T / temperature, -1)
    expected = whole.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(whole.exp() * whole).sum(1), atol=1e-4, rtol=1e-4)
    assert not entropy.requires_grad
    (logprob * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, atol=1e-5, rtol=1e-4)
    if learn_head:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_as_close_to_the_truth_as_the_plain_computation() -> None:
    states, head, tokens, weights = problem(torch.bfloat16)

    def run(states: torch.Tensor, ours: bool) -> tuple[torch.Tensor, torch.Tensor]:
        states = states.clone().requires_grad_()
        if ours:
            logprob, _ = token_logprobs(states, head, tokens)
        else:
            whole = torch.log_softmax((states @ head.to(states.dtype).T).float(), -1)
            logprob = whole.gather(1, tokens[:, None])[:, 0]
        (logprob * weights).sum().backward()
        return logprob.detach(), states.grad.float()

    truth, plain, mine = run(states.float(), False), run(states, False), run(states, True)
    for exact, theirs, our in zip(truth, plain, mine, strict=True):
        assert (our - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("learn_head", [False, True])
def test_tokens_times_vocabulary_is_never_in_memory(learn_head: bool) -> None:
    states, head, tokens, _ = problem(torch.float32)
    with Largest() as largest:
        states.requires_grad_()
        head.requires_grad_(learn_head)
        token_logprobs(states, head, tokens)[0].sum().backward()
    assert largest.numel < TOKENS * WORDS / 4


def without_a_buffer(patch: pytest.MonkeyPatch, fold: Callable[..., Any]) -> None:
    """As a GPU calls it: the exponentials have no room of their own."""
    patch.setattr(logprobs_module, "_fold", lambda z, e, *rest: fold(z, None, *rest))


def both_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    states, head, tokens, weights = problem(dtype)
    states.requires_grad_()
    logprob, entropy = token_logprobs(states, head, tokens, 0.7)
    (logprob * weights).sum().backward()
    return [logprob.detach(), entropy, states.grad.float()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_themselves_are_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = both_gradients(dtype)
    without_a_buffer(monkeypatch, logprobs_module._fold)
    assert all(torch.equal(one, other) for one, other in zip(plain, both_gradients(dtype), strict=True))


@pytest.mark.slow
def test_what_a_gpu_compiles_is_what_a_cpu_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own code for the work between the products, here as C++: the same numbers for every shape of block
    from one compilation, in two loops over its words."""
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    counters.clear()
    plain = both_gradients(torch.bfloat16)
    with config.patch(fx_graph_cache=False):
        without_a_buffer(monkeypatch, logprobs_module._compiled.__wrapped__())
        compiled, (code,) = run_and_get_code(both_gradients, torch.bfloat16)
    for one, other in zip(plain, compiled, strict=True):
        assert (one - other).norm() <= 2e-3 * one.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert code.count("for(int64_t x1=") == 2


def test_extreme_logits_stay_finite() -> None:
    head = torch.eye(4) * 1e4
    states = torch.eye(4).requires_grad_()
    logprob, entropy = token_logprobs(states, head, torch.tensor([0, 0, 2, 3]))
    logprob.sum().backward()
    assert logprob.tolist() == [0.0, -1e4, 0.0, 0.0]
    assert entropy.tolist() == [0.0] * 4
    assert torch.isfinite(states.grad).all()


def test_rows_sum_to_what_transformers_gives(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = token_rows(3, [12, 30, 5], shared=20)
    out = logprobs(load_policy(tiny_model, dtype=torch.float32).model, pack(rows), flat_targets(rows))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for row, total in zip(rows, out.sums(3), strict=True):
        ids = torch.from_numpy(row)[None]
        expected = torch.log_softmax(plain(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).sum()
        torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-5)


def test_targets_that_nothing_predicts_are_refused(tiny_model: Path) -> None:
    model = load_policy(tiny_model, dtype=torch.float32).model
    packed = pack([[5, 6, 7]])
    with pytest.raises(InputError, match="first token of a row"):
        logprobs(model, packed, [True, True, True])
    with pytest.raises(InputError, match="2 targets for 3 tokens"):
        logprobs(model, packed, [False, True])
