"""The losses against their printed equations, evaluated by hand in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.training import losses

finite = st.floats(-30, 30)


@given(finite, finite)
def test_eq_1_is_minus_log_sigma_of_the_margin(chosen: float, rejected: float) -> None:
    found = losses.pointwise(torch.tensor([chosen]).double(), torch.tensor([rejected]).double()).item()
    assert found == pytest.approx(np.logaddexp(0, -(np.float32(chosen) - np.float32(rejected))), rel=1e-5, abs=1e-9)


@given(finite, st.booleans())
def test_eq_2_does_not_care_which_side_is_called_zero(logit: float, wins: bool) -> None:
    """s(x, y0, y1) with t is the loss of -s with 1 - t: swapping the responses swaps the label."""
    one = losses.pairwise(torch.tensor([logit]), torch.tensor([wins]))
    other = losses.pairwise(-torch.tensor([logit]), torch.tensor([not wins]))
    assert torch.allclose(one, other, atol=1e-6)
    t = float(wins)
    sigma = 1 / (1 + math.exp(-logit))
    if 1e-6 < sigma < 1 - 1e-6:
        printed = -(t * math.log(sigma) + (1 - t) * math.log(1 - sigma))
        assert one.item() == pytest.approx(printed, rel=1e-3, abs=1e-6)


def test_eq_6_ignores_labels_that_are_missing() -> None:
    logits = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([[1.0, 0, math.nan]] * 6)
    values, known = losses.signal(logits, labels)
    assert known.sum() == 12
    values.sum().backward()
    assert values[:, 2].abs().sum() == 0
    assert logits.grad is not None
    assert logits.grad[:, 2].abs().sum() == 0
    sigma = torch.sigmoid(logits.detach())
    assert torch.allclose(values[:, 0], -sigma[:, 0].log())
    assert torch.allclose(values[:, 1], -(1 - sigma[:, 1]).log(), atol=1e-6)


def test_all_labels_missing_is_a_zero_not_a_nan() -> None:
    values, known = losses.signal(torch.randn(2, 2), torch.full((2, 2), math.nan))
    assert values.sum() == 0
    assert not known.any()


def _eq_8(
    theta: np.ndarray,
    old: np.ndarray,
    gen: np.ndarray,
    ref: np.ndarray,
    advantage: np.ndarray,
    epsilon: float,
    cap: float,
    beta: float,
) -> np.ndarray:
    """The equation as printed, token by token, with the truncation of its first factor."""
    out = []
    for t in range(len(theta)):
        weight = min(np.exp(old[t]) / np.exp(gen[t]), cap)
        ratio = np.exp(theta[t]) / np.exp(old[t])
        gain = min(ratio * advantage[t], np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage[t])
        divergence = np.exp(ref[t]) / np.exp(theta[t]) - np.log(np.exp(ref[t]) / np.exp(theta[t])) - 1
        out.append(-(weight * gain - beta * divergence))
    return np.array(out)


@given(st.integers(0, 2**31), st.booleans(), st.floats(0, 1), st.floats(0.05, 0.5), st.floats(0.5, 4))
def test_eq_8_as_printed_on_and_off_policy(seed: int, on: bool, beta: float, epsilon: float, cap: float) -> None:
    rng = np.random.default_rng(seed)
    theta = -rng.exponential(2.0, 40)
    old = theta + (0 if on else rng.normal(0, 0.4, 40))
    gen = old + (0 if on else rng.normal(0, 0.4, 40))
    ref = theta + rng.normal(0, 0.3, 40)
    row = np.sort(rng.integers(0, 5, 40))
    advantage = rng.normal(size=5)[row]
    found = losses.grpo(
        *(torch.tensor(a) for a in (theta, old, gen, ref, advantage, row)), clip=epsilon, cap=cap, beta=beta
    )
    assert np.allclose(found.numpy(), _eq_8(theta, old, gen, ref, advantage, epsilon, cap, beta), atol=1e-10)


def test_sequence_level_takes_the_geometric_mean_of_a_response() -> None:
    generator = torch.Generator().manual_seed(0)
    theta, old, gen = (torch.randn(7, generator=generator) for _ in range(3))
    row = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    advantage = torch.tensor([1.0, 1, 1, -2, -2, -2, -2])
    found = losses.grpo(theta, old, gen, theta, advantage, row, clip=0.2, cap=2.0, level="sequence")
    for one in (slice(0, 3), slice(3, 7)):
        ratio = (theta - old)[one].mean().exp()
        weight = (old - gen)[one].mean().exp().clamp(max=2.0)
        a = advantage[one][0]
        expected = -weight * min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        assert torch.allclose(found[one], expected.expand(found[one].shape))


def test_the_weight_of_the_behaviour_policy_carries_no_gradient() -> None:
    theta = torch.randn(5, requires_grad=True)
    old = theta.detach().clone().requires_grad_()
    losses.grpo(
        theta, old, theta.detach() - 0.3, theta.detach(), torch.ones(5), torch.zeros(5, dtype=torch.long)
    ).sum().backward()
    assert theta.grad is not None
    assert torch.allclose(theta.grad, torch.full((5,), -math.exp(0.3)))


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_advantages_are_centred_and_scaled_within_their_group(seed: int, k: int) -> None:
    rewards = torch.from_numpy(np.random.default_rng(seed).normal(3, 2, (4, k)))
    centred, scaled = losses.advantages(rewards, normalise=False), losses.advantages(rewards)
    assert torch.allclose(centred.mean(1), torch.zeros(4, dtype=torch.double), atol=1e-12)
    assert torch.allclose(scaled, centred / (rewards.std(1, keepdim=True) + 1e-4))
    assert (scaled.argmax(1) == rewards.argmax(1)).all()


@pytest.mark.parametrize("k", [1, 4])
def test_equal_rewards_teach_nothing_and_make_no_nan(k: int) -> None:
    assert (losses.advantages(torch.full((3, k), 7.0)) == 0).all()


def test_online_dpo_prefers_the_best_over_the_worst_and_skips_ties() -> None:
    logprob = torch.tensor([[-1.0, -2, -3], [-1, -1, -1]], requires_grad=True)
    reference = torch.zeros(2, 3)
    rewards = torch.tensor([[0.0, 5, -1], [2, 2, 2]])
    values, informative = losses.online_dpo(logprob, reference, rewards, beta=0.5)
    assert informative.tolist() == [True, False]
    assert values[0].item() == pytest.approx(np.logaddexp(0, -0.5 * (-2 + 3)))
    values.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad[0, 1] < 0 < logprob.grad[0, 2]
    assert logprob.grad[0, 0] == 0
    assert (logprob.grad[1] == 0).all()


@given(st.integers(0, 2**31))
def test_kl_estimators_agree_with_the_divergence_in_expectation(seed: int) -> None:
    """Weighted by the policy's own probabilities, k1 and k3 are the exact KL of two categorical distributions."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.log_softmax(torch.randn(2, 9, generator=generator, dtype=torch.double), dim=1)
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        assert torch.allclose((p.exp() * losses.kl(p, q, estimator)).sum(), exact)  # type: ignore[arg-type]
    assert (losses.kl(p, q) >= 0).all()


