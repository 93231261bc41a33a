from __future__ import annotations

import datetime as dt
import json

import pytest

from flywheel_tasks.annotation.annotate_import import ImportConfig
from flywheel_tasks.annotation.reviewers import reviewers
from flywheel_tasks.simulation import annotators
from tests.annotation import worlds

CYCLE = "2026-W47"


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> dict[str, dict]:
    """A team of ten, of whom one always picks the left and one hurries, on 300 pairs with three reviews each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_USER_KEY", "k" * 32)
        world = worlds.World(tmp_path_factory.mktemp("reviewers"))
        world.export(worlds.pairs(320), CYCLE)
        team = annotators.team(10, 3, noise=0.05, always_left=1, hurrying=1)
        found = annotators.reviews(world.tasks(), team, worlds.DAY, 3)
        annotators.deliver(found, world.inbox, worlds.DAY)
        report = world.collect(CYCLE).json("report")
        from flywheel_tasks.annotation.contract import annotator_id

        names = {annotator_id(person.name, b"k" * 32): person for person in team}
    return {
        "report": report, "by_name": {names[row["annotator"]].name: row for row in report["annotators"]},
        "team": {person.name: person for person in team},
    }  # fmt: skip


def test_who_always_picks_the_left_is_flagged_and_nobody_else(people: dict) -> None:
    flagged = {name for name, row in people["by_name"].items() if "position" in row["flags"]}
    assert flagged == {name for name, person in people["team"].items() if person.habit == "always_left"}
    assert people["by_name"][flagged.pop()]["left_share"] == 1.0


def test_who_hurries_is_flagged_for_pace_and_disagrees(people: dict) -> None:
    fast = {name for name, row in people["by_name"].items() if "fast" in row["flags"]}
    assert fast == {name for name, person in people["team"].items() if person.habit == "hurries"}
    flags = people["by_name"][fast.pop()]["flags"]
    assert "disagrees" in flags


def test_readers_raise_no_flag_and_agree_more_than_the_careless(people: dict) -> None:
    readers = [row for name, row in people["by_name"].items() if people["team"][name].habit == "reads"]
    others = [row for name, row in people["by_name"].items() if people["team"][name].habit != "reads"]
    assert all(row["flags"] == [] for row in readers)
    assert min(row["agreement"] for row in readers) > max(row["agreement"] for row in others)


def test_the_report_is_json_without_a_vendors_name(people: dict) -> None:
    assert "vendor-" not in json.dumps(people["report"], allow_nan=False)


def test_flagged_annotators_vote_only_where_the_configuration_lets_them(tmp_path, user_key) -> None:
    results = {}
    for name, config in {"all": ImportConfig(), "some": ImportConfig(leave_out=("position",))}.items():
        world = worlds.World(tmp_path / name, config)
        world.export(worlds.pairs(120), CYCLE)
        team = annotators.team(6, 3, always_left=1)
        annotators.deliver(annotators.reviews(world.tasks(), team, worlds.DAY, 3), world.inbox, worlds.DAY)
        results[name] = world.collect(CYCLE)
    rows = {name: artifact.table("annotations").rows for name, artifact in results.items()}
    assert rows["all"] == rows["some"], "a review is kept whether it votes or not"
    voted = {n: sum(a.table("preferences").read()["n_reviews"].to_pylist()) for n, a in results.items()}
    assert voted["some"] < voted["all"]


def test_drift_between_batches_is_found_in_the_one_who_drifts(tmp_path, user_key) -> None:
    """After the first batch one annotator answers at random; the others go on as before."""
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(400), CYCLE)
    team = annotators.team(5, 3, noise=0.02)
    worn = [annotators.Annotator(team[0].name, team[0].taste, noise=1.0), *team[1:]]
    tasks = world.tasks()
    later = worlds.DAY + dt.timedelta(days=7)
    annotators.deliver(annotators.reviews(tasks[:200], team, worlds.DAY, 3), world.inbox, worlds.DAY)
    annotators.deliver(annotators.reviews(tasks[200:], worn, later, 4), world.inbox, later)
    imported = world.collect(CYCLE)
    ledger = world.exports[0].table("tasks").read()
    people = reviewers(imported.table("annotations").read(), ledger)
    drifting = [person for person in people if "drift" in person.flags]
    assert len(drifting) == 1
    before, after = drifting[0].drift
    assert (before["batch"], after["batch"]) == (f"{worlds.DAY:%y%m%d}", f"{later:%y%m%d}")
    assert after["change"] < -0.15


def test_little_says_nothing_about_a_person(tmp_path, user_key) -> None:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(12), CYCLE)
    team = annotators.team(4, 3, always_left=2)
    annotators.deliver(annotators.reviews(world.tasks(), team, worlds.DAY, 3), world.inbox, worlds.DAY)
    assert all(person["flags"] == [] for person in world.collect(CYCLE).json("report")["annotators"])
