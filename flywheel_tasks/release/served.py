"""What the arms of an experiment are served, since when, and what may not change while units enter it (Sec. 2.5.2)."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.release.champion import EXPERIMENT
from flywheel_tasks.release.ledger import Model, State, title

RELEASE = re.compile(r"release-\d{4}-W\d{2}")
DRAW = ("shares", "salt", "layer", "slice", "min_sends", "start")
"""What decides which unit enters which arm, and when."""


class Served(NamedTuple):
    """The candidate that the test arm of a release meets, the first day on which it could, and the champion that
    control meets; all None where the ledger nominates none."""

    candidate: Model | None = None
    since: dt.date | None = None
    champion: str | None = None

    def as_json(self, store_uri: str) -> dict[str, Any]:
        model = self.candidate
        return {
            "candidate": (
                {"artifact": str(model), "path": model.path(store_uri), "sha256": model.sha256} if model else None
            ),
            "nominated": str(self.since) if self.since else None,
            "champion": self.champion,
        }


def served(experiment: str, state: State) -> Served:
    """Who is behind the arms of an experiment, where it is the release of a nominated candidate."""
    if not RELEASE.fullmatch(experiment):
        return Served()
    entry = state.nomination(ids.cycle_id(experiment.removeprefix(EXPERIMENT)))
    return Served(entry.model, entry.at.date(), title(state.champion)) if entry else Served()


def keeps_candidate(experiment: str, before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> None:
    """Refuse to go on under one name with another model: its users were served the first one."""
    if before and (now is None or now["sha256"] != before["sha256"]):
        raise InputError(
            f"experiment '{experiment}' exposed its users to {before['artifact']}, and the candidate is now "
            f"{now['artifact'] if now else 'refused'}: end it, or start an experiment under a new name"
        )


def keeps_draw(experiment: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse another draw within a cycle. Each run of a cycle makes its exposures anew, from the first day on: units of
    a place that an arm gained would enter before they were served, and those of one that it lost would leave.

    A nomination begins a release anew: nobody had met the candidate before it.
    """
    if not any(before.get("units", {}).values()) or before.get("nominated") != now["nominated"]:
        return
    changed = next((name for name in DRAW if name in before and before[name] != now[name]), None)
    if changed:
        raise InputError(
            f"experiment '{experiment}' exposed units in this cycle with {changed} = {before[changed]}: "
            f"{now[changed]} can only begin with the next cycle, or under a new name"
        )
