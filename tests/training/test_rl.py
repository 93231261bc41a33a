"""Online RL: eq. 8 whole against its printed form and against TRL, and bandits whose optimum is in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flywheel_tasks.training import rl
from flywheel_tasks.training.ema import Ema
from flywheel_tasks.training.task import Step
from tests.training import bigrams

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
STATES = 7


def rollouts(config: rl.LossConfig, seed: int, gen: torch.Tensor, k: int = 4, groups: int = 3) -> pa.Table:
    """Ragged responses to prompts of different lengths, with the engine's own log-probabilities."""
    rng = np.random.default_rng(seed)
    table = torch.log_softmax(gen, 1)
    rows = []
    for number in range(groups):
        prompt = rng.integers(0, STATES, rng.integers(1, 40)).tolist()
        responses = [rng.integers(0, STATES, rng.integers(1, 9)).tolist() for _ in range(k)]
        logp = [[float(table[a, b]) for a, b in zip([prompt[-1], *r], r, strict=False)] for r in responses]
        rows.append(rl.group(f"g{number}", prompt, responses, logp, rng.normal(size=k), config))
    return pa.Table.from_pylist(rows, rl.ROWS)


def at(reference: torch.Tensor | None = None, old: torch.Tensor | None = None, step: int = 0) -> Step:
    hooks = []
    for name, weights in (("reference", reference), ("old", old)):
        if weights is not None:
            hook = Ema(1.0, 2 if name == "old" else 1, name=name)
            hook.start(bigrams.Bigram(weights))
            hooks.append(hook)
    return Step(step, 0, torch.device("cpu"), tuple(hooks))


def printed(
    theta: np.ndarray, old: np.ndarray, ref: np.ndarray, table: pa.Table, epsilon: float, cap: float, beta: float
) -> float:
    """Eq. 8 as printed, one token after the other, on the policies' logits; negated, the mean over all tokens."""

    def log_p(logits: np.ndarray, before: int, token: int) -> float:
        return float(logits[before, token] - np.log(np.exp(logits[before]).sum()))

    values = []
    for row in table.to_pylist():
        rewards = np.array(row["reward"])
        for ids, marks, gen, reward in zip(row["ids"], row["trained"], row["gen"], rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            places = np.flatnonzero(marks)
            for place, behaviour in zip(places, gen, strict=True):
                now, then, far = (log_p(p, ids[place - 1], ids[place]) for p in (theta, old, ref))
                ratio = np.exp(now - then)
                gain = min(ratio * advantage, np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)
                divergence = np.exp(far - now) - (far - now) - 1
                values.append(-(min(np.exp(then - behaviour), cap) * gain - beta * divergence))
    return float(np.mean(values))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", ["on", "off"])
def test_the_loss_of_a_step_and_its_gradient_are_eq_8(seed: int, policy: str) -> None:
    """Off-policy: the engine is behind the learner, and the rollout meets its second update."""
    config = rl.LossConfig(grpo=rl.GrpoConfig(cap=1.5, beta=0.3, estimator="k3"), updates=2)
    theta, old, gen, ref = (bigrams.logits(STATES, seed * 10 + i) for i in range(4))
    old = theta + 0.3 * old
    gen = old + 0.4 * gen if policy == "off" else theta
    table = rollouts(config, seed, gen)
    module = bigrams.Bigram(theta)
    where = at(ref, old if policy == "off" else None, step=1 if policy == "off" else 0)
    loss = rl.grpo_loss(config.grpo, 1.0, module, table, where)
    count = sum(table.column("count").to_pylist())
    (loss.total / count).backward()
    parts = [p.numpy() for p in (old if policy == "off" else theta, ref)]
    assert loss.total.item() / count == pytest.approx(printed(theta.numpy(), *parts, table, 0.2, 1.5, 0.3), abs=1e-6)
    assert loss.sums["clipped"][0] > 0 or policy == "on"
    step, found = 1e-5, module.logits.grad
    assert found is not None
    rng = np.random.default_rng(seed)
    for a, b in rng.integers(0, STATES, (12, 2)):
        sides = []
        for sign in (1, -1):
            moved = theta.numpy().copy()
            moved[a, b] += sign * step
            sides.append(printed(moved, *parts, table, 0.2, 1.5, 0.3))
        assert found[a, b].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-6)


