"""The simulated weeks around a cycle: the traffic that it learns from, and the A/B week that decides on its candidate
(Sec. 2.5.2).

In the A/B week every user is served by their arm's real policy: `release.assign` gives the arm, as a serving platform
would ask it. Their events are a log like any other: `ingest` reads it, then the DAG `ab_readout` writes first exposures
with `expose` and closes the window with `readout`. Nobody tells a stage what is true; the truth is printed beside what
the readout found.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flywheel_tasks.core import ids
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.runner import find_stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.demo_airflow import Airflow, Say
from flywheel_tasks.pipeline import load_config, weekly
from flywheel_tasks.release import ledger
from flywheel_tasks.release.assign import assign
from flywheel_tasks.release.champion import ARM, EXPERIMENT
from flywheel_tasks.release.expose import named
from flywheel_tasks.release.reign import for_stage
from flywheel_tasks.services import state_dir, user_key

PROFILE = "demo"
WEEKLY, DAILY = "character_flywheel", "ab_readout"
USERS, AB_USERS, DAYS, SEED = 70, 100, 7, 17
INTERNAL = 0.35
"""Share of the traffic that is staff's: enough that the gate can compare user and internal prompts."""
A_DAY = 0.5
"""Conversations a day of everybody in the A/B week."""
MOST_TURNS = 12
"""What a user writes in one conversation at most: a few long ones would cost as much as all the others."""
GATE = (
    "gate.win_rate={hold: 0.8, block: 0.9}", "gate.divergence={hold: 0.3, block: 0.4}",
    "gate.disagreement={hold: 0.3, block: 0.4}", "gate.style_drift={hold: 1.5, block: 2}",
    "metrics.style.sizes={words: 1.5, longest_block: 1.5}",
)  # fmt: skip
"""Some ninety prompts are held out: two win-rates lie ten points apart by chance alone. And these people want answers a
third as long as the first champion's: what they like moves far in style. The profile keeps the paper's lines, so
`flywheel gate` judges by them."""
FEW_USERS = ("readout.alpha=0.1", "readout.guard_pct=10")
"""A hundred people decide a test of the profile's strictness once in a blue moon."""
EXPORTS, DELIVERIES = "exports", "deliveries"


def store() -> Store:
    return Store(load_config(PROFILE).store.uri)


def reigning(cycle: str) -> ModelConfig:
    """The policy that this cycle works with."""
    return for_stage(load_config(PROFILE), "pairs", store(), cycle).models.policy


def in_production() -> ModelConfig:
    """The champion of today: what everybody outside the test arm is served."""
    home = store()
    model = ledger.read(home.storage).champion
    return ModelConfig(path=model.path(home.uri)) if model else load_config(PROFILE).models.policy


def traffic(cycle: str, say: Say) -> Path:
    """The week before the cycle, chatted with the champion and written once; returns the folder of logs and cards."""
    from flywheel_tasks.simulation import world
    from flywheel_tasks.simulation.chat import Mix

    folder = state_dir() / "demo" / cycle
    if not folder.exists():
        policy = reigning(cycle)
        start = ids.cycle_start(cycle) - datetime.timedelta(days=DAYS)
        say(f"{USERS} simulated users chat with {policy.path} for {DAYS} days from {start} ...")
        with whole(folder) as unfinished:
            truth = world.chat_with(
                {version(policy): policy}, unfinished, world.people(USERS, SEED), days=DAYS, seed=seed(cycle),
                start=start, mix=Mix(internal=INTERNAL, most_turns=MOST_TURNS),
            )  # fmt: skip
        say(f"{truth.lines:,} log lines of {len(truth.conversations):,} conversations in {folder}")
    return folder


def reviews(world_folder: Path, cycle: str, people: int, noise: float, say: Say) -> None:
    """Annotators answer what went out; an export that has its delivery is not answered again."""
    from flywheel_tasks.simulation import world

    day = ids.cycle_start(cycle)
    team = world.team(people, SEED, noise)
    given = world.answer(world_folder / EXPORTS, world_folder / DELIVERIES, team, seed=SEED, day=day)
    say(f"\n{people} simulated annotators sent {given:,} reviews.")


def found(cycle: str, overrides: list[str]) -> list[Artifact] | None:
    """What a weekly run with these settings would find, where it would find all of it."""
    home, config = store(), load_config(PROFILE, overrides=overrides)
    there: dict[str, Artifact] = {}
    for stage in weekly():
        upstream = [wanted.stage for wanted in stage.inputs.values() if not wanted.previous]
        given = {name: there[name].uri for name in upstream if name in there}
        artifact = find_stage(stage, cycle, for_stage(config, stage.name, home, cycle), home, given)
        if artifact is None:
            return None
        there[stage.name] = artifact
    return list(there.values())


