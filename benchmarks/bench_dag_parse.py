"""What reading dags/ costs beyond importing Airflow, beside a DAG of the same shape made of bash tasks."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Contender, Report, compare

DAGS = Path(__file__).resolve().parents[1] / "dags"


def airflow_alone() -> dict[str, Any]:
    """Airflow's authoring API and what any DAG file needs of it."""
    _import_airflow()
    return {"beyond_airflow_s": 0.0}


def flywheel() -> dict[str, Any]:
    """Both DAGs with every stage, its docs and its form."""
    _import_airflow()
    sys.path.append(str(DAGS))
    began, before = time.perf_counter(), set(sys.modules)
    import ab_readout
    import character_flywheel

    seconds = time.perf_counter() - began
    tasks = len(character_flywheel.dag.tasks) + len(ab_readout.dag.tasks)
    return {"beyond_airflow_s": seconds, "tasks": tasks, "modules": len(set(sys.modules) - before)}


def bash_tasks(edges: dict[str, list[str]]) -> dict[str, Any]:
    """The same tasks and edges as plain bash commands: the least that such a DAG can cost."""
    _import_airflow()
    began, before = time.perf_counter(), set(sys.modules)
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG

    with DAG("peer", schedule="0 6 * * 1"):
        tasks = {name: BashOperator(task_id=name, bash_command=f"flywheel run {name}") for name in edges}
        for name, upstream in edges.items():
            for other in upstream:
                tasks[other] >> tasks[name]
    seconds = time.perf_counter() - began
    return {"beyond_airflow_s": seconds, "tasks": len(tasks), "modules": len(set(sys.modules) - before)}


def main(quick: bool = False) -> Report:
    from flywheel_tasks.pipeline import STAGES

    names = {stage.name for stage in STAGES}
    edges = {s.name: sorted({i.stage for i in s.inputs.values() if not i.previous} & names) for s in STAGES}
    env = {"AIRFLOW_HOME": tempfile.mkdtemp(prefix="airflow-"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    here = "benchmarks.bench_dag_parse"
    report = compare(
        "dag_parse",
        f"Parse both DAGs, {len(STAGES)} stages",
        [
            Contender("airflow.sdk alone", f"{here}:airflow_alone", env=env),
            Contender("dags/", f"{here}:flywheel", env=env),
            Contender("bash tasks of the same shape", f"{here}:bash_tasks", {"edges": edges}, env=env),
        ],
        repeats=1 if quick else 5,
    )
    for row in report.rows:
        report.notes.append(f"{row.name}: {row.result['beyond_airflow_s']:.3f} s beyond Airflow's import (last run)")
    return report


def _import_airflow() -> None:
    import airflow.sdk
    import airflow.sdk.exceptions

    # The names are loaded on first use.
    _ = (airflow.sdk.DAG, airflow.sdk.BaseOperator, airflow.sdk.Param, airflow.sdk.TaskGroup)
    os.environ.pop("FLYWHEEL_LAUNCHER", None)
