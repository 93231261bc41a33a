"""Two schedulers that meet at every commit: each waits there until the other one has made the same artifact too."""

import os
import time
from pathlib import Path

from flywheel_tasks.core import storage

_PATIENCE = 300.0


def _meet(step):
    if not (step.startswith("commit artifacts/") and step.endswith("/manifest.json")):
        return
    stage = step.split("/")[1]
    folder = Path(os.environ["DRILL_MEETING"]) / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + _PATIENCE
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > until:
            raise TimeoutError(f"nobody else came to the commit of {stage}")
        time.sleep(0.02)


storage.fault_point = _meet
