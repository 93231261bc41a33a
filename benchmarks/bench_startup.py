"""What a command costs before it works: the start-up budget of a stage, and where the time of its imports goes.

Budget: a stage that needs no model does its first useful work within 3 s of its command, a cached one exits within 2 s.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Contender, Report, compare

_FLYWHEEL = [sys.executable, "-m", "flywheel_tasks.cli"]


def first_work(log: str) -> float:
    """Seconds from the start of the command to the first event read: the stage's first progress on its input."""
    import time

    folder = tempfile.mkdtemp(prefix="flywheel-bench-")
    code = (
        "import sys, time\n"
        "from flywheel_tasks.curation import events, spill\n"
        "real = events.parse_lines\n"
        "def first(block):\n"
        "    print('FIRST', time.time(), file=sys.stderr, flush=True)\n"
        "    return real(block)\n"
        "events.parse_lines = first\n"
        "from flywheel_tasks.cli import main\n"
        "main()\n"
    )
    arguments = ["run", "ingest", "--cycle", "2026-W47", "--profile", "test", "--set", f"ingest.logs={log}"]
    try:
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"FLYWHEEL_HOME": folder},
            capture_output=True,
            text=True,
            check=True,
        )
        found = re.search(r"FIRST (\S+)", done.stderr)
        if not found:
            raise SystemExit(f"the stage read nothing: {done.stderr[-500:]}")
        return float(found[1]) - started
    finally:
        shutil.rmtree(folder)


def import_profile(most: int = 12) -> list[str]:
    """The modules that take longest to import, by their own time."""
    code = "import flywheel_tasks.cli"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    rows = [re.match(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)", line) for line in done.stderr.splitlines()]
    timed = sorted(((int(row[1]), row[3]) for row in rows if row), reverse=True)
    total = sum(own for own, _ in timed)
    return [f"imports in all: {total / 1000:.0f} ms"] + [f"{own / 1000:7.1f} ms  {name}" for own, name in timed[:most]]


def main(quick: bool) -> Report:
    from flywheel_tasks.simulation.bulk import write_benchmark_log

    os.environ["FLYWHEEL_USER_KEY"] = "benchmark-key-0123456789abcdef"
    with tempfile.TemporaryDirectory(prefix="flywheel-bench-") as folder:
        log = str(Path(folder) / "log.jsonl")
        write_benchmark_log(log, 10_000, seed=5)
        home = {"FLYWHEEL_HOME": folder}
        run = [*_FLYWHEEL, "run", "ingest", "--cycle", "2026-W47", "--profile", "test", "--set", f"ingest.logs={log}"]
        subprocess.run(run, env=os.environ | home, check=True, capture_output=True)
        firsts = sorted(first_work(log) for _ in range(1 if quick else 5))
        contenders = [
            Contender("python -c pass", [sys.executable, "-c", "pass"]),
            Contender("flywheel stages", [*_FLYWHEEL, "stages", "--json"], env=home),
            Contender("flywheel run ingest, cached", run, env=home),
        ]
        notes = [
            f"first event read {firsts[len(firsts) // 2]:.2f} s after the command (budget 3 s; cached: 2 s)",
            *import_profile(),
        ]
        return compare("startup", "start-up", contenders, repeats=1 if quick else 5, unit="runs", notes=notes)
