"""winrate, gate and promote as stages of a cycle, on real scoring models with random weights, up to the weekly page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from flywheel_tasks.annotation import publish
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation import commands
from flywheel_tasks.evaluation.history import from_store
from flywheel_tasks.models.chat import Card
from flywheel_tasks.models.score import PairRow, Scorer, ScoreRow
from flywheel_tasks.release import ledger
from flywheel_tasks.stats.winrate import win_rate
from tests.annotation.worlds import line, write
from tests.evaluation.evaluation_world import PROMPTS, World
from tests.evaluation.test_report import check_safe

REQUIRE = ["rm_win_rate.pairwise_user", "metrics.instruction_violation", "overlap", "candidate", "measured_at"]
GATE = {"require": REQUIRE, "win_rate_precision": 0.5, "win_rate_floor": 0.0}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A store with a whole cycle, which tests copy: what they don't change is there already."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        World(folder, tiny_model, patch).run()
    return folder


@pytest.fixture
def world(measured: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    shutil.copytree(measured / "store", tmp_path / "store")
    return World(tmp_path, tiny_model, monkeypatch)


@pytest.fixture
def empty(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, tiny_model, monkeypatch)


def test_win_rates_are_those_of_the_scores_by_hand(world: World) -> None:
    made = world.run()
    report = made["winrate"].json("winrate")
    assert set(report["rm_win_rate"]) == {"pointwise_internal", "pointwise_user", "pairwise_user"}
    assert report["unmeasured"] == {}
    assert report["judged_by"]["pointwise"] == f"preference-pointwise/{made['preference-pointwise'].manifest.key}"
    rows = {r["completion_id"]: r for r in made["respond"].table("responses").read().to_pylist()}
    cards = {r["character_id"]: Card.of(r) for r in made["ingest"].table("characters").read().to_pylist()}
    folder = world.folder / f"store/{made['preference-pointwise'].manifest.folder}"
    scorer = Scorer(next(folder.glob("*/model")))
    outcomes = []
    for number in range(1, PROMPTS, 2):
        new, old = (rows[f"{policy}-{number}"] for policy in ("candidate", "champion"))
        a, b = scorer.pointwise([ScoreRow(r["turns"], r["text"], cards[r["character_id"]]) for r in (new, old)])
        outcomes.append(0.0 if new["finish"] == "error" else 0.5 + 0.5 * np.sign(float(a) - float(b)))
    internal = report["rm_win_rate"]["pointwise_internal"]
    assert (internal["rate"], internal["n"], internal["clusters"]) == (pytest.approx(np.mean(outcomes)), 12, 2)
    assert 0 <= internal["low"] <= internal["rate"] <= internal["high"] <= 1

    folder = world.folder / f"store/{made['preference-pairwise'].manifest.folder}"
    pairwise = Scorer(next(folder.glob("*/model")))
    new, old = rows["candidate-0"], rows["champion-0"]
    card = cards[new["character_id"]]
    p, q = pairwise.pairwise(
        [PairRow(new["turns"], new["text"], old["text"], card), PairRow(new["turns"], old["text"], new["text"], card)]
    )
    assert p + q == pytest.approx(1, abs=1e-3), "both orders: swapping the responses mirrors the probability"
    scored = {
        r["completion_id"]: {s["name"]: s["value"] for s in r["scores"]}
        for r in made["winrate"].table("scored").read().to_pylist()
    }
    assert len(scored) == 2 * PROMPTS
    assert scored["candidate-0"]["pairwise_win"] == pytest.approx(float(p), abs=1e-3)
    assert scored["champion-0"]["pairwise_win"] == pytest.approx(float(q), abs=1e-3)


def test_a_reward_model_that_is_missing_is_a_gap_that_blocks(empty: World) -> None:
    made = empty.run(
        "ingest",
        "constrain",
        "rl",
        "respond",
        "preference-pointwise",
        "winrate",
        "gate",
        gate={"require": ["rm_win_rate"]},
    )
    assert made["winrate"].json("winrate")["unmeasured"] == {"pairwise_user": "this cycle has no pairwise reward model"}
    decision = made["gate"].json("decision")
    assert decision["decision"] == "BLOCK"
    assert any("no pairwise reward model" in reason for reason in decision["reasons"])


def test_where_the_champion_never_answered_the_candidate_wins_and_the_gate_does_not_fall_for_it(world: World) -> None:
    made = world.run(respond={"champion_fails": True}, gate=GATE)
    rates = made["winrate"].json("winrate")["rm_win_rate"]
    assert rates["pointwise_user"]["rate"] == 1.0
    assert made["winrate"].manifest.rows is not None
    assert made["winrate"].manifest.rows.reasons == {"both_failed": 2}
    assert made["gate"].json("decision")["decision"] == "BLOCK"


def findings(decision: dict[str, Any], rule: str) -> dict[str, str]:
    return {f["subject"]: f["verdict"] for f in decision["rules"] if f["rule"] == rule}


def test_the_gate_reads_what_the_stages_measured(world: World) -> None:
    made = world.run(gate=GATE)
    decision, evidence = made["gate"].json("decision"), made["gate"].json("evidence")
    assert decision["candidate"] == f"rl/{made['rl'].manifest.key}"
    assert evidence["metrics"]["instruction_violation"]["candidate"]["rate"] == 0.05
    assert findings(decision, "false_refusal") == {"internal": "NOTE", "user": "PASS"}, (
        "a judge that can't gate is shown"
    )
    assert findings(decision, "style_drift") == {"has_emoji": "PASS", "words": "NOTE"}
    assert findings(decision, "benchmark") == {"hellaswag": "PASS"}
    assert findings(decision, "overlap") == {"evaluation prompts": "PASS"}
    assert findings(decision, "old_batch") == {"pointwise static 261018": "PASS", "pairwise static 261018": "PASS"}
    assert set(findings(decision, "freshness").values()) == {"PASS"}
    page = made["gate"].file("page").decode()
    check_safe(page)
    assert "says" not in page, "a page that forget can't purge holds no one's words"
    again = world.run("gate", gate=GATE | {"max_age_days": 30})["gate"]
    assert again.manifest.key != made["gate"].manifest.key
    assert again.json("evidence") == evidence


def test_people_who_compare_both_models_side_by_side_are_evidence_once_they_answered(world: World) -> None:
    """The whole way: sent by the week, answered outside, read while a HOLD may wait; in closed form."""
    told = {
        "side_by_side": {"folder": str(world.folder / "compare")},
        "side_by_side_import": {"deliveries": [str(world.folder / "answers/*.jsonl")]},
        "gate": GATE,
    }
    made = world.run(**told)
    assert "human_win_rate" not in made["gate"].json("evidence"), "nobody has answered, and the week did not wait"
    sent = made["side-by-side"].json("report")
    candidate = f"rl/{made['rl'].manifest.key}"
    assert (sent["candidate"], sent["champion"], sent["tasks"]) == (candidate, "base", PROMPTS - 1)
    assert sent["not_shown"] == {"generation_failed": 1}
    found = publish.tasks(publish.read(str(world.folder / "compare"), sent["export"])["tasks.jsonl"])
    rows, outcomes = [], []
    for n, task in enumerate(found):
        ours, theirs = ("left", "right") if "candidate" in task.shown.left.text else ("right", "left")
        preferred, outcome = ((ours, 1.0), (theirs, 0.0), (ours, 1.0), ("tie", 0.5), ("neither", 0.5))[n % 5]
        rows.append(line(task, f"person-{n % 3}", preferred))
        outcomes.append(outcome)
    bad = [line(found[0], "x", digest="0" * 64), line(found[0], "x", task_id="t" + "0" * 24)]
    write(world.folder / "answers", "261120-a.jsonl", [*rows, *bad])
    again = world.run("side-by-side-import", "gate", **told)
    refused = again["side-by-side-import"].table("quarantine").read()["reason"].to_pylist()
    assert sorted(refused) == ["altered_text", "unknown_task"]
    ledger = {row["task_id"]: row for row in made["side-by-side"].table("tasks").read().to_pylist()}
    compared = sorted(
        (ledger[task.task_id]["pair_id"], ledger[task.task_id]["character_id"], outcome)
        for task, outcome in zip(found, outcomes, strict=True)
    )
    expected = win_rate([outcome for *_, outcome in compared], [character for _, character, _ in compared], seed=17)
    human = again["gate"].json("evidence")["human_win_rate"]
    assert human == {"rate": np.mean(outcomes), "n": len(found), "low": expected.low, "high": expected.high}
    assert findings(again["gate"].json("decision"), "loss")["human"] == "PASS"
    assert from_store(world.store)[0].numbers["human_win_rate"].value == human["rate"], "the page of the week shows it"
    file = world.folder / "people.json"
    file.write_text(json.dumps({"human_win_rate": {"rate": 0.9, "n": 100}}))
    with pytest.raises(InputError, match="'human_win_rate' is handed in twice"):
        world.run("gate", **told | {"gate": GATE | {"evidence": [str(file)]}})


def test_where_nobody_compared_the_two_there_is_no_human_win_rate(world: World) -> None:
    made = world.run(gate=GATE | {"require": ["human_win_rate"]})
    assert "human_win_rate" not in made["gate"].json("evidence")
    assert findings(made["gate"].json("decision"), "evidence")["human_win_rate"] == "BLOCK"


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"respond": {"leaked": 2}}, "2 of 24 evaluation prompts occur in training data"),
        ({"metrics": {"violation": 0.12}}, "instruction violation"),
        ({"gate": {"require": ["red_team"]}}, "red_team is required: it is missing"),
        ({"gate": {"require": ["metrics.false_refusal_internal"]}}, "kappa 0.31"),
    ],
)
def test_what_the_stages_found_blocks(world: World, sections: dict[str, dict[str, Any]], why: str) -> None:
    made = world.run(**sections | {"gate": GATE | sections.get("gate", {})})
    decision = made["gate"].json("decision")
    assert decision["decision"] == "BLOCK"
    assert any(why in reason for reason in decision["reasons"]), decision["reasons"]
    assert made["promote"].json("promotion")["outcome"] == "blocked"


@pytest.mark.parametrize(
    ("again", "stale", "what"),
    [
        (("rl", "respond"), "winrate", "responses"),
        (("rl", "respond", "winrate"), "metrics", "responses"),
        (("rl", "respond", "winrate", "metrics"), "benchmarks", "candidate"),
        (("preference-pairwise",), "winrate", "pairwise"),
    ],
)
def test_what_was_measured_of_another_candidate_vouches_for_nobody(
    world: World, again: tuple[str, ...], stale: str, what: str
) -> None:
    """The week's candidate was made anew, and a stage that measures it was left out."""
    other = {"rl": {"seed": 8}, "preference_pairwise": {"seed": 8}}
    world.run(*again, **other)
    before = len(ledger.read(world.store.storage).entries)
    with pytest.raises(InputError, match=rf"^{stale} measured {what} .*run `flywheel run {stale} --cycle 2026-W47`"):
        world.run("gate", "promote", gate=GATE, **other)
    assert len(ledger.read(world.store.storage).entries) == before


