"""Multiplicity across versions: each release is one more chance to be lucky, so its p-values are adjusted over all
releases read so far (Holm, and Benjamini and Hochberg), beside the adjustment within its own experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flywheel_tasks.release.analysis import PRIMARY
from flywheel_tasks.release.champion import EXPERIMENT
from flywheel_tasks.release.result import ReadoutResult
from flywheel_tasks.stats.multiplicity import benjamini_hochberg, holm


@dataclass(frozen=True)
class Claim:
    """One primary metric of one arm of one closed experiment."""

    experiment: str
    arm: str
    metric: str
    lift_pct: float | None
    p: float
    p_holm: float = 1.0
    p_bh: float = 1.0


def across(earlier: Mapping[str, Any] | None, result: ReadoutResult) -> list[dict[str, Any]]:
    """The claims of the readout of the cycle before, and of those before it, with this one's; adjusted together."""
    known = [Claim(**claim) for claim in (earlier or {}).get("versions", ())]
    tested = result.candidate or not result.experiment.startswith(EXPERIMENT)  # a release without one tested nothing
    mine = [
        Claim(result.experiment, c.arm, c.metric, c.lift.lift_pct, c.p)
        for c in result.comparisons
        if tested and c.metric in PRIMARY and c.p is not None
    ]
    return adjust([*(claim for claim in known if claim.experiment != result.experiment), *mine])


def adjust(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    p = [claim.p for claim in claims]
    return [
        asdict(claim) | {"p_holm": by_holm, "p_bh": by_bh}
        for claim, by_holm, by_bh in zip(claims, holm(p), benjamini_hochberg(p), strict=True)
    ]
