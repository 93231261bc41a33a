"""Preparing task files, starting the harness, and reading what it found; the programs it got go to the sandbox."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.evaluation import benchmark_worker
from flywheel_tasks.evaluation.benchmark_data import CATALOGUE, Splits, merge, subject, task_files
from flywheel_tasks.evaluation.benchmarks import BenchmarkConfig
from flywheel_tasks.evaluation.sandbox import passes

HARNESS = "lm_eval"
_TAIL = 8


class Prepared(NamedTuple):
    """What the harness is to run: task files by task, generated-code tasks by name, and the tasks of each benchmark."""

    tasks: dict[str, str]
    code: dict[str, dict[str, str]]
    of: dict[str, list[str]]


def version() -> str:
    try:
        return importlib.metadata.version(HARNESS)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def prepare(files: Mapping[str, Mapping[str, bytes]], config: BenchmarkConfig, folder: Path) -> Prepared:
    """Rows and task files of every benchmark that has files."""
    found = importlib.util.find_spec(HARNESS)
    if found is None or not found.submodule_search_locations:
        raise InputError("benchmarks need lm-evaluation-harness: install lm-eval, or configure no benchmark files")
    harness = Path(found.submodule_search_locations[0]) / "tasks"
    prepared = Prepared({}, {}, {})
    for name, parts in files.items():
        benchmark = CATALOGUE[name]
        if benchmark.runs_code:
            if config.run_code:
                prepared.code[name] = _rows_of_code(name, parts, folder)
            continue
        tasks: dict[str, list[Splits]] = {}
        for file, data in sorted(parts.items()):
            task = f"mmlu_{subject(file)}" if name == "mmlu" else name
            tasks.setdefault(task, []).append(benchmark.read(file, data))
        written = task_files(name, {task: merge(splits) for task, splits in tasks.items()}, folder, harness)
        prepared.tasks.update({task: str(path) for task, path in written.items()})
        prepared.of[name] = list(written)
    return prepared


def measure(
    model: Path, tensor_parallel: int, prepared: Prepared, config: BenchmarkConfig, seed: int, folder: Path
) -> dict[str, dict[str, Any]]:
    """Rate and rows of every benchmark for one model."""
    if not prepared.tasks and not prepared.code:
        return {}
    folder.mkdir()
    spec = {
        "model": str(model), "engine": config.engine, "dtype": config.dtype, "context": config.context,
        "batch": config.batch if config.engine == "vllm" or config.batch != "auto" else 8, "limit": config.limit,
        "seed": seed, "tensor_parallel": tensor_parallel, "device": device(), "tasks": prepared.tasks,
        "code": prepared.code,
    }  # fmt: skip
    answer = harness(spec, folder, config.hours * 3600)
    found = {}
    for name, tasks in prepared.of.items():
        found[name] = pooled(
            [(answer["results"][t][CATALOGUE[name].metric], answer["n"][t]["effective"]) for t in tasks]
        )
    for name, samples in answer["code"].items():
        found[name] = judged(name, samples)
    return found


def pooled(parts: list[tuple[float, int]]) -> dict[str, Any]:
    """One rate over several tasks, each row counting the same."""
    n = sum(rows for _, rows in parts)
    rate = sum(share * rows for share, rows in parts) / n if n else math.nan
    if not n or not 0 <= rate <= 1:
        raise FlywheelError(f"the harness gave {rate} over {n} rows: that is no accuracy")
    return {"rate": rate, "n": n}


def judged(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """pass@1: the share of programs that pass their tests in the sandbox."""
    verdicts = [passes(program(name, sample["doc"], str(sample["said"]))) for sample in samples]
    return {
        "rate": verdicts.count("passed") / len(verdicts),
        "n": len(verdicts),
        "timed_out": verdicts.count("timed out"),
    }


def program(name: str, doc: Mapping[str, Any], said: str) -> str:
    """A generated solution followed by the tests it has to pass."""
    if name == "humaneval":
        return f"{doc['prompt']}{said}\n{doc['test']}\ncheck({doc['entry_point']})"
    return "\n".join([doc.get("test_setup_code") or "", said, *doc["test_list"]])


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def harness(spec: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """Run the worker process; its last lines are the reason where it fails."""
    asked, answered, log = folder / "spec.json", folder / "answer.json", folder / "log.txt"
    asked.write_text(json.dumps(spec), encoding="utf-8")
    environment = {**os.environ, "HF_HOME": str(folder / "hf")}
    if spec["device"] == "cpu":
        cores = session.cores()
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", benchmark_worker.__name__, str(asked), str(answered)],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise FlywheelError(
                f"the harness did not end in {seconds / 3600:g} hours: raise benchmarks.hours"
            ) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code or not answered.exists():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_TAIL:]
        raise FlywheelError(f"the harness failed (exit code {code}): {' | '.join(last)[-800:]}")
    answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return answer


def _rows_of_code(name: str, parts: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """Split → file with its rows."""
    splits = merge([CATALOGUE[name].read(file, data) for file, data in sorted(parts.items())])
    files = {split: folder / f"{name}-{split}.jsonl" for split in splits}
    for split, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in splits[split]), encoding="utf-8")
    return {split: str(path) for split, path in files.items()}
