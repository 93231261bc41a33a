"""A Ray that does not start is started again; one that never does is told in a line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A raylet gives its agents 15 s to start: those of the first `late` raylets take longer. What runs at Python's start is
# found by sys.orig_argv, since argv is not there yet.
LATE = """
import os, sys, time, pathlib
if any("runtime_env/agent/main.py" in word for word in sys.orig_argv):
    late = pathlib.Path({folder!r}) / "late"
    left = int(late.read_text())
    late.write_text(str(left - 1))
    if left > 0:
        time.sleep(25)
"""
START = """
from flywheel_tasks.compute import session
from flywheel_tasks.core.errors import FlywheelError
session._START_SECONDS = 20
try:
    print(session.ensure().cluster_resources()["CPU"] >= 1)
except FlywheelError as error:
    print(error)
"""


HANG = """
import subprocess, sys, time, types
from flywheel_tasks.compute import session

def init(**told):
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)

sys.modules["ray"] = types.SimpleNamespace(init=init, is_initialized=lambda: False)
session._HANG_SECONDS = 0.5
session._stay_on_loopback = lambda: None
session.ensure()
"""


def test_a_ray_that_hangs_ends_the_stage_and_what_it_started() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, env=env, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: Ray did not start on this machine in 0.5 s")
    with contextlib.suppress(psutil.NoSuchProcess):
        # Killed, but a busy machine may take a moment over it; left alone it would sleep for a minute.
        child, deadline = psutil.Process(int(done.stdout)), time.monotonic() + 10
        while child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize(("late", "said"), [(1, "True"), (9, "Ray did not start on this machine in 3 tries of 20 s")])
def test_a_ray_that_starts_too_late_is_started_again(tmp_path: Path, late: int, said: str) -> None:
    (tmp_path / "late").write_text(str(late))
    (tmp_path / "sitecustomize.py").write_text(LATE.format(folder=str(tmp_path)))
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=env, timeout=300)
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert int((tmp_path / "late").read_text()) == late - (2 if late == 1 else 3)
