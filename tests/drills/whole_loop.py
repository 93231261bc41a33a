"""A whole weekly cycle, every stage in a process of its own, as small as the stages take it: a tiny random Llama is the
policy and the start of every model, annotators answer what was exported, and the A/B test is read.

Everything that the cycle owns lies below `live`: store, tracking, exports, deliveries. `as_it_was` brings back the
moment at which a stage began, so that a drill need not run the stages before it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from flywheel_tasks.core.store import Store
from flywheel_tasks.pipeline import STAGES as PIPELINE
from flywheel_tasks.simulation import annotators, world
from flywheel_tasks.simulation.characters import character_table, demo_characters
from flywheel_tasks.simulation.chat import Mix
from flywheel_tasks.simulation.language import scripted_policy
from flywheel_tasks.simulation.traffic import write_event_log
from tests.drills import small_cycle
from tests.tiny_llama import build_tiny_llama

STAGES = tuple(stage.name for stage in PIPELINE)
ROLES = ("base", "policy", "reward", "signal")
ANSWERED = {"annotate-export": "annotate-import", "side-by-side": "side-by-side-import"}
"""Which stages wait for people, and where the answers go."""

ENGINE = {"dtype": "float32", "cache_gib": 0.1, "context": 512, "start_seconds": 1800, "stall_seconds": 900}
SERVING = {"engine": ENGINE}
SAMPLING = {"max_tokens": 8}
LEARN: dict[str, Any] = {
    "train": {"steps": 4, "batch": 4}, "placement": {"save_every": 1, "deadline_s": 1800}, "lora": {"rank": 4},
    "max_tokens": 384,
}  # fmt: skip
JUDGE = LEARN | {"train": {"steps": 4, "batch": 4, "publish_every": 2}}
SMALL: dict[str, dict[str, Any]] = {
    "ingest": {"eval_share": 0.4},
    "constrain": {"size": 60, "character_cap": 0.2},
    "pairs": {
        "count": 24, "rewrite_share": 0, "keep_unfinished": True, "sampling": SAMPLING, "engine": ENGINE,
        "bounds": {"words": 30, "words_share": 0.9},
    },
    "preference-pointwise": JUDGE,
    "preference-pairwise": JUDGE,
    "signal-rm": JUDGE | {"most_responses": 32},
    "rejection-sample": {
        "most_prompts": 16, "sampling": SAMPLING | {"k": 2}, "keep_unfinished": True, "chunk": 4, "engine": ENGINE,
    },
    "sft": LEARN | {"ratios": {"user_rjs": 1}, "serving": SERVING},
    "dpo": LEARN | {
        "modes": ["static", "interactive", "steerability", "image"], "rows": 16, "serving": SERVING,
        "watch": {"prompts": 4, "max_tokens": 8},
    },
    "rl": {
        "train": {"steps": 3}, "placement": LEARN["placement"], "lora": LEARN["lora"], "engine": ENGINE,
        "guardrail": {"prompts": 4},
    },
    "respond": {"most_prompts": 6, "sampling": SAMPLING, "engine": ENGINE},
}  # fmt: skip
"""On the profile `test`: a state to resume from after every step of training, chunks of generation of four prompts,
and long deadlines, since a busy machine is no hung engine."""
PATIENCE = 1800.0
"""Seconds after which an attempt counts as hanging."""
CROWDED = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Pinned threads that wait for each other crawl when other processes use the same cores."""


def prepare(folder: Path) -> None:
    """The week's logs, the characters' cards and the tiny model."""
    write_event_log(
        folder / "logs", users=30, days=7, seed=4, start=small_cycle.MONDAY, mix=Mix(internal=0.35, most_turns=6),
        policies={"v1": scripted_policy(0.5)},
    )  # fmt: skip
    cards = "\n".join(json.dumps(row) for row in character_table(demo_characters()).to_pylist())
    (folder / "characters.jsonl").write_text(cards)
    build_tiny_llama(folder / "tiny")
    (folder / "live").mkdir()


def settings(folder: Path) -> tuple[str, ...]:
    """What `--set` is told beside `small_cycle.settings`."""
    own: dict[str, Any] = {f"models.{role}.path": str(folder / "tiny") for role in ROLES}
    own["ingest.characters"] = [str(folder / "characters.jsonl")]
    for sent, back in ANSWERED.items():
        own[f"{sent}.folder"] = str(folder / "live" / sent)
        own[f"{back}.deliveries"] = [str(folder / "live" / back / "*.jsonl")]
    own |= {f"{stage}.{name}": value for stage, fields in SMALL.items() for name, value in fields.items()}
    return tuple(f"{key}={json.dumps(value)}" for key, value in own.items())


def start(folder: Path, stage: str) -> subprocess.Popen[str]:
    """`flywheel run STAGE` below a scheduler of its own, in a session that can be killed whole."""
    logs = str(folder / "logs" / "*")
    return small_cycle.start(folder / "live", logs, (stage,), settings(folder), **CROWDED)


def made(folder: Path, stage: str) -> float:
    """Run the stage to a good end; the seconds that it took."""
    began = time.monotonic()
    small_cycle.finished(start(folder, stage), within=PATIENCE)
    return time.monotonic() - began


def contents(folder: Path, stage: str) -> tuple[str, dict[str, str]]:
    """The key of a stage's artifact and the digest of every file."""
    found: tuple[str, dict[str, str]] = small_cycle.contents(Store(str(folder / "live" / "store")), (stage,))[stage]
    return found


def undisturbed(folder: Path) -> tuple[dict[str, float], dict[str, tuple[str, dict[str, str]]]]:
    """Run the cycle once and keep the moment at which each stage began; every stage's seconds and contents."""
    took, wanted = {}, {}
    for stage in STAGES:
        copy(folder / "live", folder / "states" / stage)
        took[stage], wanted[stage] = made(folder, stage), contents(folder, stage)
        if stage in ANSWERED:
            _people_answer(folder / "live" / stage, folder / "live" / ANSWERED[stage])
        print(f"{stage}: {took[stage]:.1f} s", flush=True)
    _name_no_attempt(Store(str(folder / "live" / "store")))
    return took, wanted


def _name_no_attempt(store: Store) -> None:
    """What a stage writes must not depend on which attempt made what it read."""
    attempts = [artifact.manifest.attempt for artifact in store.artifacts()]
    for path, text in small_cycle.texts(store):
        if path.startswith("artifacts/") and not path.endswith("/manifest.json"):
            named = [attempt for attempt in attempts if attempt in text]
            if named:
                raise AssertionError(f"{path} names the attempt {named[0]}: made again, it would be another file")


def _people_answer(exports: Path, deliveries: Path) -> None:
    """By chance: to the babble of random weights a careful person would answer "neither" each time."""
    world.answer(exports, deliveries, annotators.team(5, 3, noise=1.0), seed=3, day=small_cycle.MONDAY)


def as_it_was(folder: Path, stage: str) -> None:
    """`live` at the moment at which the stage began in the undisturbed cycle."""
    shutil.rmtree(folder / "live")
    copy(folder / "states" / stage, folder / "live")


def copy(source: Path, target: Path) -> None:
    """Artifacts never change, so a link will do; pointers, ledger, tracking and deliveries do: they are copied."""

    def take(one: str, other: str) -> object:
        return (os.link if "/store/artifacts/" in one else shutil.copy2)(one, other)

    shutil.copytree(source, target, copy_function=take)
