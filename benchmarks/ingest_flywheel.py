"""Ingest as a user runs it: store, commit and tracking included. Start-up has its own benchmark, so it comes first."""

from __future__ import annotations

import os
import shutil
import tempfile

from mlflow.tracking import MlflowClient

from flywheel_tasks import pipeline
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.store import Store

_TRACKING = f"sqlite:///{tempfile.mkdtemp(prefix='flywheel-bench-')}/mlflow.db"
MlflowClient(tracking_uri=_TRACKING).search_experiments()


def job(log: str, cores: int) -> dict[str, int]:
    os.environ["FLYWHEEL_USER_KEY"] = "benchmark-key-0123456789abcdef"
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    folder = tempfile.mkdtemp(prefix="flywheel-bench-")
    try:
        config = pipeline.load_config(
            "test",
            overrides=[f"ingest.logs={log}", f"store.uri={folder}/store", f"tracking.uri={_TRACKING}"],
        )
        artifact = run_stage(pipeline.by_name("ingest"), "2026-W47", config, Store(config.store.uri)).artifact
        activity = artifact.table("activity").read(["sends"])
        return {"conversations": artifact.table("conversations").rows, "sends": sum(activity["sends"].to_pylist())}
    finally:
        shutil.rmtree(folder)
