"""`make demo`: users chat with the champion for a week, one whole cycle runs through the Airflow DAG, and an A/B week
decides on its candidate. `CYCLES=3` turns the wheel three times: each week's traffic is the then champion's.

A cycle runs as it does with people in it: the pairs go out, annotators answer, and the same cycle runs again and goes
on from what came back; what exists is found, not made again. All people are simulated: users, annotators, and the
reviewer of a HOLD, who answers over the API behind Airflow's form. A demo that stopped at a HOLD would end there most
of the time, because few prompts leave wide intervals; the ledger and this output say who answered and why. A BLOCK is
final: no user meets the candidate. With one cycle the champion stays as it is and the command that would crown the
candidate is printed; with several the demo calls it where the readout says ship.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flywheel_tasks import demo_week as week
from flywheel_tasks.core import ids, terminal
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.store import Artifact
from flywheel_tasks.demo_airflow import Airflow, Run, Say, Task
from flywheel_tasks.pipeline import weekly
from flywheel_tasks.services import banner, running, state_dir, user_key

ANNOTATORS, NOISE = 6, 0.1
LAST_BEFORE_PEOPLE = "annotate-export"
REPORT = "report"


@dataclass(frozen=True)
class Turn:
    """One turn of the wheel: the cycle's run, and the readout where there was an A/B week."""

    cycle: str
    run: Run
    readout: Artifact | None


def run_demo(cycle: str, say: Say, cycles: int = 1) -> int:
    """Returns the exit code: 0 when every stage succeeded, whatever gate and readout decided."""
    began = time.monotonic()
    os.umask(0o077)
    os.environ[ids.USER_KEY_VARIABLE] = user_key()
    first = ids.cycle_id(cycle) if cycle else ids.cycle_of(datetime.datetime.now(datetime.UTC).date())
    monday = ids.cycle_start(first)
    names = [ids.cycle_of(monday + datetime.timedelta(weeks=number)) for number in range(cycles)]
    week.traffic(first, say)
    turns: list[Turn] = []
    with running(say, whole=False) as (endpoints, check):
        say(banner(endpoints))
        airflow = Airflow(endpoints, check, say)
        paused = []
        try:
            for dag in (week.WEEKLY, week.DAILY):
                airflow.wait_for_dag(dag)
                paused += [dag] if airflow.pause(dag, False) else []
            for name in names:
                turns.append(turn(airflow, name, say))
                if turns[-1].run.state != "success":
                    break
                if cycles > 1 and turns[-1].readout:
                    say(crown(name))
        finally:
            for dag in paused:
                airflow.pause(dag, True)
    for done in turns:
        show(done.run)
        say(f"\nCycle {done.cycle}: {done.run.state}")
        for line in [*decision(done), *(week.lifts(done.readout) if done.readout else []), *truth(done)]:
            say(f"  {line}")
    if cycles > 1:
        climb(turns)
    elif turns[-1].readout and not week.crowned(first):
        say(f"  Champion  unchanged; to act on the readout: flywheel crown --cycle {first} --profile {week.PROFILE}")
    say(f"\n{len(turns)} of {cycles} cycle{'s' * (cycles > 1)} in {time.monotonic() - began:.0f} s.")
    say(f"  Report    {report(names[-1])}")
    say(f"  Store     {week.store().uri}")
    say(f"  Airflow   {endpoints.airflow}/dags/{week.WEEKLY}")
    say(f"  MLflow    {endpoints.mlflow}/#/experiments?workflowType=machine_learning")
    say(f"  'make up' opens both again (user {endpoints.user}, password in {endpoints.password_file}).")
    return 0 if all(done.run.state == "success" for done in turns) else 1


def turn(airflow: Airflow, cycle: str, say: Say) -> Turn:
    """One turn of the wheel: the cycle up to the people, their answers, the rest, and the A/B week."""
    from flywheel_tasks.simulation import world

    folder = week.traffic(cycle, say)
    names = [stage.name for stage in weekly()]
    # A few dozen examples could not teach the base what earlier cycles taught: SFT goes on from the champion.
    settings = [*overrides(folder), f"models.base.path={week.reigning(cycle).path}"]
    conf = {"cycle": cycle, "profile": week.PROFILE, "overrides": settings, "reviews_at_least": 0}
    sent, back = folder / week.EXPORTS, folder / week.DELIVERIES
    started = None
    if not sent.exists() or world.unanswered(sent, back):
        after_people = names[names.index(LAST_BEFORE_PEOPLE) + 1 :]
        begun = airflow.run(week.WEEKLY, conf | {"skip": after_people})
        if begun.state != "success":
            return Turn(cycle, begun, None)
        started = begun.started
        week.reviews(folder, cycle, ANNOTATORS, NOISE, say)
    conf["skip"] = []
    run = found(airflow, conf, say) or airflow.run(week.WEEKLY, conf, lambda: world.review(gate(cycle)["rules"]))
    run = Run(started or run.started, run.tasks, run.state)
    return Turn(cycle, run, week.ab_week(airflow, cycle, say) if run.state == "success" else None)


