"""kill -9 of random processes during a cycle: `python -m tests.drills.kill_cycle --seeds 50` prints the count.

A seed starts the cycle, kills a process of its tree, chosen at random, at a random moment, a few times; whatever stands
or falls then, the cycle is started again and must end with the keys and file digests of an undisturbed run.
`--whole` adds the curation that embeds on Ray, `--models` also pairs from the engine on a tiny model: minutes a seed
instead of seconds. `--loop` is another drill (kill_loop.py): all stages of a week, a kill in the one that was running.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flywheel_tasks.core.store import Store
from flywheel_tasks.simulation import faults
from flywheel_tasks.simulation.traffic import write_event_log
from tests.drills import kill_loop, small_cycle
from tests.drills.killing import Count, disturb

QUICK = ("ingest", "filter", "expose", "readout")
MODELS = ("pairs", "annotate-export")
KILLS = 2


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
        cycle = small_cycle.start(home, logs(folder), stages, more)
        disturb(cycle, draw.uniform(0.02, 1.0) * took, draw, count, took * 3 + 60)
    small_cycle.finished(small_cycle.start(home, logs(folder), stages, more))
    found = small_cycle.contents(Store(str(home / "store")), stages)
    if found != wanted:
        different = [stage for stage in stages if found[stage] != wanted[stage]]
        raise AssertionError(f"seed {seed}: {', '.join(different)} differ from the undisturbed run")
    count.resumed += 1
    shutil.rmtree(home)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--loop", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-cycle-") as name:
        folder = Path(name)
        if options.loop:
            sys.exit(kill_loop.main(folder, options.seeds))
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
