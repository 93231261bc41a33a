"""Promotion: once, by the rule, with a reason, whoever is first (Sec. 2.5.2, 2.6)."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError
from typer.testing import CliRunner

from flywheel_tasks.core.errors import CorruptArtifact, FlywheelError, InputError
from flywheel_tasks.core.store import Store
from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.release import champion, champion_commands, ledger, promote, registry
from tests.release.promotion_world import GATE, RESPOND, World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Without tracking, which costs a second a stage; `tracked` has it."""
    monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
    return World(tmp_path)


@pytest.fixture
def tracked(tmp_path: Path) -> World:
    return World(tmp_path)


def state(world: World) -> ledger.State:
    return ledger.read(world.store.storage)


def model(world: World, cycle: str = "2026-W47") -> ledger.Model:
    responses = world.store.pointed(cycle, "respond")
    assert responses is not None
    found = champion.answered_as(responses, "candidate")
    assert found is not None
    return found


def test_a_pass_nominates_and_the_champion_stays(world: World) -> None:
    made = world.promote("PASS").json("promotion")
    assert made["outcome"] == "promoted"
    assert Path(made["candidate_path"].removeprefix("file://")).parent.name == model(world).key
    now = state(world)
    assert (now.candidate, now.champion) == (model(world), None)
    nominated = now.nomination("2026-W47")
    assert nominated
    assert nominated.model == model(world)
    assert now.nomination("2026-W48") is None


def test_what_promote_says_does_not_depend_on_the_attempts_before_it(world: World) -> None:
    """A gate that was killed and made again is the same gate: so is what follows from it."""
    gate = world.gate("PASS")
    made = world.run(promote.STAGE)
    assert made.json("promotion")["gate"] == f"gate/{gate.manifest.key}"
    assert gate.manifest.attempt not in made.file("promotion").decode()


@pytest.mark.parametrize("word", ["BLOCK", "", "pass", "SHIP IT"])
def test_anything_that_is_no_pass_and_no_hold_blocks(world: World, word: str) -> None:
    assert world.promote(word).json("promotion")["outcome"] == "blocked"
    now = state(world)
    assert [e.action for e in now.entries] == ["refuse"]
    assert (now.candidate, now.champion) == (None, None)


def test_a_pass_on_another_model_promotes_nothing(world: World) -> None:
    with pytest.raises(InputError, match="the gate decided on rl/0000"):
        world.promote("PASS", of="another")
    assert state(world).entries == ()


def test_a_hold_waits_and_the_first_answer_stands(world: World) -> None:
    made = world.promote("HOLD")
    gate = world.store.pointed("2026-W47", "gate")
    assert gate is not None
    assert made.json("promotion")["outcome"] == "held"
    assert state(world).entries == ()
    entry = champion.answer(world.store, gate, model(world), "approve", "ada", "V14 looked like this")
    assert (entry.action, entry.by, entry.why) == ("nominate", "ada", "V14 looked like this")
    assert champion.answer(world.store, gate, model(world), "approve", "bob", "me too") == entry
    with pytest.raises(InputError, match="answered before: nominate by ada"):
        champion.answer(world.store, gate, model(world), "reject", "bob", "no")
    assert len(state(world).entries) == 1


def test_a_hold_that_nobody_answers_is_refused_for_good(world: World) -> None:
    world.promote("HOLD")
    gate = world.store.pointed("2026-W47", "gate")
    assert gate is not None
    assert champion.answer(world.store, gate, model(world), "timeout", "the clock", "").why == "nobody answered in time"
    with pytest.raises(InputError, match="answered before"):
        champion.answer(world.store, gate, model(world), "approve", "ada", "late")
    assert state(world).candidate is None


def test_what_an_approval_may_not_do(world: World) -> None:
    gate = world.gate("PASS")
    with pytest.raises(InputError, match="only a HOLD waits"):
        champion.answer(world.store, gate, model(world), "approve", "ada", "why not")
    held = world.gate("HOLD", "2026-W48")
    with pytest.raises(InputError, match="says why"):
        champion.answer(world.store, held, model(world, "2026-W48"), "approve", "ada", "  ")
    with pytest.raises(InputError, match="not on"):
        champion.answer(world.store, held, None, "approve", "ada", "because")
    old = held.manifest.model_copy(update={"finished": datetime.now(UTC) - timedelta(days=20)})
    held.manifest = old
    with pytest.raises(InputError, match="20 days old"):
        champion.answer(world.store, held, model(world, "2026-W48"), "approve", "ada", "because")
    assert state(world).entries == ()


