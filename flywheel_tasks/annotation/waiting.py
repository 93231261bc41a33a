"""Whether an import should still wait (Sec. 2.2.2): for a number of reviews of this cycle's tasks, until a deadline.

Only a team that wants this week's labels in this week's models needs it. A review counts if the import would not refuse
it by itself: its line, the digest of what was shown, the questions of its mode. The user key stays out of the
triggerer, and so does the last import: a person who contradicts themselves on a task counts as one review of it here.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow.compute as pc

from flywheel_tasks.annotation.contract import Question, questions_of
from flywheel_tasks.annotation.delivery import Line, lines
from flywheel_tasks.annotation.resolve import refusal
from flywheel_tasks.core.runner import expand
from flywheel_tasks.core.storage import open_external
from flywheel_tasks.core.store import Artifact, Store

Said = tuple[str, str]
"""A task's id, and who reviewed it."""


class Sent(NamedTuple):
    """What reviews are checked against."""

    tasks: dict[str, dict[str, Any]]
    """Those of the export's own cycle by their ids, each with `digest`, `mode` and `reviewers`."""
    questions: dict[str, Question]


class Arrived(NamedTuple):
    """Reviews of this export's tasks: how many were asked for, how many different ones are there."""

    wanted: int
    there: int


def said(found: Iterable[Line], sent: Sent) -> frozenset[Said]:
    """Which of the tasks were validly reviewed, and by whom."""
    reviews = (line.review for line in found if line.review is not None and line.review.task_id in sent.tasks)
    return frozenset(
        (review.task_id, review.annotator)
        for review in reviews
        if refusal(review, sent.tasks[review.task_id], sent.questions) is None
    )


def arrived(tasks: Mapping[str, Mapping[str, Any]], reviews: Iterable[Said]) -> Arrived:
    """Count reviews of the tasks, one for each person, no task beyond its own number of reviewers: many reviews of few
    tasks are not many tasks reviewed."""
    people: dict[str, set[str]] = {}
    for task, annotator in reviews:
        people.setdefault(task, set()).add(annotator)
    there = sum(min(len(found), tasks[task]["reviewers"]) for task, found in people.items())
    return Arrived(sum(task["reviewers"] for task in tasks.values()), there)


def decide(
    so_far: Arrived, at_least: int, now: datetime.datetime, deadline: datetime.datetime
) -> Literal["enough", "late", "wait"]:
    """`enough` and `late` go on, with whatever is there; only `wait` waits. Nobody sends more than was asked for."""
    if so_far.there >= min(at_least, so_far.wanted):
        return "enough"
    return "late" if now >= deadline else "wait"


def sent(export: Artifact) -> Sent:
    """The tasks of the export's own cycle, and what is asked."""
    ledger = export.table("tasks").read(["task_id", "cycle", "digest", "mode", "reviewers"])
    own = ledger.filter(pc.equal(ledger["cycle"], export.manifest.cycle)).to_pylist()
    return Sent({task["task_id"]: task for task in own}, questions_of(export.json("report")))


class Inbox:
    """The deliveries for one export. A file that has not changed is not read again."""

    def __init__(self, store: str, export: str, deliveries: Sequence[str]) -> None:
        self.store, self.export, self.deliveries = store, export, tuple(deliveries)
        self._sent: tuple[str, Sent] | None = None
        self._read: dict[str, tuple[tuple[int, int], frozenset[Said]]] = {}

    def look(self) -> Arrived:
        """Count what is there now."""
        if self._sent is None:
            export = Store(self.store).by_uri(self.export)
            self._sent = export.manifest.cycle, sent(export)
        cycle, asked = self._sent
        found: dict[str, tuple[int, int]] = {}
        for pattern in self.deliveries:
            found |= expand(pattern)
        for uri in self._read.keys() - found.keys():
            del self._read[uri]
        for uri, stamp in found.items():
            if uri not in self._read or self._read[uri][0] != stamp:
                with open_external(uri) as stream:
                    self._read[uri] = stamp, said(lines(uri, stream.read(), cycle), asked)
        return arrived(asked.tasks, (one for _, reviews in self._read.values() for one in reviews))
