"""A HOLD in Airflow: who is asked, what is kept, and that silence refuses."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import approval
import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from approval import APPROVE, REJECT, Approval, form
from launch import build, parameters

from flywheel_tasks.core.store import Artifact
from flywheel_tasks.release import ledger, promote
from tests.release.promotion_world import GATE, World

FLYWHEEL = """
import typer
from flywheel_tasks.core.config import load
from flywheel_tasks.pipeline import STAGES
from flywheel_tasks.release import champion_commands, promote
app = typer.Typer()
app.callback()(lambda: None)
configs = {s.name: s.config for s in (*STAGES, promote.STAGE)}
champion_commands.register(app, lambda p, f, o: load(configs, p, f, o or ()))
app()
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return World(tmp_path)


def asked() -> Approval:
    task = Approval(task_id="approve", after="promote", params=form())
    task.command = (sys.executable, "-c", FLYWHEEL)
    return task


def context(promotion: Artifact | None) -> dict[str, Any]:
    ti = SimpleNamespace(xcom_pull=lambda task_ids: promotion.uri if promotion else None, id="ti")
    return {"ti": ti, "task_instance": ti, "params": {"profile": "test"}}


def said(option: str, why: str = "looks good") -> dict[str, Any]:
    return {
        "chosen_options": [option],
        "params_input": {"why": why},
        "responded_at": datetime.now(UTC),
        "responded_by_user": {"id": "7", "name": "ada"},
    }


def test_only_a_hold_asks(world: World, monkeypatch: pytest.MonkeyPatch):
    run = Approval.execute.__wrapped__
    for words, message in (("PASS", "said PASS"), ("BLOCK", "said BLOCK")):
        with pytest.raises(AirflowSkipException, match=message):
            run(asked(), context(world.promote(words)))
    with pytest.raises(AirflowSkipException, match="skipped"):
        run(asked(), context(None))
    waits: list[timedelta | None] = []
    monkeypatch.setattr(approval.HITLOperator, "execute", lambda self, context: waits.append(self.response_timeout))
    task = asked()
    run(task, context(world.promote("HOLD")))
    assert waits == [timedelta(hours=72)]
    assert "HOLD: as told" in str(task.body)
    where = str(task.body).partition("**Evidence** `file://")[2].partition("`")[0]
    assert Path(where).read_text() == "<p>page</p>"


@pytest.mark.parametrize(("option", "action"), [(APPROVE, "nominate"), (REJECT, "refuse")])
def test_who_decided_and_why_is_kept(world: World, option: str, action: str):
    asked().execute_complete(context(world.promote("HOLD")), said(option, "why; $(id) --by=eve"))
    (entry,) = ledger.read(world.store.storage).entries
    assert (entry.action, entry.by, entry.why) == (action, "ada", "why; $(id) --by=eve")


def test_an_approval_without_a_reason_is_asked_for_again(world: World):
    with pytest.raises(AirflowException, match="says why") as caught:
        asked().execute_complete(context(world.promote("HOLD")), said(APPROVE, "  "))
    assert not isinstance(caught.value, AirflowFailException), "another try asks again"
    assert ledger.read(world.store.storage).entries == ()


def test_silence_refuses(world: World):
    asked().execute_complete(context(world.promote("HOLD")), {"error": "late", "error_type": "timeout"})
    (entry,) = ledger.read(world.store.storage).entries
    assert (entry.action, entry.by) == ("refuse", "nobody")


def test_the_first_answer_stands(world: World):
    held = context(world.promote("HOLD"))
    asked().execute_complete(held, said(REJECT))
    with pytest.raises(AirflowFailException, match="answered before"):
        asked().execute_complete(held, said(APPROVE))
    assert [entry.action for entry in ledger.read(world.store.storage).entries] == ["refuse"]


@pytest.mark.parametrize("event", [said(APPROVE), said(REJECT), {"error": "late", "error_type": "timeout"}])
def test_an_answer_is_to_the_page_that_was_shown_and_to_no_other_candidate(world: World, event: dict[str, Any]):
    """While the question waited, the week's candidate was made and judged anew."""
    shown = context(world.promote("HOLD", weights="the one on the page"))
    now = context(world.promote("HOLD", weights="another"))
    with pytest.raises(AirflowFailException, match="judged again"):
        asked().execute_complete(shown, event)
    assert ledger.read(world.store.storage).entries == ()
    asked().execute_complete(now, said(APPROVE))
    assert [entry.action for entry in ledger.read(world.store.storage).entries] == ["nominate"]


def test_a_reason_of_others_can_write_no_page(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(approval.HITLOperator, "execute", lambda self, context: None)
    task = asked()
    hostile = "x`\n\n## Approve this\n\n![p](https://evil.example/x.png)"
    world.gate("HOLD")
    world.run(GATE, decision="HOLD", says=hostile)
    Approval.execute.__wrapped__(task, context(world.run(promote.STAGE)))
    (reason,) = [line for line in str(task.body).splitlines() if "Approve this" in line]
    assert reason.startswith("- `HOLD: x")
    assert reason.endswith("`")
    assert reason.count("`") == 2


def test_a_second_run_of_the_cycle_asks_nobody_again(world: World):
    held = context(world.promote("HOLD"))
    asked().execute_complete(held, said(REJECT))
    with pytest.raises(AirflowSkipException, match="ada answered before"):
        Approval.execute.__wrapped__(asked(), held)


def test_the_dag_asks_after_promote():
    with DAG("d", schedule=None, params=parameters([GATE])) as dag:
        build(dag, [GATE, promote.STAGE])
    assert dag.get_task("approve").upstream_task_ids == {"promote"}
    assert set(dag.get_task("approve").serialized_params) == {"why"}, "and nothing of the DAG's own form"
    with DAG("e", schedule=None) as without:
        build(without, [GATE])
    assert without.task_ids == ["gate"]
