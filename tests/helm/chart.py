"""Our chart as Helm renders it, and what a leak looks like: for the tests of the chart and of Airflow's values."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
HELM = os.environ.get("FLYWHEEL_HELM") or shutil.which(
    "helm", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin"
)
VALUES = ("small", "gpu-cluster", "air-gapped")
KUBERNETES = "1.33"

SENSITIVE = re.compile(r"(KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS?)(_ID)?$", re.IGNORECASE)
LEAK = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|[a-z]+://[^/\s:@$]+:[^/\s@$]+@|(?i:password|secret|token)\s*[:=]\s*[\"']?[A-Za-z0-9+/]{12,}"
)


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True)


@cache
def rendered(values: str, *more: str) -> tuple[dict[str, Any], ...]:
    done = helm("template", "fw", str(CHART), "-n", "flywheel", "-f", str(CHART / f"values-{values}.yaml"), *more)
    if done.returncode:
        raise AssertionError(done.stderr)
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def of_kind(values: str, kind: str) -> list[dict[str, Any]]:
    return [document for document in rendered(values) if document["kind"] == kind]


def pods(values: str) -> list[dict[str, Any]]:
    """Every pod that the chart makes, directly or through an operator."""
    found = [document["spec"]["template"] for document in of_kind(values, "Deployment")]
    for cluster in of_kind(values, "RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        found += [group["template"] for group in groups]
    return found
