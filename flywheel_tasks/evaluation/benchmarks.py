"""benchmarks: community benchmarks of candidate and champion (Sec. 2.5.1, Table 3) through lm-evaluation-harness.

All data comes from configured files; nothing is fetched. Code benchmarks run what a model wrote, in a sandbox, and are
off unless `run_code` is set.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from flywheel_tasks.core.config import ModelConfig, Operational, StageConfig, model_of
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage

NAMES = (
    "mmlu", "ifeval", "arc_challenge", "arc_easy", "gpqa", "hellaswag", "gsm8k", "math", "humaneval", "mbpp",
)  # fmt: skip
_FILES = "globs of its files (empty: not run)"


class BenchmarkConfig(StageConfig):
    champion: ModelConfig = model_of("policy", "the policy in production, that the candidate is compared with")
    mmlu: tuple[str, ...] = Field((), description=f"{_FILES}: SUBJECT_dev.csv and SUBJECT_test.csv")
    ifeval: tuple[str, ...] = Field((), description=_FILES)
    arc_challenge: tuple[str, ...] = Field((), description=_FILES)
    arc_easy: tuple[str, ...] = Field((), description=_FILES)
    gpqa: tuple[str, ...] = Field((), description=f"{_FILES}: gpqa_main.csv")
    hellaswag: tuple[str, ...] = Field((), description=_FILES)
    gsm8k: tuple[str, ...] = Field((), description=f"{_FILES}: train.jsonl (examples) and test.jsonl")
    math: tuple[str, ...] = Field((), description=_FILES)
    humaneval: tuple[str, ...] = Field((), description=_FILES)
    mbpp: tuple[str, ...] = Field((), description=_FILES)
    run_code: bool = Field(False, description="run generated programs (humaneval, mbpp) in the sandbox")
    limit: int | None = Field(None, ge=1, description="rows of each task (empty: all)")
    engine: Literal["vllm", "transformers"] = Field("vllm", description="what the harness computes with")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="precision of the weights")
    context: int = Field(2048, ge=256, description="longest prompt and answer, in tokens")
    batch: int | Literal["auto"] = Field("auto", description="rows at once", json_schema_extra=Operational)
    hours: float = Field(12, gt=0, description="give up after this long for one model", json_schema_extra=Operational)


def run(inputs: Inputs, config: BenchmarkConfig, out: Output) -> None:
    """Accuracy of the candidate and of the champion on each configured benchmark, with the number of rows.

    A harness that fails fails the stage. Code benchmarks that have files while `run_code` is off are `skipped`: a gap.
    """
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from flywheel_tasks.core.storage import open_external
    from flywheel_tasks.evaluation import benchmark_runs as runs
    from flywheel_tasks.models.resolve import artifact_folder, local_folder

    files: dict[str, dict[str, bytes]] = {}
    for name in NAMES:
        for record in inputs.sources.get(name, ()):
            with open_external(record.uri) as stream:
                files.setdefault(name, {})[record.uri] = stream.read()
    report: dict[str, dict[str, Any]] = {}
    if files:
        models = {
            "candidate": (artifact_folder(*inputs.artifact("candidate")), config.champion.tensor_parallel),
            "champion": (local_folder(config.champion.path), config.champion.tensor_parallel),
        }
        with TemporaryDirectory(prefix="flywheel-benchmarks-") as folder:
            prepared = runs.prepare(files, config, Path(folder))
            for side, (model, parallel) in models.items():
                found = runs.measure(model, parallel, prepared, config, out.seed, Path(folder) / side)
                for name, result in found.items():
                    report.setdefault(name, {})[side] = result
                out.progress(list(models).index(side) + 1, len(models), "models")
    skipped = sorted(set(files) - set(report))
    out.json(
        "benchmarks",
        {"benchmarks": report, "skipped": skipped, "harness": runs.version(), "limit": config.limit},
    )
    for name, result in report.items():
        for side in ("candidate", "champion"):
            if side in result:
                out.metric(f"{side}.{name}", result[side]["rate"])


STAGE = Stage(
    name="benchmarks",
    phase="evaluation",
    paper="Sec. 2.5.1, 3.2.1, Table 3",
    inputs={"candidate": Input("rl", "model")},
    outputs={"benchmarks": "json"},
    config=BenchmarkConfig,
    run=run,
    sources=NAMES,
    models=("champion",),
    resources=Resources(cpus=2, gpus=1, memory_gib=16),
)
