"""The wait for annotators inside Airflow's triggerer, where it holds no worker.

It is in the package because the triggerer, unlike a worker, does not have the DAG folder on its path. Nothing else of
the package imports Airflow.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Sequence
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from flywheel_tasks.annotation.waiting import Arrived, Inbox, decide
from flywheel_tasks.core.errors import FlywheelError


class ReviewsTrigger(BaseTrigger):
    """Fires once: when enough reviews are there, or at the deadline."""

    def __init__(
        self, store: str, export: str, deliveries: Sequence[str], at_least: int, deadline: str, poll_seconds: float
    ) -> None:
        super().__init__()
        self.store, self.export, self.deliveries = store, export, list(deliveries)
        self.at_least, self.deadline, self.poll_seconds = at_least, deadline, poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("store", "export", "deliveries", "at_least", "deadline", "poll_seconds")
        return f"{__name__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        inbox = Inbox(self.store, self.export, self.deliveries)
        deadline = datetime.datetime.fromisoformat(self.deadline)
        so_far: Arrived | None = None
        while True:
            try:
                # Listing a bucket and reading files take long: other triggers share this loop.
                now = await asyncio.to_thread(inbox.look)
            except (FlywheelError, OSError) as error:
                self.log.warning("the deliveries cannot be read, trying again: %s", error)
            else:
                if now != so_far:
                    self.log.info("%d of %d reviews, waiting for %d until %s", now.there, now.wanted, self.at_least,
                                  self.deadline)  # fmt: skip
                so_far = now
            clock = datetime.datetime.now(datetime.UTC)
            if so_far and (why := decide(so_far, self.at_least, clock, deadline)) != "wait":
                yield TriggerEvent({"why": why} | so_far._asdict())
                return
            if clock >= deadline:
                yield TriggerEvent({"why": "late"})
                return
            await asyncio.sleep(min(self.poll_seconds, (deadline - clock).total_seconds()))
