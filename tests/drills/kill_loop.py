"""kill -9 during a whole weekly cycle, reward models, RL and gate included: `python -m tests.drills.kill_cycle --loop`.

One cycle runs undisturbed and every stage's seconds are remembered. A seed draws a moment uniformly over the sum of
them: the stage that ran then is the victim. The world is put back to what it was when that stage began; the stage is
started, a process of its tree is killed at the moment drawn, it is started again, a process is killed at a moment drawn
from all of its time, and it is started a last time: it must end with the key and the file digests of the undisturbed
run. The stages after it need no run of their own: their keys are made of its key, they read bit for bit what they read
in the undisturbed cycle, and no file of that cycle names the attempt that made it or another (which is checked).

Engines compute in float32: in bfloat16 a prompt that is done again beside other companions in a batch turns another way
once in a hundred (tests/models/test_engine_faults.py).
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.drills import whole_loop
from tests.drills.killing import Count, disturb

Contents = tuple[str, dict[str, str]]


def moment(took: Mapping[str, float], draw: random.Random) -> tuple[str, float]:
    """A stage and a second of it, each second of the cycle as likely as any other."""
    at = draw.uniform(0, sum(took.values()))
    for stage, seconds in took.items():
        if at < seconds:
            return stage, at
        at -= seconds
    return stage, seconds


def drill(
    seed: int, folder: Path, took: dict[str, float], wanted: Mapping[str, Contents], count: Count
) -> tuple[str, float]:
    """One seed: its victim and the moment; an AssertionError where the resumed stage gave something else. A stage that
    was faster than in the undisturbed cycle and over by then has its seconds corrected, and the seed draws again."""
    draw = random.Random(seed)
    while True:
        stage, at = moment(took, draw)
        whole_loop.as_it_was(folder, stage)
        began, process = time.monotonic(), whole_loop.start(folder, stage)
        if disturb(process, at, draw, count, whole_loop.PATIENCE):
            break
        if process.returncode == 0:
            took[stage] = time.monotonic() - began
    disturb(whole_loop.start(folder, stage), draw.uniform(0, took[stage]), draw, count, whole_loop.PATIENCE)
    whole_loop.made(folder, stage)
    key, files = whole_loop.contents(folder, stage)
    if (key, files) != wanted[stage]:
        shutil.copytree(folder / "live", folder / f"differs-{seed}")
        same_key, before = wanted[stage]
        other = sorted(name for name in files.keys() | before if files.get(name) != before.get(name))
        what = f"in {', '.join(other)}" if key == same_key else "in its key"
        raise AssertionError(f"{stage}, killed after {at:.1f} s, differs from the undisturbed run {what}")
    count.resumed += 1
    return stage, at


def main(folder: Path, seeds: int) -> int:
    """Exit code 1 where a seed gave something else; the others are drilled all the same."""
    whole_loop.prepare(folder)
    took, wanted = whole_loop.undisturbed(folder)
    count, victims, undisturbed = Count(), Counter[str](), sum(took.values())
    for seed in range(seeds):
        try:
            stage, at = drill(seed, folder, took, wanted, count)
        except AssertionError as wrong:
            print(f"seed {seed}: {wrong}", flush=True)
            continue
        victims[stage] += 1
        when = f"{at:.1f} of {took[stage]:.1f} s"
        print(f"seed {seed}: {stage}, {when}: the same key and digests ({count.kills} kills so far)", flush=True)
    print(
        f"{count.resumed} of {seeds} seeds ended with the key and file digests of an undisturbed cycle of {len(took)} "
        f"stages; {count.kills} processes were killed, {count.of_children} of them children, {count.cut_short} "
        f"attempts cut short; victims: {', '.join(f'{stage} {n}' for stage, n in victims.most_common())}; "
        f"{undisturbed:.0f} s undisturbed"
    )
    return int(count.resumed < seeds)
