"""What a stage's configuration needs of GPUs, told before anybody waits for a node that could not run it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flywheel_tasks.core.config import ModelConfig, StageConfig
from flywheel_tasks.core.stage import Resources


def gpus(config: StageConfig, nodes: int = 1) -> int:
    """GPUs in use at once. An engine on a single one also runs on cores, so alone it needs none."""
    placement, engine = getattr(config, "placement", None), getattr(config, "engine", None)
    learners = placement.workers * placement.gpus if placement else 0
    engine = engine or getattr(getattr(config, "scoring", None), "engine", None)
    width = max([getattr(config, "tensor_parallel", 1), *(model.tensor_parallel for model in _models(config))])
    replicas = getattr(engine, "replicas", 1)
    rollouts = math.ceil(getattr(config, "rollout_gpus", 0))
    if rollouts:  # one engine on one node lives in their process; others have GPUs of their own
        engines = 0 if nodes == 1 and replicas == 1 else width * replicas
    else:
        engines = _engines(width, replicas) if engine else 0
    serving = getattr(config, "serving", None)
    served = _engines(serving.tensor_parallel, serving.engine.replicas) if serving else 0
    embedding = math.ceil(getattr(config, "embed_actors", 0) * getattr(config, "embed_gpus", 0))
    return max(learners + engines + rollouts, served, embedding)


def misfit(stage: str, config: StageConfig, granted: Resources) -> str | None:
    """Why the stage can't run on what it is granted, or holds it for nothing; None where it fits."""
    needed, given = gpus(config, granted.nodes), granted.gpus * granted.nodes
    placement = getattr(config, "placement", None)
    if needed > given:
        nodes = f"{granted.gpus} on each of {granted.nodes} nodes" if granted.nodes > 1 else str(given)
        return f"{stage} is set for {needed} GPUs and granted {nodes}: raise resources.{stage} or lower its settings"
    if given > 1 and placement and not placement.gpus:
        return (
            f"{stage} would hold {given} GPUs and train on cores: set {stage}.placement.gpus and .workers, or "
            f"resources.{stage}.gpus (gpus: false where there are none)"
        )
    return None


def _engines(width: int, replicas: int) -> int:
    return width * replicas if width * replicas > 1 else 0


def _models(config: StageConfig) -> Iterator[ModelConfig]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        yield from (one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, ModelConfig))
