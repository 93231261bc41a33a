"""Waits for annotators before their reviews are imported, if the run's form asks for it (Sec. 2.2.2).

The cycle never depends on people: with enough reviews or at the deadline the import takes what is there. Where the
wait itself goes wrong, for example because no triggerer runs, it is over too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import deployment
from airflow.sdk import BaseOperator, Param
from airflow.sdk.exceptions import AirflowSkipException, TaskDeferralError, TaskDeferralTimeout
from launch import day_of

from flywheel_tasks.core.errors import ConfigError, FlywheelError
from flywheel_tasks.core.ids import cycle_of
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.pipeline import load_config

AT_LEAST, DEADLINE = "reviews_at_least", "reviews_deadline_hours"
LONGEST_WAIT_HOURS = 144
"""Less than the week after which the next cycle is due: only one runs at a time."""
MOST_REVIEWS = 10_000_000
GRACE = timedelta(minutes=10)
"""How long after the deadline a trigger that never fired is given up."""


class AwaitReviews(BaseOperator):
    custom_operator_name = "annotators' reviews"
    template_fields: Sequence[str] = ()

    def __init__(self, *, after: str, before: str, poll_seconds: float = 60, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.after, self.before, self.poll_seconds = after, before, poll_seconds

    def execute(self, context: Mapping[str, Any]) -> None:
        params = context["params"]
        if self.before in (params.get("skip") or ()):
            raise AirflowSkipException(f"{self.before} is skipped: nobody is waited for")
        if not params.get(AT_LEAST):
            raise AirflowSkipException(f"{AT_LEAST} is 0: {self.before} takes what is there")
        try:
            self.wait(context)
        except (FlywheelError, OSError) as error:
            self.log.warning("not waiting: %s", error)

    def wait(self, context: Mapping[str, Any]) -> None:
        """Defer to the triggerer, unless it is over already."""
        from flywheel_tasks.annotation.trigger import ReviewsTrigger
        from flywheel_tasks.annotation.waiting import Inbox, decide

        params = context["params"]
        settings = [*deployment.overrides(), *(params.get("overrides") or ())]
        config = load_config(params["profile"], None, settings)
        store, at_least = Store(config.store.uri), params[AT_LEAST]
        export = self.sent(context, store)
        # From when the tasks went out: a second run of the cycle does not give people their hours again.
        deadline = export.manifest.finished + timedelta(hours=params[DEADLINE])
        deliveries = config.stages[self.before].model_dump()["deliveries"]
        if not deliveries:
            raise FlywheelError(f"{self.before}.deliveries is empty: name the files that annotators send")
        so_far, now = Inbox(store.uri, export.uri, deliveries).look(), datetime.now(UTC)
        why = decide(so_far, at_least, now, deadline)
        if why == "wait":
            given = (store.uri, export.uri, deliveries, at_least, deadline.isoformat(), self.poll_seconds)
            self.log.info("%d of %d reviews, waiting for %d until %s", so_far.there, so_far.wanted, *given[3:5])
            self.defer(trigger=ReviewsTrigger(*given), method_name="go_on", timeout=deadline - now + GRACE)
        self.go_on(context, {"why": why} | so_far._asdict())

    def sent(self, context: Mapping[str, Any], store: Store) -> Artifact:
        """The export of this run, or the cycle's where this run skipped it."""
        if uri := context["ti"].xcom_pull(task_ids=self.after):
            return store.by_uri(uri)
        cycle = context["params"]["cycle"] or cycle_of(day_of(context))
        if found := store.pointed(cycle, self.after):
            return found
        raise FlywheelError(f"{self.after} has no artifact in {cycle}: nothing was sent out")

    def go_on(self, context: Mapping[str, Any], event: Mapping[str, Any]) -> None:
        """The wait is over: say how it ended."""
        how = {"enough": "enough reviews", "late": "the deadline has passed"}[event["why"]]
        if "there" in event:
            self.log.info("%s: %d of %d are there", how, event["there"], event["wanted"])
        else:
            self.log.warning("%s, and the deliveries could never be read", how)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Mapping[str, Any]) -> Any:
        """A trigger that failed or never ran ends the wait, not the cycle."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except (TaskDeferralError, TaskDeferralTimeout) as error:
            self.log.warning("no longer waiting: %s (does 'airflow triggerer' run?)", error)


def form() -> dict[str, Param]:
    """What the form of the cycle asks; scheduled runs take the environment's values."""
    return {
        AT_LEAST: number(
            AT_LEAST, int, 0, MOST_REVIEWS, "Reviews to wait for",
            "annotate-import waits for this many reviews of this cycle's tasks. 0: it does not wait.",
        ),
        DEADLINE: number(
            DEADLINE, float, 24, LONGEST_WAIT_HOURS, "Hours to wait for reviews",
            "Counted from the export. Then the cycle goes on with the reviews that are there.",
        ),
    }  # fmt: skip


def number(
    name: str, kind: type[int] | type[float], otherwise: float, most: float, title: str, description: str
) -> Param:
    """A number from 0 to `most`, which the form and the environment check alike."""
    return Param(
        default(name, kind, otherwise, most),
        title=title,
        description=description,
        type="integer" if kind is int else "number",
        minimum=0,
        maximum=most,
    )


def default(name: str, kind: type[int] | type[float], otherwise: float, most: float) -> float:
    """FLYWHEEL_REVIEWS_AT_LEAST or FLYWHEEL_REVIEWS_DEADLINE_HOURS of the environment that parses the DAGs."""
    variable = f"FLYWHEEL_{name.upper()}"
    typed = os.environ.get(variable, str(otherwise))
    with suppress(ValueError):
        if 0 <= (value := kind(typed)) <= most:
            return value
    what = "a whole number" if kind is int else "a number"
    raise ConfigError(f"{variable}='{typed}': set it to {what} from 0 to {most:,}")
