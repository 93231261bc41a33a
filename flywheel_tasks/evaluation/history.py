"""What is known of every version (Table 10), read from a store or from a CSV in the columns of Table 10."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.evaluation.gate_config import Band, GateConfig


class Number(NamedTuple):
    """A value with its interval, where it has one. Shares are between 0 and 1, lifts are percentages."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    why: str = ""
    """Why it may be looked at but not decide; empty where it may."""


@dataclass(frozen=True)
class Version:
    """One version; what was not measured is not there."""

    name: str
    date: str = ""
    """Of its release, where it was released."""
    numbers: Mapping[str, Number] = field(default_factory=dict)
    before: Mapping[str, Number] = field(default_factory=dict)
    """The champion's numbers on the same prompts."""
    decision: str | None = None
    reasons: tuple[str, ...] = ()
    outcome: str | None = None
    released: bool = True
    """Whether it became champion and was not rolled back; only then its lift counts in the cumulative growth."""
    candidate: str | None = None
    champion: str | None = None
    win_rate: Band = GateConfig().win_rate
    win_rate_ideal: float = GateConfig().win_rate_ideal
    """What its gate judged win-rates by, and the target that it named; the defaults where no gate is known."""
    lift_level: float | None = None
    """Confidence of the A/B test's intervals, where it is known."""


class Row(NamedTuple):
    """A row of Table 10. `good` says which direction is an improvement; most rows are shares, and most columns of the
    paper's table are called as the row is, with _pct."""

    name: str
    label: str
    good: str = ""
    unit: str = "share"
    named: str = ""

    @property
    def column(self) -> str:
        """What the paper's table calls it."""
        return self.named or f"{self.name}_pct"


ENGAGEMENT = (
    Row("breadth", "Engagement breadth lift", "up", "lift", "breadth_lift_pct"),
    Row("depth", "Engagement depth lift", "up", "lift", "depth_lift_pct"),
)
COMPARISON = (
    Row("human_win_vs_baseline", "Human win rate vs baseline", "up", named="human_win_vs_gpt4o_pct"),
    Row("human_win_rate", "Human win rate vs previous", "up", named="human_win_vs_previous_pct"),
    Row("pointwise_internal", "Pointwise RM win rate (internal)", "band", named="rm_pointwise_internal_win_pct"),
    Row("pointwise_user", "Pointwise RM win rate (user)", "band", named="rm_pointwise_user_win_pct"),
    Row("pairwise_user", "Pairwise RM win rate (user)", "band", named="rm_pairwise_user_win_pct"),
)
CHARACTERISTICS = (
    Row("false_refusal_internal", "False refusal (internal)", "down"),
    Row("false_refusal_user", "False refusal (user)", "down"),
    Row("cooperative_ratio", "Cooperative ratio", "up"),
    Row("average_length", "Avg. response length (tokens)", unit="tokens", named="avg_response_tokens"),
    Row("contains_list", "Contains list"),
    Row("contains_emoji", "Contains emoji"),
    Row("positive_sentiment", "Positive sentiment", "up"),
    Row("preachy_tone", "Preachy tone", "down"),
    Row("non_preachy_rate", "Non-preachy rate", "up", named="non_preachy_pct"),
    Row("instruction_violation", "Instruction violation", "down"),
    Row("wall_of_text", "Wall-of-text failure", "down"),
    Row("templated_responses", "Templated responses", "down", named="templated_pct"),
)
"""In the order of Figure 10: false refusal and cooperation, formatting, tone, quality."""
BENCHMARKS = (
    Row("math", "MATH", "up"),
    Row("gsm8k", "GSM8K", "up"),
    Row("mbpp", "MBPP", "up"),
    Row("humaneval", "HumanEval", "up"),
    Row("hellaswag", "HellaSwag", "up"),
    Row("mmlu", "MMLU", "up"),
    Row("arc_challenge", "ARC Challenge", "up"),
    Row("arc_easy", "ARC Easy", "up"),
    Row("gpqa", "GPQA", "up"),
    Row("ifeval", "IFEval", "up"),
)
GROUPS: dict[str, tuple[Row, ...]] = {
    "User engagement": ENGAGEMENT,
    "Comparison": COMPARISON,
    "Response characteristics": CHARACTERISTICS,
    "Language match rates": (),
    "Technical benchmarks": BENCHMARKS,
}
"""Table 10's sections; rows that a history has beyond these are added to the section of their kind."""
LANGUAGE = "language_match:"
LINES = ("win_rate", "win_rate_ideal")


def groups(versions: list[Version]) -> dict[str, tuple[Row, ...]]:
    """Table 10's rows that any version has a number for."""
    known = {name for v in versions for name in v.numbers}
    languages = tuple(
        Row(name, name.removeprefix(LANGUAGE), "up") for name in sorted(known) if name.startswith(LANGUAGE)
    )
    rows = GROUPS | {"Language match rates": languages}
    named = {title: tuple(row for row in found if row.name in known) for title, found in rows.items()}
    return {title: found for title, found in named.items() if found}


