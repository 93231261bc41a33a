"""Reviews meet the ledger (Sec. 2.2.2): each finds its pair, or is refused; then one answer for each person and pair.

The rules. A review of a task that never left, or whose text or order is not what we sent, is refused. It must answer
the mandated questions. One person has one answer on one pair: the same answer again is a duplicate; another answer
later replaces the earlier one; two different answers of the same instant contradict each other and neither counts. A
rewrite is no part of the answer that it comes with: of the same answer's rewrites the last one stays.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from flywheel_tasks.annotation import contract
from flywheel_tasks.annotation.contract import Question, Review
from flywheel_tasks.annotation.delivery import Line

CARRIED = "earlier import"
"""The place of a review that an earlier import accepted."""
_SAYS = ("preferred", "strength", "questions")
"""An answer. What the filter leaves of the words beside it changes with its rules; the person's answer does not."""


class Resolved(NamedTuple):
    """One annotation row, with what only the import needs beside it; or a refusal."""

    where: str
    row: dict[str, Any] | None
    next_message: str | None = None
    reason: str | None = None
    user: str | None = None
    """Whose pair it is about, where that is known: a refusal is purged with its user too."""


def resolve(
    line: Line, ledger: Mapping[str, Mapping[str, Any]], questions: Mapping[str, Question], key: bytes
) -> Resolved:
    """One line against the ledger (task id → task); its words are as they were written (`words.filtered`)."""
    review = line.review
    if review is None:
        return Resolved(line.where, None, reason=line.reason)
    task = ledger.get(review.task_id)
    if task is None:
        return Resolved(line.where, None, reason="unknown_task")
    if reason := refusal(review, task, questions):
        return Resolved(line.where, None, reason=reason, user=task["user"])
    sides = {"left": task["left"], "right": "y1" if task["left"] == "y0" else "y0"}
    who = contract.annotator_id(review.annotator, key)
    answers = [{"name": a.question, "about": sides.get(a.about, a.about), "answer": a.answer} for a in review.answers]
    row = {
        "annotation_id": hashlib.sha256(f"{review.task_id}\0{who}".encode()).hexdigest()[:32],
        "pair_id": task["pair_id"],
        "batch": line.batch,
        "mode": task["mode"],
        "annotator": who,
        "preferred": sides.get(review.preferred, review.preferred),
        "strength": review.strength,
        "questions": sorted(answers, key=lambda answer: (answer["name"], answer["about"])),
        "rewrite": _written(review.rewrite),
        "seconds": review.seconds,
        "at": review.at,
        "user": task["user"],
    }
    return Resolved(line.where, row, _written(review.next_message), user=task["user"])


def refusal(review: Review, task: Mapping[str, Any], questions: Mapping[str, Question]) -> str | None:
    """Why a review cannot be one of its task (of which `digest` and `mode` are looked at), if it cannot."""
    if review.digest != task["digest"] or (review.shown and contract.digest(review.shown) != task["digest"]):
        return "altered_text"
    return _answers_wrong(review, task["mode"], questions)


class Settled(NamedTuple):
    """The reviews that count; those that do not, each with its reason; and what the next import has to remember."""

    kept: list[Resolved]
    out: list[Resolved]
    contradicted: dict[str, datetime]
    """Annotations whose person gave two answers at one instant, and that instant: only a later answer counts."""


def settle(resolved: Iterable[Resolved], contradicted: Mapping[str, datetime] = MappingProxyType({})) -> Settled:
    """One answer for each person and pair. The order of arrival is no rule: the same reviews in any order, split into
    files and imports in any way, settle on the same answers. `contradicted` is what earlier imports remember."""
    kept: list[Resolved] = []
    out: list[Resolved] = []
    remembered = dict(contradicted)
    groups: dict[str, list[Resolved]] = defaultdict(list)
    for one in resolved:
        if one.row is None:
            out.append(one)
        else:
            groups[one.row["annotation_id"]].append(one)
    for name, group in groups.items():
        answers: dict[str, list[Resolved]] = defaultdict(list)
        for one in group:
            answers[_says(one)].append(one)
        firsts = []
        for same in answers.values():
            first, *again = sorted(same, key=_arrival)
            # When the person said so last decides between answers; when it first came decides its batch.
            last_said = _row(max(same, key=_said_last))
            row = _row(first) | {"at": last_said["at"], "rewrite": last_said["rewrite"]}
            firsts.append((last_said["at"], first._replace(row=row)))
            out += [one._replace(reason="duplicate") for one in again]
        before = remembered.pop(name, None)
        last = max([at for at, _ in firsts] + ([before] if before else []))
        winners = [one for at, one in firsts if at == last]
        out += [one._replace(reason="superseded") for at, one in firsts if at != last]
        if len(winners) == 1 and last != before:
            kept += winners
        else:
            out += [one._replace(reason="contradictory") for one in winners]
            remembered[name] = last
    kept.sort(key=lambda one: _row(one)["annotation_id"])
    return Settled(kept, out, remembered)


def _answers_wrong(review: Review, mode: str, questions: Mapping[str, Question]) -> str | None:
    given = {(answer.question, answer.about): answer.answer for answer in review.answers}
    if len(given) != len(review.answers):
        return "answered_twice"
    for (name, about), answer in given.items():
        question = questions.get(name)
        # A question of an earlier cycle's export may be gone by now: its answers are still answers.
        if question and (answer not in question.answers or (question.about == "pair") != (about == "pair")):
            return "illegal_answer"
    wanted: set[tuple[str, str]] = set(given)
    for question in questions.values():
        if question.required and mode in question.modes:
            sides = ["pair"] if question.about == "pair" else ["left", "right"]
            if any((question.name, side) not in wanted for side in sides):
                return "unanswered"
    return None


def _written(text: str | None) -> str | None:
    """A person's own words; blank is none."""
    return (text or "").strip() or None


def _row(one: Resolved) -> dict[str, Any]:
    if one.row is None:
        raise ValueError("a refusal has no row")
    return one.row


def _says(one: Resolved) -> str:
    return repr([_row(one)[name] for name in _SAYS])


def _arrival(one: Resolved) -> tuple[Any, ...]:
    """What an earlier import took came first, whatever it says about its time."""
    return one.where != CARRIED, _row(one)["batch"], _row(one)["at"], one.where


def _said_last(one: Resolved) -> tuple[Any, ...]:
    row = _row(one)
    return row["at"], row["rewrite"] is not None, row["rewrite"] or ""
