"""Parity with TRL to 1e-5: its own loss code runs on the same batch, values and gradients are compared."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flywheel_tasks.training import losses

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
trl = pytest.importorskip("trl")
ROWS, TOKENS, BETA = 6, 12, 0.3


class _Accelerator:
    """What TRL's loss functions ask of accelerate in one process."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True
    parallelism_config = None

    def gather(self, tensor: Any) -> Any:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Any, reduction: str) -> Any:
        return tensor


def _self(**more: Any) -> SimpleNamespace:
    base = {
        "model": SimpleNamespace(training=True),
        "accelerator": _Accelerator(),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "args": SimpleNamespace(),
    }
    return SimpleNamespace(**(base | more))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Ragged responses after prompts of two tokens: per-token log-probabilities, zero where there is no response."""
    torch.manual_seed(3)
    lengths = torch.randint(1, TOKENS - 2, (ROWS,))
    mask = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 2 : 2 + length] = 1
    scored = mask[:, 1:]
    return {
        "mask": mask,
        "scored": scored,
        "row": torch.arange(ROWS)[:, None].expand_as(scored)[scored.bool()],
        "lengths": lengths,
        "logps": -torch.rand(ROWS, TOKENS - 1) * 3 * scored,
        "reference": -torch.rand(ROWS, TOKENS - 1) * 3 * scored,
    }


def _gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def test_eq_1_is_trls_reward_loss() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2 * ROWS, 1, requires_grad=True)
    trainer = _self(args=SimpleNamespace(center_rewards_coefficient=None))
    inputs = {"attention_mask": torch.ones(2 * ROWS, 4)}
    theirs = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
    chosen, rejected = scores.squeeze(-1).chunk(2)
    ours = losses.pointwise(chosen, rejected).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(*_gradients(ours, scores), *_gradients(theirs, scores), atol=1e-5)


def test_sft_is_trls(batch: dict[str, torch.Tensor]) -> None:
    leaf = batch["logps"].requires_grad_()
    logps = leaf * batch["scored"]  # zero, and a constant, where TRL's fused head ignores a position
    trainer = _self(
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
        _token_metrics=True,
    )
    outputs = SimpleNamespace(
        log_probs=logps,
        label_mask=batch["scored"].bool(),
        entropy=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps).bool(),
    )
    inputs = {"labels": batch["mask"], "attention_mask": torch.ones(ROWS, TOKENS)}
    theirs = trl.SFTTrainer.compute_loss(trainer, lambda **_: outputs, inputs)
    ours = losses.sft(logps[batch["scored"].bool()]).sum() / batch["scored"].sum()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(*_gradients(ours, leaf), *_gradients(theirs, leaf), atol=1e-5)


@pytest.mark.parametrize("normalised", [False, True])
def test_dpo_is_trls(batch: dict[str, torch.Tensor], normalised: bool) -> None:
    leaf = batch["logps"].requires_grad_()
    logps = leaf * batch["scored"]
    trainer = _self(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid_norm" if normalised else "sigmoid"],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=0.0,
        use_weighting=False,
    )
    outputs = SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps).bool(),
    )
    ref_chosen, ref_rejected = batch["reference"].sum(1).chunk(2)
    inputs = {
        "input_ids": torch.ones(ROWS, TOKENS, dtype=torch.long),
        "attention_mask": torch.ones(ROWS, TOKENS),
        "completion_mask": batch["mask"],
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    flat = logps[batch["scored"].bool()]
    chosen, rejected = losses.row_sums(flat, batch["row"], ROWS).chunk(2)
    first, second = batch["lengths"].chunk(2)
    lengths = (first, second) if normalised else None
    ours = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=BETA, lengths=lengths).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(*_gradients(ours, leaf), *_gradients(theirs, leaf), atol=1e-5)


def test_label_smoothed_dpo_is_trls_conservative_form(batch: dict[str, torch.Tensor]) -> None:
    """TRL smooths labels in CPO: the same loss with a reference of zero."""
    from trl.experimental.cpo import CPOTrainer

    trainer = _self(alpha=0.0, beta=BETA, loss_type="sigmoid", label_smoothing=0.15)
    chosen, rejected = batch["logps"].sum(1).chunk(2)
    theirs, _, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    zero = torch.zeros_like(chosen)
    assert torch.allclose(losses.dpo(chosen, rejected, zero, zero, beta=BETA, smoothing=0.15), theirs, atol=1e-5)


def _grpo_self(logps: torch.Tensor, *, loss_type: str, level: str, beta: float, corrected: bool) -> SimpleNamespace:
    return _self(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("mean", ["grpo", "bnpo"])
@pytest.mark.parametrize(
    ("policy", "level"),
    [("on", "token"), ("on", "sequence"), ("off", "token"), ("off", "sequence"), ("off, corrected", "token")],
)
def test_eq_8_is_trls_grpo(batch: dict[str, torch.Tensor], policy: str, mean: str, level: str, beta: float) -> None:
    """`bnpo` is the mean over tokens, `grpo` the mean over responses of their means: ours with other
    counts. TRL corrects sequences by a product, we by a geometric mean, so that case has no peer."""
    torch.manual_seed(4)
    mask = batch["scored"]
    logps = batch["logps"].requires_grad_()
    old = logps.detach() if policy == "on" else logps.detach() + 0.3 * torch.randn_like(logps) * mask
    gen = old + 0.5 * torch.randn_like(logps) * mask if policy == "off, corrected" else old
    advantage = torch.randn(ROWS)
    inputs = {
        "prompt_ids": torch.ones(ROWS, 2, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 2, dtype=torch.long),
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": batch["reference"],
        "importance_sampling_ratio": torch.exp(old - gen).clamp(max=1.5),
    }
    trainer = _grpo_self(logps, loss_type=mean, level=level, beta=beta, corrected=policy == "off, corrected")
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    flat = [t[mask.bool()] for t in (logps, old, gen, batch["reference"])]
    values = losses.grpo(
        *flat,
        advantage[batch["row"]],
        batch["row"],
        clip=0.2,
        clip_high=0.28,
        cap=1.5,
        beta=beta,
        level=level,  # type: ignore[arg-type]
    )
    ours = values.mean() if mean == "bnpo" else losses.row_means(values, batch["row"], ROWS).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(*_gradients(ours, logps), *_gradients(theirs, logps), atol=1e-5)


def test_online_dpo_is_trls() -> None:
    """TRL's training step itself, two responses a prompt, on given log-probabilities and rewards."""
    from trl.experimental.online_dpo import OnlineDPOTrainer

    torch.manual_seed(5)
    prompts = 4
    logps = (-torch.rand(2 * prompts, 5)).requires_grad_()
    reference = -torch.rand(2 * prompts, 5)
    rewards = torch.randn(2 * prompts)
    seen: list[torch.Tensor] = []
    mask = (torch.arange(5) < torch.randint(1, 6, (2 * prompts, 1))).long()
    ids = torch.ones(2 * prompts, 5, dtype=torch.long)
    forwards = iter([logps, reference])
    trainer = _self(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type="sigmoid",
            n_gpu=1,
            optim="adamw_torch",
            gradient_accumulation_steps=1,
            torch_empty_cache_steps=None,
        ),
        state=SimpleNamespace(global_step=1),
        _generate=lambda *_: (ids, ids, ids, mask, None),
        _forward=lambda *_: next(forwards),
        eos_token_ids=[2],
        ref_model=object(),
        processing_class=SimpleNamespace(batch_decode=lambda *_, **__: [""] * 2 * prompts),
        _calculate_rewards_from_functions=lambda **_: rewards,
        reward_funcs=None,
        beta=BETA,
        stats=defaultdict(list),
        model=SimpleNamespace(training=True),
        use_apex=False,
    )
    trainer.accelerator.backward = lambda loss, **_: seen.append(loss)  # type: ignore[attr-defined]
    model = SimpleNamespace(train=lambda: None)
    OnlineDPOTrainer.training_step(trainer, model, {"prompt": ["p"] * prompts})
    theirs = seen[0]
    sums = [(t * mask).sum(1).view(2, prompts).T for t in (logps, reference)]
    values, _ = losses.online_dpo(sums[0], sums[1], rewards.view(2, prompts).T, beta=BETA)
    ours = values.mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert torch.allclose(*_gradients(ours, logps), *_gradients(theirs, logps), atol=1e-5)
