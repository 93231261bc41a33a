"""What a readout hands on: one record that becomes JSON, a table, a plot, metrics."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flywheel_tasks.release.analysis import Comparison, Cuped, Look
from flywheel_tasks.release.decision import Decision
from flywheel_tasks.stats.fieller import FiellerSet
from flywheel_tasks.stats.moments import Estimate
from flywheel_tasks.stats.srm import SampleRatio

Status = Literal["closed", "running", "refused"]


@dataclass(frozen=True)
class ReadoutResult:
    """`closed` has lifts; `running` waits for its window; `refused` failed a check and shows no lift."""

    experiment: str
    status: Status
    control: str
    estimand: str
    window: dict[str, Any]
    alpha: float
    rows: dict[str, int]
    rules: list[str]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sample_ratio: SampleRatio | None = None
    arms: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    segments: list[Comparison] = field(default_factory=list)
    novelty: list[Look] = field(default_factory=list)
    cuped: list[Cuped] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    candidate: dict[str, str] | None = None
    """The model behind the test arm, where the experiment is the release of a cycle's candidate."""
    champion: str | None = None
    """The model behind the control arm of such a release."""
    versions: list[dict[str, Any]] = field(default_factory=list)
    """The primary claims of all releases read so far, adjusted together (`versions`)."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; comparisons are nested by arm and metric."""
        nested: dict[str, dict[str, Any]] = {}
        for c in self.comparisons:
            nested.setdefault(c.arm, {})[c.metric] = _comparison(c)
        return {
            "experiment": self.experiment,
            "candidate": self.candidate,
            "champion": self.champion,
            "status": self.status,
            "control": self.control,
            "estimand": self.estimand,
            "window": self.window,
            "alpha": self.alpha,
            "rows": self.rows,
            "rules": self.rules,
            "problems": self.problems,
            "warnings": self.warnings,
            "sample_ratio": self.sample_ratio._asdict() if self.sample_ratio else None,
            "arms": {a: {m: e._asdict() for m, e in found.items()} for a, found in self.arms.items()},
            "comparisons": nested,
            "segments": [
                {"segment": c.segment, "arm": c.arm, "metric": c.metric} | _comparison(c) for c in self.segments
            ],
            "novelty": [_with_sets(asdict(look), look.on_day, look.through) for look in self.novelty],
            "cuped": [asdict(c) | {"lift": c.lift.as_json()} for c in self.cuped],
            "decisions": [d._asdict() for d in self.decisions],
            "versions": self.versions,
        }


def _comparison(c: Comparison) -> dict[str, Any]:
    plain = c.lift.as_json()
    return plain | {
        "test": c.test._asdict(),
        "control": c.control._asdict(),
        "p": c.p,
        "p_holm": c.p_holm,
        "p_bh": c.p_bh,
        "delta_pct_bounds": c.delta_pct,
        "log_delta_pct_bounds": c.log_delta_pct,
    }


def _with_sets(plain: dict[str, Any], on_day: FiellerSet, through: FiellerSet) -> dict[str, Any]:
    z = plain["z"] if plain["z"] is not None and math.isfinite(plain["z"]) else None
    return plain | {"z": z, "on_day": on_day.as_json(), "through": through.as_json()}