def ab_week(airflow: Airflow, cycle: str, say: Say) -> Artifact | None:
    """The closed readout of the cycle's candidate; None where the gate let none through."""
    home = store()
    nomination = ledger.read(home.storage).nomination(cycle)
    model = nomination.model if nomination else None
    if nomination is None or model is None:
        say("\nNo candidate was nominated: no user meets it, there is no A/B week, and the champion stays.")
        return None
    found = home.pointed(cycle, "readout")
    if found and found.json("readout")["status"] == "closed" and _tested(found) == model.sha256:
        say("\nThe A/B week of this cycle was read before.")
        return found
    start = max(ids.cycle_start(cycle), nomination.at.date())
    folder = _both_arms(cycle, ModelConfig(path=model.path(home.uri)), start, say)
    logs = [str(state_dir() / "demo" / cycle / "logs" / "*"), str(folder / "logs" / "*")]
    cards = [str(folder / "characters.jsonl")]
    _ingest(cycle, [f"ingest.logs={json.dumps(logs)}", f"ingest.characters={json.dumps(cards)}"], say)
    days = [*FEW_USERS, f"expose.start={start}", f"readout.as_of={start + datetime.timedelta(days=DAYS)}"]
    done = airflow.run(DAILY, {"cycle": cycle, "profile": PROFILE, "overrides": days})
    return home.pointed(cycle, "readout") if done.state == "success" else None


def crowned(cycle: str) -> bool:
    """Whether the ledger says that this cycle's candidate became champion."""
    return any(entry.action == "crown" and entry.cycle == cycle for entry in ledger.read(store().storage).entries)


def truth(folder: Path) -> dict[str, dict[str, float]]:
    """Version → the true chance that its replies are answered, as the simulation knows it."""
    file = folder / "truth.json"
    return dict(json.loads(file.read_text())["answered"]) if file.exists() else {}


def ab_folder(cycle: str) -> Path:
    return state_dir() / "demo" / f"{cycle}-ab"


def version(policy: ModelConfig) -> str:
    """How the log names a policy."""
    return policy.path.rpartition(":")[2] if ":" in policy.path.partition("://")[0] else policy.path.split("/")[-2][:12]


def seed(cycle: str) -> int:
    """People are the same every week; what they say is not."""
    return SEED + ids.cycle_start(cycle).toordinal() // 7


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _both_arms(cycle: str, candidate: ModelConfig, start: datetime.date, say: Say) -> Path:
    """The week of the test, chatted with the champion by one arm and with the candidate by the other."""
    from flywheel_tasks.simulation import world
    from flywheel_tasks.simulation.chat import Mix

    folder = ab_folder(cycle)
    if folder.exists():
        return folder
    (experiment,) = named(load_config(PROFILE).stages["expose"].experiments, cycle)  # type: ignore[attr-defined]
    people = world.steady(world.people(AB_USERS, SEED), A_DAY)
    key = user_key().encode()
    place = assign([ids.pseudonym(person.user_id, key) for person in people], experiment)
    arms, champion = list(experiment.arms), in_production()
    served = {version(champion): champion, version(candidate): candidate}
    of_arm = [version(candidate) if arm == ARM else version(champion) for arm in arms]
    version_of = {
        person.user_id: of_arm[arm] if arm >= 0 else version(champion)
        for person, arm in zip(people, place.tolist(), strict=True)
    }
    counts = ", ".join(f"{list(version_of.values()).count(name)} with {name}" for name in served)
    say(f"\nA/B week: {AB_USERS} simulated users chat for {DAYS} days from {start}, {counts} ...")
    with whole(folder) as unfinished:
        mix = Mix(internal=0.0, most_turns=MOST_TURNS, regular=True)
        world.chat_with(
            served, unfinished, people, days=DAYS, seed=seed(cycle), start=start, mix=mix, version_of=version_of
        )
    return folder


def _ingest(cycle: str, settings: list[str], say: Say) -> None:
    """What the next weekly run would do with this log; the readout is not kept waiting for it."""
    argv = [sys.executable, "-m", "flywheel_tasks.cli", "run", "ingest", "--cycle", cycle, "--profile", PROFILE]
    argv += [f"--set={setting}" for setting in settings]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=3600)
    say("".join(f"  {line}\n" for line in done.stderr.splitlines()).rstrip())
    if done.returncode:
        raise FlywheelError(f"the log of the A/B week was not ingested (exit {done.returncode}): see the lines above")


def _tested(readout: Artifact) -> str:
    return str((readout.json("readout").get("candidate") or {}).get("sha256", ""))


def lifts(readout: Artifact) -> list[str]:
    """Breadth and depth of the candidate over the champion, with Fieller's sets, and what follows."""
    found = readout.json("readout")
    mine = found["comparisons"].get(ARM, {})
    lines = [f"A/B test  {EXPERIMENT}{readout.manifest.cycle}: {found['status']}, {found['estimand']}"]
    lines += [f"          {name:<8} {lift(mine[name])}" for name in ("breadth", "depth") if name in mine]
    lines += [f"          {problem}" for problem in found["problems"]]
    lines += [f"          {d['arm']}: {d['verdict']} ({'; '.join(d['reasons'])})" for d in found["decisions"]]
    return lines


def lift(comparison: dict[str, Any]) -> str:
    """+3.1 % [-2.0, 8.4]; a set without two ends is named."""
    if comparison["lift_pct"] is None:
        return str(comparison["kind"])
    bounds = comparison["lift_pct_bounds"]
    ends = [f"{end:+.1f}" if end is not None else "unbounded" for end in bounds] if bounds else [comparison["kind"]]
    return f"{comparison['lift_pct']:+.1f} % [{', '.join(ends)}]"