@pytest.mark.parametrize("field", ["max_age_days", "hold_hours"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e12, 0])
def test_a_time_without_end_is_refused_before_anything_runs(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        promote.PromoteConfig.model_validate({field: value})


def test_only_a_closed_readout_that_says_ship_crowns(world: World) -> None:
    world.promote("PASS")
    for words in (
        {"verdict": "hold"},
        {"verdict": "roll back"},
        {"status": "running"},
        {"status": "refused"},
        {"experiment": "colour-of-the-button"},
    ):
        assert champion.crown(world.store, world.readout(**words)) is None
    assert state(world).champion is None
    crowned = champion.crown(world.store, world.readout())
    assert crowned is not None
    assert state(world).champion == model(world)
    assert state(world).candidate is None


def test_a_candidate_that_the_gate_refused_is_never_crowned(world: World) -> None:
    world.promote("BLOCK")
    with pytest.raises(InputError, match="nothing to crown"):
        champion.crown(world.store, world.readout())
    assert state(world).champion is None


def test_a_refusal_after_the_nomination_takes_it_back(world: World) -> None:
    """The gate of the same cycle, run again on the same model with newer evidence."""
    world.promote("PASS")
    first, readout = model(world), world.readout()
    again = world.run(GATE, decision="BLOCK")
    assert champion.conclude(world.store, again, first)
    now = state(world)
    assert [e.action for e in now.entries] == ["nominate", "refuse"]
    assert (now.candidate, now.nomination("2026-W47")) == (None, None)
    with pytest.raises(InputError, match="nothing to crown"):
        champion.crown(world.store, readout)
    third = world.run(GATE, decision="PASS", says="mended")
    assert champion.conclude(world.store, third, first)
    assert state(world).candidate == first


def test_a_refusal_of_another_model_leaves_the_candidate(world: World) -> None:
    world.promote("PASS", "2026-W47", "a")
    world.promote("BLOCK", "2026-W48", "b")
    assert state(world).candidate == model(world, "2026-W47")
    assert state(world).nomination("2026-W48") is None


@pytest.mark.parametrize("tested", ["another", "unnamed"])
def test_a_readout_crowns_only_the_model_that_it_tested(world: World, tested: str) -> None:
    world.promote("PASS")
    with pytest.raises(InputError, match=r"tested .*, the candidate of 2026-W47 is rl/"):
        champion.crown(world.store, world.readout(tested=tested))
    assert state(world).champion is None


def test_a_second_nomination_of_the_cycle_is_not_crowned_by_the_first_ones_readout(world: World) -> None:
    world.promote("PASS", weights="a")
    readout = world.readout()
    world.promote("PASS", weights="b")
    with pytest.raises(InputError, match="expose the candidate"):
        champion.crown(world.store, readout)


def test_rollback_is_one_step_and_the_same_readout_does_not_undo_it(world: World) -> None:
    for week, weights in (("2026-W47", "a"), ("2026-W48", "b")):
        world.promote("PASS", week, weights)
        assert champion.crown(world.store, world.readout(week))
    assert state(world).champion == model(world, "2026-W48")
    champion.rollback(world.store, "ada", "complaints")
    assert state(world).champion == model(world, "2026-W47")
    for day in range(3):
        assert champion.crown(world.store, world.readout("2026-W48", looked_on=day)) is None, "it counts once"
    champion.rollback(world.store, "ada", "more complaints", expected=str(model(world, "2026-W47")))
    assert state(world).champion is None
    with pytest.raises(InputError, match="no champion to roll back"):
        champion.rollback(world.store, "ada", "again")
    with pytest.raises(InputError, match="says why"):
        champion.rollback(world.store, "ada", " ")


def test_an_older_experiment_does_not_replace_a_later_champion(world: World) -> None:
    world.promote("PASS", "2026-W47", "a")
    world.promote("PASS", "2026-W48", "b")
    assert champion.crown(world.store, world.readout("2026-W48"))
    with pytest.raises(InputError, match=r"control of .* was served"):
        champion.crown(world.store, world.readout("2026-W47"))
    assert state(world).champion == model(world, "2026-W48")


def _contend(uri: str, what: str, barrier: Any, said: Any, number: int) -> None:
    store = Store(uri)
    gate = store.pointed("2026-W47", "gate")
    responses = store.pointed("2026-W47", "respond")
    readout = store.pointed("2026-W47", "readout")
    assert gate is not None
    assert responses is not None
    mine = champion.answered_as(responses, "candidate")
    barrier.wait()
    try:
        if what == "conclude":
            done: Any = champion.conclude(store, gate, mine)
        elif what == "answer":
            done = champion.answer(store, gate, mine, "approve" if number % 2 else "reject", f"p{number}", "mine")
            done = done if done.by == f"p{number}" else None
        elif what == "crown":
            done = champion.crown(store, readout) if readout else None
        else:
            done = champion.rollback(store, f"p{number}", "bad")
        said.put("won" if done else "nothing to do")
    except FlywheelError as error:
        said.put(f"refused: {error}")


@pytest.mark.parametrize("what", ["conclude", "answer", "crown", "rollback"])
def test_eight_at_once_have_one_winner(world: World, what: str) -> None:
    world.promote("PASS", "2026-W46", "first")
    champion.crown(world.store, world.readout("2026-W46"))
    world.gate("HOLD" if what == "answer" else "PASS")
    if what in ("crown", "rollback"):
        world.run(RESPOND)
        gate = world.store.pointed("2026-W47", "gate")
        assert gate is not None
        champion.conclude(world.store, gate, model(world))
        readout = world.readout()
        if what == "rollback":
            champion.crown(world.store, readout)
    before = len(state(world).entries)
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(8), context.Queue()
    racers = [
        context.Process(target=_contend, args=(world.store.uri, what, barrier, said, number)) for number in range(8)
    ]
    for racer in racers:
        racer.start()
    heard = [said.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(timeout=60)
    assert heard.count("won") == 1, heard
    now = state(world)
    assert len(now.entries) == before + 1
    if what == "rollback":
        assert now.champion == model(world, "2026-W46")
        assert sum("rolled back at" in h for h in heard) == 7
    if what == "crown":
        assert now.champion == model(world)


def test_a_ledger_that_was_touched_is_refused(world: World) -> None:
    world.promote("PASS", "2026-W47", "a")
    champion.crown(world.store, world.readout("2026-W47"))
    files = sorted((world.folder / "store/champion/ledger").glob("*.json"))
    whole = files[0].read_text()
    files[0].write_text(whole.replace("every rule passes", "every rule passed"))
    with pytest.raises(CorruptArtifact, match="does not follow"):
        state(world)
    files[0].write_text("{")
    with pytest.raises(CorruptArtifact, match="damaged"):
        state(world)
    files[0].unlink()
    with pytest.raises(CorruptArtifact, match="entry 1 is missing"):
        state(world)
    files[0].write_text(whole)
    assert len(state(world).entries) == 2


def command(world: World, *arguments: str) -> Any:
    app = typer.Typer()
    champion_commands.register(app, lambda profile, config, overrides: world.config())
    return CliRunner().invoke(app, list(arguments))


def test_the_commands_and_the_registry_that_follows(tracked: World) -> None:
    """One life of a model on the command line; MLflow's aliases say what the ledger says after every step."""
    world = tracked
    from mlflow.tracking import MlflowClient

    world.promote("HOLD")
    client = MlflowClient(tracking_uri=world.tracking, registry_uri=world.tracking)

    def alias(name: str) -> str | None:
        found = client.get_registered_model("character-flywheel").aliases.get(name)
        if found is None:
            return None
        return str(client.get_model_version("character-flywheel", found).tags["artifact_key"])

    key = model(world).key
    assert command(world, "answer", "approve", "--cycle", "2026-W47").exit_code == 2, "an approval needs a reason"
    said = command(world, "answer", "approve", "--cycle", "2026-W47", "--why", "as V14", "--by", "ada")
    assert (said.exit_code, said.stderr) == (0, ""), said.output
    assert (alias("candidate"), alias("champion")) == (key, None)
    version = client.get_model_version_by_alias("character-flywheel", "candidate")
    assert version.source.startswith("models:/"), "the version is the logged model that the checkpoints page compares"
    assert (version.tags["by"], version.description) == ("ada", "as V14")
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (logged.tags["gate"], logged.tags["experiment"]) == ("HOLD", "release-2026-W47")
    world.readout(verdict="hold")
    assert command(world, "crown", "--cycle", "2026-W47").exit_code == 3
    world.readout()
    assert command(world, "crown", "--cycle", "2026-W47").exit_code == 0
    assert (alias("candidate"), alias("champion")) == (None, key)
    lifts = {m.key: m.value for m in client.get_logged_model(logged.model_id).metrics}
    assert lifts == {"breadth": 1.5, "breadth.low": 0.5, "breadth.high": 2.5}, (
        "the readout stands beside the checkpoint"
    )
    assert command(world, "crown", "--cycle", "2026-W47").exit_code == 3
    shown = json.loads(command(world, "champion", "--json").stdout)
    assert [e["action"] for e in shown["ledger"]] == ["nominate", "crown"]
    assert key in shown["champion"]
    other = command(world, "rollback", "--why", "x", "--champion", "rl/" + "1" * 32)
    assert (other.exit_code, "nothing was changed" in other.stderr) == (2, True)
    assert command(world, "rollback", "--why", "complaints", "--by", "ada").exit_code == 0
    assert alias("champion") is None
    table = command(world, "champion", "--sync")
    assert table.exit_code == 0
    assert "complaints" in table.stdout
    assert command(world, "answer", "maybe", "--cycle", "2026-W47").exit_code == 2
    assert command(world, "crown", "--cycle", "2026-W40").exit_code == 2


def test_before_the_first_change_the_ledger_says_so(world: World) -> None:
    said = command(world, "champion")
    assert (said.exit_code, said.stdout.splitlines()[-1]) == (0, "no change yet: the ledger is empty")
    refused = command(world, "champion", "--cycle", "2026-W47")
    assert (refused.exit_code, "give --sync too" in refused.stderr) == (2, True)


def test_the_registry_follows_a_ledger_that_changes_while_it_follows(
    tracked: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow follower read the ledger before a crown and points after it: it must not put the old aliases back."""
    from mlflow.tracking import MlflowClient

    world = tracked
    world.promote("PASS")
    readout, pointing = world.readout(), registry._point
    crowned: list[ledger.Entry | None] = []

    def point(client: Any, alias: str, version: str | None) -> None:
        if not crowned:
            crowned.append(champion.crown(world.store, readout))
            registry.follow(world.store, world.tracking)
        pointing(client, alias, version)

    monkeypatch.setattr(registry, "_point", point)
    version = registry.follow(world.store, world.tracking)[registry.CHAMPION]
    assert version is not None
    client = MlflowClient(tracking_uri=world.tracking, registry_uri=world.tracking)
    assert client.get_registered_model(registry.NAME).aliases == {registry.CHAMPION: int(version)} or (
        client.get_registered_model(registry.NAME).aliases == {registry.CHAMPION: version}
    )


FOLLOW = """
import sys
from flywheel_tasks.core.store import Store
from flywheel_tasks.release import registry
print(registry.follow(Store(sys.argv[1]), sys.argv[2])[registry.CANDIDATE])
"""


def test_the_registry_follows_in_a_process_of_its_own_and_writes_nothing_where_it_runs(
    tracked: World, tmp_path: Path
) -> None:
    """As a task of its own does it: nothing in that process has told MLflow where its database is."""
    from mlflow.tracking import MlflowClient

    tracked.promote("PASS")
    here = tmp_path / "here"
    here.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    argv = [sys.executable, "-c", FOLLOW, tracked.store.uri, tracked.tracking]
    done = subprocess.run(argv, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    client = MlflowClient(tracking_uri=tracked.tracking, registry_uri=tracked.tracking)
    version = client.get_model_version_by_alias(registry.NAME, registry.CANDIDATE)
    assert (str(version.version), version.source[:8]) == (done.stdout.strip(), "models:/")
    assert list(here.iterdir()) == []


def test_a_reason_is_printed_and_does_not_command_the_terminal(world: World) -> None:
    world.promote("HOLD")
    said = command(world, "answer", "reject", "--cycle", "2026-W47", "--why", "too\x1b[2J long\nby heart")
    assert said.exit_code == 0, said.output
    assert said.stdout.splitlines()[-1].endswith(r"too\x1b[2J long\nby heart")
    assert "\x1b" not in said.output + command(world, "champion").output


def test_a_registry_that_is_down_costs_a_warning(world: World) -> None:
    world.promote("HOLD")
    world.tracking = "http://127.0.0.1:9"
    said = command(world, "answer", "reject", "--cycle", "2026-W47")
    assert said.exit_code == 0
    assert "did not follow" in said.stderr
    assert [e.action for e in state(world).entries] == ["refuse"]
