"""Table 3's benchmarks from local files: each file's own layout into the columns that lm-evaluation-harness reads.

The prompts, few-shot examples and metrics are the harness's own; only where the rows come from is ours.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flywheel_tasks.core.errors import InputError

Rows = list[dict[str, Any]]
Splits = dict[str, Rows]
_ARC = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n(Answer1: .*)\n\nAnswer format: .*", re.DOTALL
)


@dataclass(frozen=True)
class Benchmark:
    """`config` is a task file of lm-evaluation-harness, `metric` what of its results counts, `shots` None its own."""

    config: str
    metric: str
    read: Callable[[str, bytes], Splits]
    splits: Mapping[str, str | None] = field(default_factory=lambda: {"test_split": "test", **_NO_OTHER})
    shots: int | None = None
    runs_code: bool = False


_NO_OTHER: dict[str, None] = {"training_split": None, "validation_split": None, "fewshot_split": None}


def lines(name: str, data: bytes) -> Rows:
    """Rows of JSON Lines or of one JSON list, gzipped or not."""
    try:
        if name.endswith(".gz"):
            data = gzip.decompress(data)
        text = data.decode()
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.splitlines() if x.strip()]
        )
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{name}: not JSON Lines: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name}: no rows: a benchmark needs one object a line")
    return rows


def table(name: str, data: bytes) -> Rows:
    """Rows of a CSV with a header."""
    try:
        rows: Rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    except (ValueError, csv.Error) as error:
        raise InputError(f"{name}: not a CSV: {error}") from error
    if not rows:
        raise InputError(f"{name}: no rows")
    return rows


def _test(name: str, data: bytes) -> Splits:
    return {"test": lines(name, data)}


def _validation(name: str, data: bytes) -> Splits:
    return {"validation": lines(name, data)}


def _train_or_test(name: str, data: bytes) -> Splits:
    return {"train" if "train" in name.rsplit("/", 1)[-1] else "test": lines(name, data)}


def arc(name: str, data: bytes) -> Splits:
    """ARC in its own columns, or as a prose instruction whose options are taken apart again."""
    return {"test": [_arc_row(row, f"{name}: row {i}") for i, row in enumerate(lines(name, data))]}


def _arc_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    if "choices" in row:
        return row
    found = _ARC.fullmatch(str(row.get("instruction", "")))
    options = re.split(r"\s*Answer\d+: ", f" {found[2]}")[1:] if found else []
    answer = str(row.get("answer", "")).removeprefix("answer")
    if not found or not answer.isdigit() or not 1 <= int(answer) <= len(options):
        raise InputError(f"{where}: neither ARC's columns nor an instruction with Answer1 … AnswerN and an answer")
    labels = [chr(ord("A") + i) for i in range(len(options))]
    return {
        "question": found[1].strip(),
        "choices": {"text": [o.strip() for o in options], "label": labels},
        "answerKey": labels[int(answer) - 1],
    }


def mmlu(name: str, data: bytes) -> Splits:
    """A subject's file, <subject>_dev.csv or <subject>_test.csv: question, choice0 … choice3, answer."""
    split = "dev" if name.endswith("_dev.csv") else "test"
    rows = []
    for i, row in enumerate(table(name, data)):
        choices = [row.get(f"choice{k}") for k in range(4)]
        if None in choices or row.get("answer") not in ("0", "1", "2", "3"):
            raise InputError(f"{name}: row {i} lacks question, choice0 … choice3 or an answer from 0 to 3")
        rows.append({"question": row["question"], "choices": choices, "answer": int(row["answer"])})
    return {split: rows}


def subject(name: str) -> str:
    """anatomy, of …/anatomy_test.csv."""
    found = re.fullmatch(r"([a-z_0-9]+)_(?:dev|test)\.csv", name.rsplit("/", 1)[-1])
    if not found:
        raise InputError(f"{name}: MMLU's files are called SUBJECT_dev.csv and SUBJECT_test.csv")
    return found[1]


