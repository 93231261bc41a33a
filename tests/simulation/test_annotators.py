from __future__ import annotations

import datetime as dt
import json
from dataclasses import replace

import numpy as np
import pytest

from flywheel_tasks.annotation.contract import Response, Task
from flywheel_tasks.simulation import annotators
from flywheel_tasks.simulation.characters import demo_characters
from flywheel_tasks.simulation.users import Turn, engagement, reply_features
from tests.annotation import worlds

AT = dt.datetime(2026, 11, 18, 9, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Task]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_USER_KEY", "k" * 32)
        world = worlds.World(tmp_path_factory.mktemp("annotators"))
        world.export(worlds.pairs(250, modes={"static": 0.8, "interactive": 0.2}), "2026-W47")
        return world.tasks()


def better(task: Task, person: annotators.Annotator) -> str | None:
    """The side that this person's taste prefers, where the difference is clear."""
    character = next(c for c in demo_characters() if c.name == task.shown.character.name)
    history = [Turn(said.role, said.content) for said in task.shown.history]
    left, right = (
        engagement(person.taste, reply_features(character, history, side.text, person.taste.sweet_words))
        for side in (task.shown.left, task.shown.right)
    )
    return None if abs(left - right) < 1.0 else "left" if left > right else "right"


def test_careful_annotators_choose_what_engages_them_and_noise_is_what_it_says(tasks: list[Task]) -> None:
    for noise in (0.0, 0.2, 1.0):
        person = annotators.team(1, 5, noise=noise)[0]
        clear = [(task, side) for task in tasks if (side := better(task, person))]
        said = [annotators.review(person, task, AT, 9).preferred for task, _ in clear]
        decided = [(s, side) for s, (_, side) in zip(said, clear, strict=True) if s in ("left", "right")]
        right = np.mean([s == side for s, side in decided])
        assert right == pytest.approx(1 - noise / 2, abs=0.09)


def test_who_wants_few_words_chooses_by_that(tasks: list[Task]) -> None:
    usual = annotators.team(1, 5, noise=0.0)[0]
    terse = replace(usual, taste=replace(usual.taste, sweet_words=4.0, length=9.0))
    few, many = "so it goes then", "so it goes then and on and on " * 3

    def short(person: annotators.Annotator, task: Task) -> bool:
        sides = (side.model_copy(update={"text": text}) for side, text in zip(_sides(task), (few, many), strict=True))
        shown = task.shown.model_copy(update=dict(zip(("left", "right"), sides, strict=True)))
        return annotators.review(person, task.model_copy(update={"shown": shown}), AT, 3).preferred == "left"

    assert np.mean([short(terse, task) for task in tasks]) > 0.95
    assert np.mean([short(usual, task) for task in tasks]) < 0.05


def _sides(task: Task) -> tuple[Response, Response]:
    return task.shown.left, task.shown.right


def test_the_same_seed_gives_the_same_review_and_another_seed_another(tasks: list[Task]) -> None:
    team = annotators.team(3, 5)
    assert annotators.reviews(tasks, team, worlds.DAY, 9) == annotators.reviews(tasks, team, worlds.DAY, 9)
    assert annotators.reviews(tasks, team, worlds.DAY, 9) != annotators.reviews(tasks, team, worlds.DAY, 10)


def test_each_task_is_answered_by_different_people_and_completely(tasks: list[Task]) -> None:
    team = annotators.team(7, 5)
    found = annotators.reviews(tasks, team, worlds.DAY, 9)
    for task in tasks:
        mine = [review for review in found if review.task_id == task.task_id]
        assert len({review.annotator for review in mine}) == len(mine) == task.reviewers
        for review in mine:
            needed = {q.name for q in task.questions if q.required}
            assert needed <= {answer.question for answer in review.answers}
            assert (review.next_message is not None) == (task.mode == "interactive")
            assert (review.rewrite is not None) == (review.preferred == "neither")


def test_habits(tasks: list[Task]) -> None:
    reader, left, hurried = annotators.team(3, 5, always_left=1, hurrying=1)
    assert {annotators.review(left, task, AT, 9).preferred for task in tasks} == {"left"}
    seconds = {
        person.name: np.median([annotators.review(person, task, AT, 9).seconds for task in tasks])
        for person in (reader, hurried)
    }
    assert seconds[hurried.name] < seconds[reader.name] / 4


@pytest.mark.parametrize("bias", ["left_bias", "length_bias"])
def test_a_bias_moves_choices_its_way(tasks: list[Task], bias: str) -> None:
    plain = annotators.team(1, 5, noise=0.0)[0]
    biased = annotators.Annotator(plain.name, plain.taste, noise=0.0, **{bias: 4.0 if bias == "left_bias" else 60.0})

    def share(person: annotators.Annotator) -> float:
        picked = [(t, annotators.review(person, t, AT, 9).preferred) for t in tasks]
        sided = [(t, side) for t, side in picked if side in ("left", "right")]
        if bias == "left_bias":
            return float(np.mean([side == "left" for _, side in sided]))
        longer = ["left" if len(t.shown.left.text) > len(t.shown.right.text) else "right" for t, _ in sided]
        return float(np.mean([side == other for (_, side), other in zip(sided, longer, strict=True)]))

    assert share(biased) > share(plain) + 0.1


def test_a_delivery_is_named_by_its_batch_and_holds_one_review_a_line(tasks: list[Task], tmp_path) -> None:
    found = annotators.reviews(tasks, annotators.team(3, 5), worlds.DAY, 9)
    path = annotators.deliver(found, tmp_path, worlds.DAY, "acme")
    assert path.name == "261118-acme.jsonl"
    assert [json.loads(line)["task_id"] for line in path.read_text().splitlines()] == [r.task_id for r in found]


def test_better_policies_win_with_annotators_who_never_see_which_is_which(tmp_path, user_key) -> None:
    world = worlds.World(tmp_path)
    world.export(worlds.pairs(150), "2026-W47")
    team = annotators.team(5, 3)
    annotators.deliver(annotators.reviews(world.tasks(), team, worlds.DAY, 3), world.inbox, worlds.DAY)
    chosen = world.collect("2026-W47").table("preferences").read()["policy_chosen"].to_pylist()
    assert np.mean([policy == "policy-of-quality-0.95" for policy in chosen]) > 0.75