def test_the_whole_loss_is_trls_for_the_same_terms() -> None:
    """π_old = π_gen and a fixed reference; TRL's own loss code runs on our rollouts."""
    trl = pytest.importorskip("trl")
    from tests.training.test_losses_beside_trl import _grpo_self

    config = rl.LossConfig(grpo=rl.GrpoConfig(beta=0.1, clip_high=0.28, estimator="k3"))
    theta, ref = bigrams.logits(STATES, 1), bigrams.logits(STATES, 2)
    module, table = bigrams.Bigram(theta), rollouts(config, 5, theta)
    ours = rl.grpo_loss(config.grpo, 1.0, module, table, at(ref)).total / sum(table.column("count").to_pylist())
    ours.backward()
    sequences = [
        (ids, np.flatnonzero(marks), r)
        for row in table.to_pylist()
        for ids, marks, r in zip(row["ids"], row["trained"], row["reward"], strict=True)
    ]
    longest = max(len(places) for _, places, _ in sequences)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    leaf = theta.clone().requires_grad_()
    padded = [torch.zeros(len(sequences), longest, dtype=torch.float64) for _ in range(2)]
    for i, (ids, places, _) in enumerate(sequences):
        mask[i, : len(places)] = 1
        before, token = torch.tensor(ids)[places - 1], torch.tensor(ids)[places]
        for values, weights in zip(padded, (leaf, ref), strict=True):
            values[i, : len(places)] = torch.log_softmax(weights, 1)[before, token]
    rewards = torch.tensor([r for *_, r in sequences]).view(3, 4)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    inputs = {
        "prompt_ids": torch.ones(len(sequences), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(sequences), 2, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": advantage,
        "old_per_token_logps": padded[0].detach(),
        "ref_per_token_logps": padded[1],
    }
    trainer = _grpo_self(padded[0], loss_type="bnpo", level="token", beta=0.1, corrected=False)
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert module.logits.grad is not None
    assert torch.allclose(module.logits.grad, *torch.autograd.grad(theirs, leaf), atol=1e-5)


def optimum(start: torch.Tensor, rewards: torch.Tensor, beta: float, k: int) -> torch.Tensor:
    """argmax E r - β KL(π ‖ π_ref) is π_ref exp(r/β); that a response is part of its group's mean shrinks r by 1/k."""
    return torch.softmax(start[: len(rewards)] + rewards * (k - 1) / k / beta, 1)


@pytest.mark.parametrize(("lag", "updates"), [(0, 1), (2, 1), (0, 4)])
def test_a_bandits_optimum_is_found_and_the_kl_bound_holds(tmp_path: Path, lag: int, updates: int) -> None:
    """On-policy; with an engine two updates behind, weighed by π_old/π_gen; and with four updates on each rollout."""
    beta, k, steps = 0.5, 64, 320
    start, rewards = bigrams.logits(6, 3, 0.5), 0.5 * bigrams.logits(6, 4)[:3]
    grpo = rl.GrpoConfig(beta=beta, normalise=False, cap=10.0, clip=0.05)
    config = rl.LossConfig(grpo=grpo, reference=rl.ReferenceConfig(decay=1.0), updates=updates)
    arms = bigrams.Arms(rewards, config, k=k, steps=steps, lag=lag)
    found, lines = bigrams.learn(tmp_path, start, arms, 0.03)
    policy, wanted = torch.softmax(found[:3], 1), optimum(start, rewards, beta, k)
    first = torch.softmax(start[:3], 1)
    assert (policy - wanted).abs().sum(1).max() / 2 < 0.06
    gained = ((policy - first) * rewards).sum(1)
    spent = (policy * (policy / first).log()).sum(1)
    assert (gained > 0).all()
    assert (beta * spent <= gained).all()
    assert (policy.argmax(1) == wanted.argmax(1)).all()
    metrics = {name: np.mean([line["metrics"][name] for line in lines]) for name in ("gap", "clipped")}
    assert (metrics["gap"] > 1e-6) == (lag > 0)
    assert (metrics["clipped"] > 0) == (updates > 1)
    assert all(np.isfinite(list(line["metrics"].values())).all() for line in lines)


def test_online_dpo_climbs_the_same_bandit_by_one_key(tmp_path: Path) -> None:
    start, rewards = bigrams.logits(6, 3, 0.5), bigrams.logits(6, 4)[:3]
    config = rl.LossConfig(kind="online_dpo", reference=rl.ReferenceConfig(decay=1.0))
    arms = bigrams.Arms(rewards, config, k=8, steps=40)
    found, lines = bigrams.learn(tmp_path, start, arms, 0.05)
    before, after = (torch.softmax(p[:3], 1) for p in (start, found))
    assert ((after - before) * rewards).sum(1).min() > 0.2
    assert (after.argmax(1) == rewards.argmax(1)).all()
    assert lines[-1]["metrics"]["margin"] > 0


def test_a_moving_reference_lets_the_policy_go_further_than_a_fixed_one(tmp_path: Path) -> None:
    """π_ref as an average of checkpoints follows the policy; with decay 1 it holds it where it began."""
    start, rewards = bigrams.logits(6, 3, 0.5), bigrams.logits(6, 4)[:3]
    reached = []
    for decay in (1.0, 0.9):
        config = rl.LossConfig(grpo=rl.GrpoConfig(beta=1.0), reference=rl.ReferenceConfig(decay=decay))
        arms = bigrams.Arms(rewards, config, k=16, steps=100)
        found, _ = bigrams.learn(tmp_path / str(decay), start, arms, 0.05)
        reached.append(float((torch.softmax(found[:3], 1) * rewards).sum(1).mean()))
    assert reached[1] > reached[0] + 0.1


@given(st.integers(2, 9), st.integers(0, 2**31))
def test_a_row_is_a_group_and_online_dpo_takes_its_best_and_worst(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 99, rng.integers(1, 20)).tolist()
    responses = [[*rng.integers(0, 99, rng.integers(0, 6)).tolist(), 7] for _ in range(k)]
    gen = [rng.normal(size=len(r)).tolist() for r in responses]
    rewards = rng.normal(size=k)
    stop = frozenset({7})
    whole = rl.group("g", prompt, responses, gen, rewards, rl.LossConfig(), stop)
    assert [ids.tolist() for ids in whole["ids"]] == [[*prompt, *r] for r in responses]
    assert whole["count"] == sum(map(len, responses)) == sum(map(sum, whole["trained"]))
    assert whole["gen"] == gen
    pair = rl.group("g", prompt, responses, gen, rewards, rl.LossConfig(kind="online_dpo"), stop)
    best, worst = int(rewards.argmax()), int(rewards.argmin())
    assert [ids.tolist() for ids in pair["ids"]] == [[*prompt, *responses[i]] for i in (best, worst)]
    assert pair["reward"] == [rewards[best], rewards[worst]]
    assert not any(marks[-1] for marks in pair["trained"])
    assert pair["gen"] == [gen[best][:-1], gen[worst][:-1]]


def test_the_end_of_turn_token_gets_a_gradient_from_grpo_and_none_from_online_dpo() -> None:
    """Table 7: a rejected response must not teach the policy not to stop."""
    stop, theta = STATES - 1, bigrams.logits(STATES, 8)
    for kind, taught in (("grpo", True), ("online_dpo", False)):
        config = rl.LossConfig(kind=kind)  # type: ignore[arg-type]
        gen = [[-1.0, -1.0], [-2.0, -1.0]]
        row = rl.group("g", [0], [[1, stop], [2, stop]], gen, np.array([1.0, -1.0]), config, frozenset({stop}))
        module, table = bigrams.Bigram(theta), pa.Table.from_pylist([row], rl.ROWS)
        loss: Any = bigrams.task(theta, config).loss(module, table, at(theta))
        loss.total.backward()
        assert module.logits.grad is not None
        assert bool(module.logits.grad[1:3].abs().sum() > 0) == taught
        assert module.logits.grad[0].abs().sum() > 0


def test_a_reference_costs_adapters_and_no_second_model(tiny_model: Path) -> None:
    from flywheel_tasks.models.load import load_policy
    from flywheel_tasks.models.lora import Lora

    module = load_policy(tiny_model, lora=Lora(rank=2))
    [make] = rl.hooks(rl.LossConfig())
    hook = make()
    hook.start(module)
    kept = sum(tensor.numel() for tensor in hook.tensors().values())
    assert 0 < kept < 0.1 * sum(p.numel() for p in module.parameters())
    assert rl.hooks(rl.LossConfig(grpo=rl.GrpoConfig(beta=0.0))) == []


def test_several_updates_of_online_dpo_are_refused() -> None:
    with pytest.raises(ValidationError, match="no ratio that would hold several updates back"):
        rl.LossConfig(kind="online_dpo", updates=2)
