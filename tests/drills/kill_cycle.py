"""kill -9 of random processes during a cycle: `python -m tests.drills.kill_cycle --seeds 50` prints the count.

A seed starts the cycle, kills a process of its tree, chosen at random, at a random moment, a few times; whatever stands
or falls then, the cycle is started again and must end with the keys and file digests of an undisturbed run.
`--whole` adds the curation that embeds on Ray, `--models` also pairs from the engine on a tiny model: minutes a seed
instead of seconds. What training survives is drilled in tests/training and tests/models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flywheel_tasks.core.store import Store
from flywheel_tasks.simulation import faults
from flywheel_tasks.simulation.traffic import write_event_log
from tests.drills import small_cycle

QUICK = ("ingest", "filter", "expose", "readout")
MODELS = ("pairs", "annotate-export")
KILLS = 2


@dataclass
class Count:
    seeds: int = 0
    kills: int = 0
    of_children: int = 0
    cut_short: int = 0
    resumed: int = 0


def reference(folder: Path, stages: tuple[str, ...], more: tuple[str, ...]) -> tuple[dict[str, Any], float]:
    """What an undisturbed run gives, and how long it takes with warm caches."""
    took = 0.0
    for turn in ("warm", "undisturbed"):
        began = time.monotonic()
        small_cycle.finished(small_cycle.start(folder / turn, logs(folder), stages, more))
        took = time.monotonic() - began
    return small_cycle.contents(Store(str(folder / "undisturbed" / "store")), stages), took


def logs(folder: Path) -> str:
    return str(folder / "logs" / "*")


def traffic(folder: Path) -> None:
    write_event_log(folder / "logs", users=20, days=7, seed=4, start=small_cycle.MONDAY, faults=faults.Faults())


def drill(
    seed: int, folder: Path, stages: tuple[str, ...], more: tuple[str, ...], took: float, wanted: dict[str, Any],
    count: Count,
) -> None:  # fmt: skip
    """One seed; an AssertionError where a resumed run differs."""
    draw = random.Random(seed)
    home = folder / f"seed-{seed}"
    for _ in range(KILLS):
        process = small_cycle.start(home, logs(folder), stages, more)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=draw.uniform(0.02, 1.0) * took)
        if process.poll() is None:
            _kill_one(process, draw, count)
        # What its death took down with it is gone within moments; what did not notice goes on as a scheduler's would.
        try:
            process.communicate(timeout=took * 3 + 60)
        except subprocess.TimeoutExpired as error:
            _kill_all(process)
            raise AssertionError(f"seed {seed}: the cycle hangs after a process was killed") from error
        finally:
            _kill_all(process)
        count.cut_short += process.returncode != 0
    small_cycle.finished(small_cycle.start(home, logs(folder), stages, more))
    found = small_cycle.contents(Store(str(home / "store")), stages)
    if found != wanted:
        different = [stage for stage in stages if found[stage] != wanted[stage]]
        raise AssertionError(f"seed {seed}: {', '.join(different)} differ from the undisturbed run")
    count.seeds, count.resumed = count.seeds + 1, count.resumed + 1
    shutil.rmtree(home)


def _kill_one(process: subprocess.Popen[str], draw: random.Random, count: Count) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        victims = [root, *root.children(recursive=True)]
        victim = victims[draw.randrange(len(victims))]
        victim.kill()
        count.kills += 1
        count.of_children += victim.pid != process.pid
        if victim.pid == process.pid:
            _kill_all(process)  # a machine that loses its scheduler loses the rest of the session too


def _kill_all(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--models", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-cycle-") as name:
        folder = Path(name)
        traffic(folder)
        stages, more = small_cycle.STAGES if options.whole else QUICK, tuple[str, ...]()
        if options.models:
            from tests.tiny_llama import build_tiny_llama

            tiny = build_tiny_llama(folder / "tiny")
            more = tuple(f"models.{role}.path={tiny}" for role in ("base", "policy", "reward", "signal"))
            more += (
                "pairs.count=12", "pairs.rewrite_share=0", "pairs.keep_unfinished=true",
                'pairs.sampling={"max_tokens": 8}', f"annotate-export.folder={json.dumps(str(folder / 'exports'))}",
            )  # fmt: skip
            stages = (*small_cycle.STAGES[:4], *MODELS, *small_cycle.STAGES[4:])
        wanted, took = reference(folder, stages, more)
        count = Count()
        for seed in range(options.seeds):
            drill(seed, folder, stages, more, took, wanted, count)
            print(f"seed {seed}: the same keys and digests ({count.kills} kills so far)", flush=True)
    print(
        f"{count.resumed} of {options.seeds} seeds ended with the keys and file digests of an undisturbed run; "
        f"{count.kills} processes were killed, {count.of_children} of them children, {count.cut_short} runs cut short; "
        f"{', '.join(stages)}; {took:.1f} s undisturbed"
    )


if __name__ == "__main__":
    main()