def ifeval(name: str, data: bytes) -> Splits:
    """Instruction ids without the language that some copies put before them."""
    rows = lines(name, data)
    for row in rows:
        row["instruction_id_list"] = [re.sub(r"^[a-z]{2}:", "", i) for i in row["instruction_id_list"]]
    return {"train": rows}


def mbpp(name: str, data: bytes) -> Splits:
    """MBPP's own division: tasks 11 to 510 are the test, 2 to 4 the examples of the prompt."""
    rows = {int(row["task_id"]): row for row in lines(name, data)}
    return {
        "test": [row for number, row in sorted(rows.items()) if 11 <= number <= 510],
        "prompt": [rows[number] for number in (2, 3, 4) if number in rows],
    }


CATALOGUE: dict[str, Benchmark] = {
    "mmlu": Benchmark(
        "mmlu/default/mmlu_{subject}.yaml", "acc,none", mmlu,
        {"test_split": "test", "fewshot_split": "dev", "training_split": None, "validation_split": None}, 5,
    ),
    "ifeval": Benchmark("ifeval/ifeval.yaml", "prompt_level_strict_acc,none", ifeval, {"test_split": "train"}),
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", "acc_norm,none", arc),
    "arc_easy": Benchmark("arc/arc_easy.yaml", "acc_norm,none", arc),
    "gpqa": Benchmark(
        "gpqa/zeroshot/gpqa_main_zeroshot.yaml", "acc_norm,none", lambda name, data: {"train": table(name, data)},
        {"validation_split": "train", "training_split": None},
    ),
    "hellaswag": Benchmark(
        "hellaswag/hellaswag.yaml", "acc_norm,none", _validation,
        {"validation_split": "validation", "training_split": None, "test_split": None},
    ),
    "gsm8k": Benchmark(
        "gsm8k/gsm8k.yaml", "exact_match,strict-match", _train_or_test,
        {"test_split": "test", "training_split": "train", "fewshot_split": "train"},
    ),
    "math": Benchmark("hendrycks_math/hendrycks_math_algebra.yaml", "exact_match,none", _test),
    "humaneval": Benchmark("", "pass@1", _test, runs_code=True),
    "mbpp": Benchmark("", "pass@1", mbpp, runs_code=True),
}  # fmt: skip
"""Table 3, and ARC Easy of Table 10. GPQA's and IFEval's files are the reader's to bring."""


def merge(parts: Sequence[Splits]) -> Splits:
    """The rows of several files of one benchmark, by split."""
    found: Splits = {}
    for part in parts:
        for split, rows in part.items():
            found.setdefault(split, []).extend(rows)
    return found


def task_files(name: str, splits: Mapping[str, Splits], folder: Any, harness: Any) -> dict[str, Any]:
    """Write the rows and a task file that includes the harness's own; returns task name → path of the task file.

    `splits` maps the tasks of a benchmark (MMLU has one a subject) to their rows.
    """
    import yaml

    benchmark, tasks = CATALOGUE[name], {}
    for task, rows in splits.items():
        wanted = {split for split in benchmark.splits.values() if split}
        missing = wanted - set(rows)
        if missing:
            raise InputError(
                f"benchmarks.{name}: {task} has no file for '{sorted(missing)[0]}': it needs {sorted(wanted)}"
            )
        files = {}
        for split in sorted(wanted):
            files[split] = str(folder / f"{task}-{split}.jsonl")
            with open(files[split], "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=True) + "\n" for row in rows[split])
        body: dict[str, Any] = {
            "include": str(harness / benchmark.config.format(subject=task.removeprefix("mmlu_"))),
            "task": task, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files},
        } | dict(benchmark.splits)  # fmt: skip
        if benchmark.shots is not None:
            body["num_fewshot"] = benchmark.shots
        tasks[task] = folder / f"{task}.yaml"
        tasks[task].write_text(yaml.safe_dump(body), encoding="utf-8")
    return tasks
