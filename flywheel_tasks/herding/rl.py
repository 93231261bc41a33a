"""Stage `rl`: the climb itself, online RL from the policy's own responses (Sec. 2.4.3, 3.5.2-3.5.6)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.herding.rl_config import RlConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flywheel_tasks.herding.guardrail import GuardrailConfig
    from flywheel_tasks.herding.prompt_selection import Selected
    from flywheel_tasks.herding.rl_start import Start
    from flywheel_tasks.training.run import Trained
    from flywheel_tasks.training.state import Published


def run(inputs: Inputs, config: RlConfig, out: Output) -> None:
    """Learn from the policy's own responses to this cycle's prompts: several for each, rewarded by the pointwise
    preference model less penalties, by GRPO (eq. 8) or online DPO. Prompts whose responses differ most come first.
    While it climbs, both preference models compare it with the policy it started as on held-out prompts; the
    checkpoint nearest the ideal win-rate is the output, and a policy past the hard limit ends the run. The output is
    served once and held against its trainer."""
    from flywheel_tasks.herding import rl_start
    from flywheel_tasks.herding.rl_remote import reachable, rollouts

    setup = rl_start.setup(inputs, config, out.seed)
    with rollouts(setup, gpus=config.rollout_gpus, deadline_s=config.placement.deadline_s) as far:
        reachable(far, config.placement)
        start = rl_start.prepare(far, inputs, config, out)
        trained = _train(far, setup.policy.path, start, config, out)
    _finish(trained, start, config, out)


def _train(far: Any, base: str, start: Start, config: RlConfig, out: Output) -> Trained:
    from pathlib import Path

    from flywheel_tasks.herding import rl_hooks
    from flywheel_tasks.models.probe import ProbeConfig
    from flywheel_tasks.training import rl
    from flywheel_tasks.training.run import train

    training = config.training(start.selected.prompts.num_rows)
    steps, updates = training.steps or 1, config.loss.updates
    drift = ProbeConfig(tokens=config.drift.tokens, most=config.drift.most, mean=config.drift.mean)

    def log(step: int, values: Any) -> None:
        for name, value in values.items():
            out.metric(f"train/{name}", value, step=step)
        out.progress(step, steps, "steps")

    watch = partial(
        rl_hooks.Watch, far, start.held_out, start.responses, config.guardrail, steps=steps,
        temperature=config.sampling.temperature, seed=out.seed,
    )  # fmt: skip
    return train(
        rl.task(Path(base), config.loss, temperature=config.sampling.temperature, lora=config.lora, seed=out.seed),
        None,
        training,
        config.placement,
        seed=out.seed,
        folder=f"{out.partial.uri}/train/run",
        on_metrics=log,
        source=partial(rl_hooks.Batches, far, steps, updates, config.ahead),
        hooks=[
            *rl.hooks(config.loss),
            partial(rl_hooks.Sync, far, far.ask("probe_prompts", config.drift.prompts), drift, updates),
            watch,
            partial(rl_hooks.Halt, config.guardrail),
        ],
    )


def _finish(trained: Trained, start: Start, config: RlConfig, out: Output) -> None:
    from flywheel_tasks.herding import exported
    from flywheel_tasks.training.learn import MODEL
    from flywheel_tasks.training.run import untimed

    chosen, kept = hand_out(trained, config.guardrail, out)
    served = exported.prove_one(out, chosen, out.folder(MODEL), config.serving)
    out.metric("rl/step", chosen)
    curve = dict(enumerate(trained.history, 1)) | {model.step: model.metrics for model in _models(trained)}
    for name, value in _guards(curve[chosen]).items():
        out.metric(f"rl/{name}", value)
    account(start.selected, out)
    out.json(
        "report",
        {
            "loss": config.loss.kind,
            "steps": trained.steps,
            "stopped": trained.stopped,
            "chosen": chosen,
            "kept": kept,
            "served": {str(chosen): served},
            "scale": start.scale._asdict(),
            "selection": start.selected.report,
            "held_out": {"prompts": start.held_out.num_rows, "share": start.held_out.num_rows / start.held_out_of},
            "guards": {str(step): found for step, values in sorted(curve.items()) if (found := _guards(values))},
            "first": untimed(curve.get(1, {})),
            "last": untimed(trained.metrics),
        },
    )


def account(selected: Selected, out: Output) -> None:
    """Every training prompt that came in is one to learn from, or in quarantine with its reason."""
    out.reject(selected.rejected)
    out.account("prompt", rows_in=selected.report["prompts"]["in"], rows_out=selected.prompts.num_rows)


def hand_out(trained: Trained, config: GuardrailConfig, out: Output) -> tuple[int, list[int]]:
    """The checkpoint nearest the ideal becomes the model, the others that the judges can be trusted with its steps.
    Returns both. Each is judged by the measurement that was published with it, whichever attempt took it."""
    from flywheel_tasks.herding import guardrail
    from flywheel_tasks.training.learn import keep

    models = _models(trained)
    measured = [level for model in models if (level := guardrail.of_metrics(model.step, model.metrics))]
    published = [model.step for model in models]
    chosen = guardrail.nearest(measured, published, config)
    kept = list(guardrail.trusted(measured, published, config))
    keep(trained, out, chosen, kept)
    return chosen, kept


def _models(trained: Trained) -> list[Published]:
    """Those of the run. A killed attempt may have published beyond the last state that it saved: these are no part of
    it."""
    return [model for model in trained.published if model.step <= trained.steps]


def _guards(values: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("guard/"): value for name, value in values.items() if name.startswith("guard/")}


STAGE = Stage(
    name="rl",
    phase="herding",
    paper="Sec. 2.4.3, eq. 8, Sec. 3.5.2-3.5.6",
    inputs={
        "policy": Input("dpo", "model"),
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters"),
        "reward": Input("preference-pointwise", "model"),
        "pairwise": Input("preference-pairwise", "model"),
    },
    outputs={"model": "checkpoint", "steps": "checkpoints", "report": "json"},
    config=RlConfig,
    run=run,
    models=("reward.model",),
    data=("models/card.j2", "style", "curation/weights"),
    resources=Resources(cpus=2, gpus=8, memory_gib=24),
)