def from_csv(path: Path) -> list[Version]:
    """A history in the columns of Table 10."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"history {path} cannot be read: {error}") from error
    if not rows or "version" not in rows[0]:
        raise InputError(f"history {path}: no column 'version': use the columns of Table 10")
    return [_of_row(row, f"{path}:{line}") for line, row in enumerate(rows, start=2)]


def _of_row(row: Mapping[str, str | None], where: str) -> Version:
    numbers = {}
    for known in (r for rows in GROUPS.values() for r in rows):
        value = _cell(row, known.column, where)
        if value is None:
            continue
        if known.unit == "share" and not 0 <= value <= 100:
            raise InputError(f"{where}: {known.column} {value:g} is not between 0 and 100")
        minus, plus = (_cell(row, f"{known.name}_ci_{side}", where) for side in ("minus", "plus"))
        scale = 0.01 if known.unit == "share" else 1.0
        low, high = (None, None) if minus is None or plus is None else ((value - minus) * scale, (value + plus) * scale)
        numbers[known.name] = Number(value * scale, low, high)
    return Version(row["version"] or "?", row.get("release_date") or "", numbers)


def _cell(row: Mapping[str, str | None], column: str, where: str) -> float | None:
    text = (row.get(column) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"{where}: {column} '{text[:40]}' is not a number") from error
    if not math.isfinite(value):
        raise InputError(f"{where}: {column} '{text[:40]}' is not a finite number")
    return value


def from_store(store: Store) -> list[Version]:
    """One version for each cycle of the store that measured anything."""
    versions = [of_cycle(store, cycle) for cycle in store.cycles()]
    return [v for v in versions if v.numbers or v.decision]


def of_cycle(store: Store, cycle: str) -> Version:
    """What is known of one cycle's candidate, its A/B test of later weeks included."""
    from flywheel_tasks.release.champion import EXPERIMENT
    from flywheel_tasks.release.ledger import read

    numbers, before, level = dict[str, Number](), dict[str, Number](), None
    state = read(store.storage)
    crowned = [entry.at for entry in state.entries if (entry.cycle, entry.action) == (cycle, "crown")]
    gate, promotion = store.pointed(cycle, "gate"), store.pointed(cycle, "promote")
    decision = gate.json("decision") if gate else {}
    for later in (c for c in store.cycles() if c >= cycle):
        if readout := store.pointed(later, "readout"):
            found = readout.json("readout")
            tested = (found.get("candidate") or {}).get("artifact")
            mine = tested is not None and tested == decision.get("candidate", tested)
            if mine and found.get("status") == "closed" and found.get("experiment") == f"{EXPERIMENT}{cycle}":
                numbers |= _lifts(found)
                level = 1 - found["alpha"] if "alpha" in found else None
    for stage, take in READ.items():
        if artifact := store.pointed(cycle, stage):
            take(artifact, numbers, before)
    config = gate.manifest.config if gate else {}
    judged = GateConfig.model_validate({name: config[name] for name in LINES if name in config})
    return Version(
        name=cycle,
        date=f"{crowned[-1]:%Y-%m-%d}" if state.released(cycle) else "",
        numbers=numbers,
        before=before,
        decision=decision.get("decision"),
        reasons=tuple(decision.get("reasons", ())),
        outcome=promotion.json("promotion")["outcome"] if promotion else None,
        released=state.released(cycle),
        candidate=decision.get("candidate"),
        champion=decision.get("champion"),
        win_rate=judged.win_rate,
        win_rate_ideal=judged.win_rate_ideal,
        lift_level=level,
    )


def _lifts(readout: Mapping[str, Any]) -> dict[str, Number]:
    arms: Mapping[str, Any] = readout.get("comparisons", {})
    arm: Mapping[str, Any] = arms.get("test") or next(iter(arms.values()), {})
    found = {}
    for name in ("breadth", "depth"):
        lift = arm.get(name) or {}
        if lift.get("lift_pct") is not None:
            low, high = (lift.get("lift_pct_bounds") if lift.get("kind") == "bounded" else None) or (None, None)
            found[name] = Number(lift["lift_pct"], low, high)
    return found


def _number(found: Mapping[str, Any], key: str) -> Number | None:
    value = found.get(key)
    if value is None:
        return None
    why = "" if found.get("can_gate", True) else str(found.get("why") or "its judge can't gate")
    return Number(float(value), found.get("low"), found.get("high"), found.get("n"), why)


def _win_rates(artifact: Artifact, numbers: dict[str, Number], before: dict[str, Number]) -> None:
    for name, found in artifact.json("winrate")["rm_win_rate"].items():
        numbers[name] = Number(found["rate"], found["low"], found["high"], found["n"])


def _metrics(artifact: Artifact, numbers: dict[str, Number], before: dict[str, Number]) -> None:
    policies = artifact.json("metrics")["policies"]
    for policy, into in (("candidate", numbers), ("champion", before)):
        for name, found in policies.get(policy, {}).items():
            if number := _number(found, "value"):
                into[name] = number


def _benchmarks(artifact: Artifact, numbers: dict[str, Number], before: dict[str, Number]) -> None:
    for name, found in artifact.json("benchmarks")["benchmarks"].items():
        for policy, into in (("candidate", numbers), ("champion", before)):
            if number := _number(found.get(policy) or {}, "rate"):
                into[name] = number


def _human(artifact: Artifact, numbers: dict[str, Number], before: dict[str, Number]) -> None:
    if number := _number(artifact.json("evidence").get("human_win_rate") or {}, "rate"):
        numbers["human_win_rate"] = number


READ: dict[str, Callable[[Artifact, dict[str, Number], dict[str, Number]], None]] = {
    "winrate": _win_rates,
    "metrics": _metrics,
    "benchmarks": _benchmarks,
    "gate": _human,
}
