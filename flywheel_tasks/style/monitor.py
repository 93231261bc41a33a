"""The style monitor (Sec. 2.4.4, 3.5.6): do superficial features separate what is preferred, accepted, or trained?

Chosen against rejected, accepted against rejected, and each checkpoint against the one before it. A feature drifts when
the difference is real (Holm over all features of a comparison) and larger than its bound. Style that the history
already had is measured apart from style that the response added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, NonNegativeFloat, field_validator

from flywheel_tasks.core import problems
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.stats.multiplicity import benjamini_hochberg, holm
from flywheel_tasks.style.effects import Effect, FloatArray, Slope, effect, slope
from flywheel_tasks.style.features import FEATURES, Exchange, chunks, history_exchange, measure

Status = Literal["ok", "drift", "unknown"]


class StyleConfig(StageConfig):
    """From which effect on a feature counts as drift."""

    size: float = Field(
        0.2, ge=0, description="effect size (Cohen's h or d) beyond which a real difference is drift; 0.2 is small"
    )
    sizes: dict[str, NonNegativeFloat] = Field({}, description="bounds of single features, by name")
    alpha: float = Field(0.05, gt=0, lt=0.5, description="chance of any false alert in one comparison (Holm)")
    least: int = Field(30, ge=2, description="responses each side must have; with fewer a feature is 'unknown'")

    @field_validator("sizes")
    @classmethod
    def _known(cls, sizes: dict[str, float]) -> dict[str, float]:
        for name in sizes:
            if name not in FEATURES:
                raise ValueError(f"no style feature '{name}': {problems.nearest(name, FEATURES)}")
        return sizes

    def bound(self, name: str) -> float:
        return self.sizes.get(name, self.size)


@dataclass(frozen=True)
class Finding:
    """One feature in one comparison: the effect, its p-value after Holm and after Benjamini-Hochberg, the verdict."""

    name: str
    kind: str
    effect: Effect
    p_holm: float | None
    q: float | None
    bound: float
    status: Status

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "kind": self.kind, "n": min(self.effect.n_a, self.effect.n_b), **self.effect._asdict(),
            "effect": self.effect.size, "p_holm": self.p_holm, "q": self.q, "bound": self.bound, "status": self.status,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """All features of two groups of responses; a is set against b."""

    name: str
    a: str
    b: str
    findings: tuple[Finding, ...]
    history: Mapping[str, Mapping[str, Any]]
    """Per feature: how common it is in the histories, and how much of it the responses of a and of b repeat."""

    @property
    def alerts(self) -> tuple[str, ...]:
        return tuple(_sentence(self, finding) for finding in self.findings if finding.status == "drift")

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "a": self.a, "b": self.b, "features": [finding.as_json() for finding in self.findings],
            "alerts": list(self.alerts), "history": {name: dict(row) for name, row in self.history.items()},
        }  # fmt: skip


class Side(NamedTuple):
    """One group of responses, the histories before them, what makes rows alike (a character or a prompt), and where it
    was told the language of each response and the one that its user writes in."""

    name: str
    response: pa.StringArray
    history: pa.ChunkedArray | None
    cluster: npt.NDArray[np.object_]
    language: pa.StringArray | None = None
    wanted: pa.StringArray | None = None


def compare(name: str, a: Side, b: Side, config: StyleConfig) -> Comparison:
    """Features of a against b; that of languages only where both sides have theirs."""
    told = all(column is not None for side in (a, b) for column in (side.language, side.wanted))
    names = [name for name in FEATURES if told or name != "language_mismatch"]
    found_a, found_b = (
        measure(Exchange(side.response, side.history, side.language, side.wanted), names) for side in (a, b)
    )
    effects = {n: effect(found_a[n], found_b[n], a.cluster, b.cluster, FEATURES[n].kind, config.alpha) for n in names}
    history = _history_borne(names, {a.name: (a, found_a), b.name: (b, found_b)}, config.alpha)
    return Comparison(name, a.name, b.name, tuple(_judge(effects, config)), history)


def preferences(table: pa.Table, config: StyleConfig) -> Comparison:
    """Chosen against rejected (schema `preference`), clustered by character."""
    chosen, rejected = (_side(side, table, "character_id", side) for side in ("chosen", "rejected"))
    return compare("preferences", chosen, rejected, config)


def sampling(table: pa.Table, config: StyleConfig) -> Comparison:
    """Accepted against rejected candidates of rejection sampling (schema `completion`), clustered by prompt."""
    accepted = table["accepted"].to_numpy(zero_copy_only=False)
    sides = []
    for name, verdict in (("accepted", True), ("rejected", False)):
        part = table.filter(pa.array(accepted == verdict))
        sides.append(_side(name, part, "prompt_id"))
    return compare("rejection_sampling", sides[0], sides[1], config)


def checkpoints(tables: Mapping[str, pa.Table], config: StyleConfig) -> list[Comparison]:
    """Each checkpoint against the one before it (SFT, DPO, RL …), as `between` does it."""
    stages = list(tables)
    return [between(tables[after], tables[before], after, before, config) for before, after in pairwise(stages)]


def between(a: pa.Table, b: pa.Table, name_a: str, name_b: str, config: StyleConfig) -> Comparison:
    """Two policies' answers (schema `completion`) to the prompts that both answered, clustered by character. Columns
    `spoken` and `wanted`, where a table has them, are the languages of each answer and of its user."""
    shared = np.intersect1d(_column(a, "prompt_id").astype(str), _column(b, "prompt_id").astype(str))
    sides = []
    for name, table in ((name_a, a), (name_b, b)):
        table = table.filter(pa.array(np.isin(_column(table, "prompt_id").astype(str), shared)))
        side = _side(name, table, "character_id")
        if {"spoken", "wanted"} <= set(table.column_names):
            side = side._replace(language=table["spoken"].combine_chunks(), wanted=table["wanted"].combine_chunks())
        sides.append(side)
    return compare(f"{name_a}_vs_{name_b}", sides[0], sides[1], config)


def _judge(effects: Mapping[str, Effect], config: StyleConfig) -> list[Finding]:
    tested = [name for name, found in effects.items() if found.p is not None]
    p = [effects[name].p or 0.0 for name in tested]
    adjusted = dict(zip(tested, zip(holm(p), benjamini_hochberg(p), strict=True), strict=True))
    findings = []
    for name, found in effects.items():
        p_holm, q = adjusted.get(name, (None, None))
        bound = config.bound(name)
        findings.append(
            Finding(name, FEATURES[name].kind, found, p_holm, q, bound, _status(found, p_holm, bound, config))
        )
    return findings


def _status(found: Effect, p_holm: float | None, bound: float, config: StyleConfig) -> Status:
    if min(found.n_a, found.n_b) < config.least or found.difference is None:
        return "unknown"
    # No variance and a difference: every response of one side has the feature to the same degree, none of the other's.
    certain = found.low is not None and found.low == found.high != 0
    if p_holm is None and not certain:
        return "unknown"
    large = found.size is not None and abs(found.size) > bound
    return "drift" if large and (certain or (p_holm is not None and p_holm <= config.alpha)) else "ok"


def _history_borne(
    names: Sequence[str], sides: Mapping[str, tuple[Side, dict[str, FloatArray]]], alpha: float
) -> dict[str, dict[str, Any]]:
    """Sec. 3.5.6: the feature in the assistant turns before, and the slope of the response's on it."""
    result: dict[str, dict[str, Any]] = {name: {} for name in names}
    for side_name, (side, found) in sides.items():
        if side.history is None:
            continue
        before, rows = _before(side.history, names)
        counts = np.bincount(rows, minlength=len(side.response))
        for name, values in before.items():
            known = ~np.isnan(values)
            sums = np.bincount(rows[known], values[known], len(side.response))
            seen = np.bincount(rows[known], minlength=len(side.response))
            mean = np.where(seen > 0, sums / np.maximum(seen, 1), np.nan)
            carried: Slope = slope(mean, found[name], side.cluster, alpha)
            result[name][side_name] = {
                "prevalence": float(np.nanmean(mean)) if (seen > 0).any() else None,
                "histories": int((counts > 0).sum()), **carried._asdict(),
            }  # fmt: skip
    return {name: row for name, row in result.items() if row}


