"""Whether an import should still wait (Sec. 2.2.2): for a number of reviews of this cycle's tasks, until a deadline.

Only a team that wants this week's labels in this week's models needs it. Counting takes what the import takes.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import pyarrow.compute as pc

from flywheel_tasks.annotation.delivery import Line, lines
from flywheel_tasks.core.runner import expand
from flywheel_tasks.core.storage import open_external
from flywheel_tasks.core.store import Artifact, Store

Said = tuple[str, str]
"""A task's id, and who reviewed it."""


class Arrived(NamedTuple):
    """Reviews of this export's tasks: how many were asked for, how many different ones are there."""

    wanted: int
    there: int


def said(found: Iterable[Line]) -> frozenset[Said]:
    """Which tasks were validly reviewed, and by whom."""
    return frozenset((line.review.task_id, line.review.annotator) for line in found if line.review is not None)


def arrived(wanted: Mapping[str, int], reviews: Iterable[Said]) -> Arrived:
    """Count reviews of the tasks in `wanted` (task id → reviewers), one for each person, no task beyond its own
    number: many reviews of few tasks are not many tasks reviewed."""
    people: dict[str, set[str]] = {}
    for task, annotator in reviews:
        if task in wanted:
            people.setdefault(task, set()).add(annotator)
    there = sum(min(len(found), wanted[task]) for task, found in people.items())
    return Arrived(sum(wanted.values()), there)


def decide(
    so_far: Arrived, at_least: int, now: datetime.datetime, deadline: datetime.datetime
) -> Literal["enough", "late", "wait"]:
    """`enough` and `late` go on, with whatever is there; only `wait` waits. Nobody sends more than was asked for."""
    if so_far.there >= min(at_least, so_far.wanted):
        return "enough"
    return "late" if now >= deadline else "wait"


def wanted(export: Artifact) -> dict[str, int]:
    """How many people were asked to review each task of the export's own cycle."""
    ledger = export.table("tasks").read(["task_id", "cycle", "reviewers"])
    own = ledger.filter(pc.equal(ledger["cycle"], export.manifest.cycle))
    return dict(zip(own["task_id"].to_pylist(), own["reviewers"].to_pylist(), strict=True))


class Inbox:
    """The deliveries for one export. A file that has not changed is not read again."""

    def __init__(self, store: str, export: str, deliveries: Sequence[str]) -> None:
        self.store, self.export, self.deliveries = store, export, tuple(deliveries)
        self._sent: tuple[str, dict[str, int]] | None = None
        self._read: dict[str, tuple[tuple[int, int], frozenset[Said]]] = {}

    def look(self) -> Arrived:
        """Count what is there now."""
        if self._sent is None:
            export = Store(self.store).by_uri(self.export)
            self._sent = export.manifest.cycle, wanted(export)
        cycle, asked = self._sent
        found: dict[str, tuple[int, int]] = {}
        for pattern in self.deliveries:
            found |= expand(pattern)
        for uri in self._read.keys() - found.keys():
            del self._read[uri]
        for uri, stamp in found.items():
            if uri not in self._read or self._read[uri][0] != stamp:
                with open_external(uri) as stream:
                    self._read[uri] = stamp, said(lines(uri, stream.read(), cycle))
        return arrived(asked, (one for _, reviews in self._read.values() for one in reviews))