def test_people_hand_in_what_the_pipeline_cannot_measure(world: World, tmp_path: Path) -> None:
    key = world.run("rl")["rl"].manifest.key
    review = {"candidate": f"rl/{key}", "signed_off": True, "by": "red", "at": "2999-01-01T00:00:00Z"}
    file = tmp_path / "people.json"
    told = {"require": ["red_team"], "evidence": [str(file)], "win_rate_precision": 0.5}
    file.write_text(json.dumps({"red_team": review}))
    made = world.run(gate=told)
    assert findings(made["gate"].json("decision"), "freshness")["red_team"] == "BLOCK", "a review from the future"
    at = made["rl"].manifest.finished.isoformat()
    people = {
        "candidate": f"rl/{key}",
        "red_team": review | {"at": at},
        "human_win_rate": {"rate": 0.52, "n": 300},
        "measured_at": {"human_win_rate": at},
    }
    file.write_text(json.dumps(people))
    decision = world.run("gate", gate=told)["gate"].json("decision")
    assert findings(decision, "red_team") == {"red": "PASS"}
    assert findings(decision, "loss")["human"] == "PASS"
    for wrong, said in (
        ({"rm_win_rate": {"pointwise_user": {"rate": 0.5, "n": 9}}}, "measured by the pipeline"),
        ({"red_team": {"signed_off": True}}, "is missing"),
        ({"human_win_rate": {"rate": 0.52, "n": 300}}, "whose 'human_win_rate' is it"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=said):
            world.run("gate", gate=told)


@pytest.mark.parametrize("section", ["safety", "human_win_rate"])
def test_what_people_measured_of_another_candidate_blocks(world: World, tmp_path: Path, section: str) -> None:
    """However young and good it is: two candidates may be in the making at once."""
    made = world.run("rl")["rl"].manifest
    clean = {"rate": 0.0, "n": 5000}
    found = {
        "safety": {"suite": "guard", "unsafe": {"candidate": clean, "champion": clean}},
        "human_win_rate": {"rate": 0.55, "n": 900},
    }
    dated = {section: found[section], "measured_at": {section: made.finished.isoformat()}}
    file = tmp_path / "people.json"
    for about, expected in ((f"rl/{'0' * 32}", "BLOCK"), (f"rl/{made.key}", "PASS")):
        file.write_text(json.dumps(dated | {"candidate": about}))
        gate = {"require": [section], "evidence": [str(file)], "win_rate_precision": 0.5}
        decision = world.run(gate=gate)["gate"].json("decision")
        assert findings(decision, "evidence")[section] == expected
        assert any(f"is about {about}, the candidate is" in reason for reason in decision["reasons"]) == (
            expected == "BLOCK"
        )


def test_the_weekly_page_is_made_from_the_store(world: World, tmp_path: Path) -> None:
    world.run(gate=GATE)
    wider = {"win_rate": {"hold": 0.8, "block": 0.9}, "win_rate_ideal": 0.7}
    world.run(cycle="2026-W48", gate=GATE | wider, metrics={"violation": 0.3})
    versions = from_store(world.store)
    assert [v.name for v in versions] == ["2026-W47", "2026-W48"]
    assert versions[1].numbers["instruction_violation"].value == 0.3
    assert versions[1].before["instruction_violation"].value == 0.05
    assert versions[1].decision == "BLOCK"
    assert [(v.win_rate.hold, v.win_rate.block, v.win_rate_ideal) for v in versions] == [
        (0.65, 0.70, 0.60),
        (0.8, 0.9, 0.7),
    ], "each by the lines that its own gate judged by"
    app = Typer()
    commands.register(app, lambda *a: world.config())

    @app.callback()
    def _main() -> None:
        """Makes `report` a name."""

    out = tmp_path / "page"
    found = CliRunner().invoke(app, ["report", "--out", str(out), "--cycle", "2026-W47"])
    assert found.exit_code == 0, found.output
    html = (out / "index.html").read_text()
    check_safe(html)
    assert "candidate says" in html
    assert "2026-W48" not in html
    plain = CliRunner().invoke(app, ["report", "--out", str(out), "--no-examples"])
    assert plain.exit_code == 0
    assert "candidate says" not in (out / "index.html").read_text()
    (tmp_path / "file").write_text("")
    assert CliRunner().invoke(app, ["report", "--out", str(tmp_path / "file")]).exit_code == 2
    assert CliRunner().invoke(app, ["report", "--out", str(out), "--log"]).exit_code == 2, "MLflow has no such run"