def test_a_dpo_pair_whose_sides_are_equal_has_no_gradient() -> None:
    same = torch.tensor([-4.0], requires_grad=True)
    loss = losses.dpo(same, same, torch.tensor([-3.0]), torch.tensor([-3.0]), beta=0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert same.grad is not None
    assert same.grad.item() == 0


def test_clipped_share_marks_only_tokens_without_gradient() -> None:
    theta = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0], requires_grad=True)
    old, advantage = torch.zeros(5), torch.tensor([1.0, -1, 1, -1, 1])
    losses.grpo(theta, old, old, old, advantage, torch.arange(5)).sum().backward()
    marked = losses.clipped_share(
        theta.detach(), old, advantage, torch.arange(5), clip=0.2, clip_high=None, level="token"
    )
    assert theta.grad is not None
    assert ((theta.grad == 0) == marked.bool()).all()


def test_clipped_share_marks_whole_responses_where_the_ratio_is_theirs() -> None:
    """The first response has moved by exp(0.5) in the mean, one token of it not at all; the second's two cancel."""
    theta = torch.tensor([1.0, 0.0, 0.5, -0.5], requires_grad=True)
    old, advantage, row = torch.zeros(4), torch.ones(4), torch.tensor([0, 0, 1, 1])
    losses.grpo(theta, old, old, old, advantage, row, level="sequence").sum().backward()
    marked = losses.clipped_share(theta.detach(), old, advantage, row, clip=0.2, clip_high=None, level="sequence")
    assert theta.grad is not None
    assert marked.tolist() == [1, 1, 0, 0]
    assert ((theta.grad == 0) == marked.bool()).all()