def found(airflow: Airflow, conf: dict[str, Any], say: Say) -> Run | None:
    """The run that would change nothing: one like it has succeeded, and all that it would make is in the store."""
    began = datetime.datetime.now(datetime.UTC)
    there = week.found(conf["cycle"], conf["overrides"]) if airflow.succeeded(week.WEEKLY, conf) else None
    if there is None:
        return None
    say(f"\nCycle {conf['cycle']}: such a run has succeeded, and the store has all of its {len(there)} artifacts.")
    return Run(began, [Task(one.manifest.stage, "success", 0.0, 1, one.manifest) for one in there], "success")


def overrides(world: Path) -> list[str]:
    """Where this week's logs, cards, exports and deliveries are, and a gate for few prompts."""
    return [
        *week.GATE,
        f"ingest.logs={json.dumps([str(world / 'logs' / '*')])}",
        f"ingest.characters={json.dumps([str(world / 'characters.jsonl')])}",
        f"annotate-export.folder={json.dumps(str(world / week.EXPORTS))}",
        f"annotate-import.deliveries={json.dumps([str(world / week.DELIVERIES / '*.jsonl')])}",
    ]


def gate(cycle: str) -> dict[str, Any]:
    """The cycle's decision, with every rule."""
    found = week.store().pointed(cycle, "gate")
    if found is None:
        raise FlywheelError(f"{cycle} has no gate: did its run reach it?")
    return dict(found.json("decision"))


def crown(cycle: str) -> str:
    """What `flywheel crown` says: the candidate becomes champion where the readout says ship, and only then."""
    argv = [sys.executable, "-m", "flywheel_tasks.cli", "crown", "--cycle", cycle, "--profile", week.PROFILE]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    return f"\nflywheel crown --cycle {cycle}: {(done.stdout or done.stderr).strip()}"


def decision(done: Turn) -> list[str]:
    """What the gate said and why."""
    if not any(task.stage == "gate" and task.manifest for task in done.run.tasks):
        return []
    found = gate(done.cycle)
    against = [rule["reason"] for rule in found["rules"] if rule["verdict"] == found["decision"] != "PASS"]
    return [f"Gate      {found['decision']}", *(f"          {reason}" for reason in against)]


def truth(done: Turn) -> list[str]:
    """What the simulation knows and no stage sees."""
    known = week.truth(week.ab_folder(done.cycle)) or week.truth(state_dir() / "demo" / done.cycle)
    return [f"Truth     a reply by {version} is answered with chance {shown(one)}" for version, one in known.items()]


def shown(one: dict[str, float]) -> str:
    return f"{one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def report(cycle: str) -> Path:
    """Write the page of the weeks until `cycle`; returns where it is."""
    from flywheel_tasks.evaluation import report as page
    from flywheel_tasks.evaluation.history import from_store

    store = week.store()
    versions = [version for version in from_store(store) if version.name <= cycle]
    return page.write(versions, page.page_of(store, versions, examples=True), state_dir() / REPORT)[0]


def show(run: Run) -> None:
    """The summary table; a key this short is enough for `flywheel show`."""
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "state", box=None, pad_edge=False)
    for column in ("in", "out", "rejected", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("artifact")
    for task in run.tasks:
        made = task.manifest
        rows = made.rows if made else None
        counts = [f"{n:,}" for n in (rows.rows_in, rows.rows_out, rows.rows_rejected)] if rows else ["", "", ""]
        state = "from store" if made and made.finished < run.started else task.state
        table.add_row(task.stage, state, *counts, f"{task.seconds:.1f}", made.key[:12] if made else "")
    Console().print("\n", table, sep="")


def climb(turns: list[Turn]) -> None:
    """The wheel, turn by turn: the then champion's true chance of an answer, and what became of its challenger."""
    head = ("cycle", "champion's truth", "gate", "candidate's truth", "depth (Fieller's set)", "verdict", "crowned")
    rows = []
    for done in turns:
        mine = list(week.truth(state_dir() / "demo" / done.cycle).values())
        both = list(week.truth(week.ab_folder(done.cycle)).values())
        read = done.readout.json("readout") if done.readout else {}
        depth = read.get("comparisons", {}).get("test", {}).get("depth")
        verdicts = [d["verdict"] for d in read.get("decisions", [])]
        decided = gate(done.cycle)["decision"] if done.run.state == "success" else "-"
        rows.append((
            done.cycle, shown(both[0] if both else mine[0]) if both or mine else "-", decided,
            shown(both[1]) if len(both) > 1 else "-", week.lift(depth) if depth else "-", ", ".join(verdicts) or "-",
            "yes" if week.crowned(done.cycle) else "no",
        ))  # fmt: skip
    terminal.show(terminal.Table(head, rows, "The climb"))
