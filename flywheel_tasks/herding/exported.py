"""Every exported checkpoint is served once before its stage commits: by vLLM, as the next stages will serve it.

A checkpoint that does not give its trainer's logprobs is an error, so nothing that can't be served right leaves a
herding stage (Sec. 2.4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from flywheel_tasks.core.config import ModelConfig, StageConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.models.engine_config import EngineConfig
from flywheel_tasks.style.monitor import StyleConfig

if TYPE_CHECKING:
    from pathlib import Path

    from flywheel_tasks.models.engine import Engine


class RoundingConfig(StageConfig):
    """How far an engine may be from the trainer of what it serves. Right checkpoints of SmolLM2 differed by 0.07 in the
    mean and 0.4 at most in bfloat16, on sentences that the model finds unlikely; a head that missed one large update
    by 3.8."""

    most: float = Field(1.0, gt=0, description="largest difference of one token's logprob that is still rounding")
    mean: float = Field(0.12, gt=0, description="largest mean difference that is still rounding")


class ServingConfig(RoundingConfig):
    """How a stage's own checkpoints are served to be looked at."""

    engine: EngineConfig = EngineConfig()
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs per engine replica")


class WatchConfig(StageConfig):
    """On what a moved policy is compared with its start."""

    prompts: int = Field(128, ge=1, description="prompts of the patch that each checkpoint answers, the first that fit")
    max_tokens: int = Field(128, ge=1, le=4096, description="longest answer")
    style: StyleConfig = StyleConfig()


def prove(
    out: Output,
    last: int,
    config: ServingConfig,
    then: Callable[[int, Engine], None] | None = None,
) -> dict[str, Mapping[str, float]]:
    """Serve the model of step `last` and every earlier step that the stage hands out, hold each against its trainer,
    and let `then` use the engine while it is there. Returns the drift by step."""
    return {str(step): prove_one(out, step, folder, config, then) for step, folder in _exports(out, last)}


def prove_one(
    out: Output,
    step: int,
    folder: Path,
    config: ServingConfig,
    then: Callable[[int, Engine], None] | None = None,
) -> Mapping[str, float]:
    """`prove` for the checkpoint in one folder: one start of an engine."""
    from flywheel_tasks.models import witness
    from flywheel_tasks.models.probe import ProbeConfig

    with serve(folder, config) as engine:
        try:
            found = witness.check(engine, folder, ProbeConfig(most=config.most, mean=config.mean)).metrics()
        except FlywheelError as error:
            raise FlywheelError(f"checkpoint of step {step}: {error}") from error
        if then is not None:
            then(step, engine)
    for name, value in found.items():
        out.metric(name, value, step=step)
    return found


def serve(folder: Path, config: ServingConfig) -> Any:
    """An engine on a model folder."""
    from flywheel_tasks.models.engine import open_engine

    return open_engine(ModelConfig(path=str(folder), tensor_parallel=config.tensor_parallel), config.engine)


def _exports(out: Output, last: int) -> list[tuple[int, Path]]:
    from flywheel_tasks.training.learn import MODEL, STEPS

    earlier = sorted(out.folder(STEPS).glob("step-*"))
    return [*((int(path.name.removeprefix("step-")), path) for path in earlier), (last, out.folder(MODEL))]