def _before(history: pa.ChunkedArray, names: Sequence[str]) -> tuple[dict[str, FloatArray], npt.NDArray[np.int64]]:
    """Features of every assistant turn in the histories, and the row that each came from."""
    found, rows, start = [], [], 0
    for chunk in chunks(history):
        exchange, own = history_exchange(chunk)
        found.append(measure(exchange, names))
        rows.append(own + start)
        start += len(chunk)
    return {name: np.concatenate([part[name] for part in found]) for name in names}, np.concatenate(rows)


def _sentence(comparison: Comparison, finding: Finding) -> str:
    found = finding.effect
    scale, unit = (100, " %") if finding.kind == "binary" else (1, "")
    a, b = ((value or 0.0) * scale for value in (found.a, found.b))
    return (
        f"{comparison.name}: {finding.name} is {a:.3g}{unit} in {comparison.a}, {b:.3g}{unit} in {comparison.b} "
        f"(effect {found.size or 0.0:+.2f}, bound {finding.bound:g})"
    )


def _side(name: str, table: pa.Table, cluster: str, response: str = "text") -> Side:
    return Side(name, table[response].combine_chunks(), table["turns"], _column(table, cluster))


def _column(table: pa.Table, name: str) -> npt.NDArray[np.object_]:
    return np.asarray(table[name].to_numpy(zero_copy_only=False), dtype=object)


def alerts(comparisons: Sequence[Comparison]) -> list[str]:
    """Every alert of several comparisons, in words."""
    return [alert for comparison in comparisons for alert in comparison.alerts]
