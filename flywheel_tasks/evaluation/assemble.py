"""From what the stages of a cycle measured to the gate's evidence; what was to be measured and was not is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from flywheel_tasks.core import problems
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation.evidence import REWARD_MODELS, Evidence, Metrics, parse

Json = Mapping[str, Any]
GATING_METRICS = tuple(Metrics.model_fields)
BY_PEOPLE = ("red_team", "safety", "human_win_rate")
"""Sections that come from outside the pipeline, as JSON files."""


def assemble(sections: Mapping[str, Any], given: Mapping[str, bytes], **names: Any) -> Evidence:
    """Evidence from the outputs of `winrate`, `metrics`, `style`, `benchmarks`, `respond`, the reward models' reports
    and people's side-by-side comparisons, and from files in which people hand in the rest."""
    body: dict[str, Any] = {name: value for name, value in names.items() if value is not None}
    unmeasured: dict[str, str] = {}
    for name, read in READERS.items():
        if name in sections:
            read(sections[name], body, unmeasured)
    for where, data in sorted(given.items()):
        _hand_in(body, unmeasured, where, data)
    try:
        return Evidence.model_validate(body | {"unmeasured": unmeasured})
    except ValidationError as error:
        at, what = problems.first(error, Evidence)
        raise InputError(f"the stages' reports give no evidence: {at}: {what}{problems.given(error)}") from None


def _win_rates(report: Json, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
    rates = {name: _rate(found) for name, found in report["rm_win_rate"].items() if name in REWARD_MODELS}
    if rates:
        body["rm_win_rate"] = rates
    unmeasured |= {f"rm_win_rate.{name}": why for name, why in report["unmeasured"].items()}


def _metrics(report: Json, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
    """A metric whose judge can't gate is shown and does not decide; one that has no number is a gap."""
    new, old = (report["policies"].get(policy, {}) for policy in ("candidate", "champion"))
    found: dict[str, Any] = {}
    for name in GATING_METRICS:
        sides = {"candidate": new.get(name), "champion": old.get(name)}
        empty = [side for side, value in sides.items() if not value or value.get("value") is None or not value.get("n")]
        trusted = all(value is None or value.get("can_gate", True) for value in sides.values())
        if not empty:
            change: dict[str, Any] = {side: _rate(value, "value") for side, value in sides.items() if value}
            if not trusted:
                change["unusable"] = str(next(v.get("why") for v in sides.values() if v) or "its judge can't gate")
            found[name] = change
        else:
            why = next(
                (str(value["why"]) for value in sides.values() if value and value.get("why")), "it has no number"
            )
            unmeasured[f"metrics.{name}"] = f"{why} ({', '.join(empty)})"
    if found:
        body["metrics"] = found


def _style(report: Any, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
    comparisons = report if isinstance(report, list) else report.get("comparisons", [])
    mine = [c for c in comparisons if {str(c.get("a")), str(c.get("b"))} == {"candidate", "champion"}]
    if not mine:
        unmeasured["style_drift"] = "the style monitor did not compare candidate and champion"
        return
    drift = {f["name"]: _drift(f) for f in mine[0]["features"]}
    if drift:
        body["style_drift"] = drift
    else:
        unmeasured["style_drift"] = "the style monitor compared no feature"


def _drift(feature: Json) -> dict[str, Any]:
    effect, n = feature.get("effect"), int(feature.get("n") or 0)
    found: dict[str, Any] = {"n": n, "alert": feature["status"] == "drift"}
    if effect is not None:
        found["distance"] = abs(float(effect))
    if feature["status"] == "unknown" or effect is None or not n:
        found["unusable"] = (
            f"the style monitor measured it in {n} responses of each side, too few or all of one character"
        )
    return found


def _benchmarks(report: Json, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
    found = {}
    for name, result in report["benchmarks"].items():
        if result.get("candidate") and result.get("champion"):
            found[name] = {side: _rate(result[side]) for side in ("candidate", "champion")}
        else:
            unmeasured[f"benchmarks.{name}"] = str(result.get("why") or "no number for both models")
    for name in report.get("skipped", ()):
        unmeasured[f"benchmarks.{name}"] = "it has files, but runs what a model wrote, and benchmarks.run_code is off"
    if found:
        body["benchmarks"] = found


def _responses(report: Json, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
    overlap = report.get("overlap")
    if overlap is None:
        unmeasured["overlap"] = "respond did not compare its prompts with training data"
    else:
        body["overlap"] = {
            "prompts": overlap["prompts"],
            "leaked": overlap["leaked"],
            "examples": [str(example)[:200] for example in overlap.get("examples", [])][:20],
        }


def _human(report: Json, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
    body["human_win_rate"] = _rate(report)


def _reward_model(name: str) -> Callable[[Json, dict[str, Any], dict[str, str]], None]:
    def read(report: Json, body: dict[str, Any], unmeasured: dict[str, str]) -> None:
        """The first version has no old batch, which is no gap."""
        lost = [
            {field: drop[field] for field in ("batch", "mode", "n", "drop", "low", "high")}
            for drop in report["lost_on_old_batches"]
        ]
        body.setdefault("reward_models", {})[name] = {
            "version": report["version"],
            "accuracy": _rate(report["overall"]["model"], "accuracy"),
            "lost_on_old_batches": lost,
        }

    return read


READERS: dict[str, Callable[[Any, dict[str, Any], dict[str, str]], None]] = {
    "winrate": _win_rates,
    "metrics": _metrics,
    "style": _style,
    "benchmarks": _benchmarks,
    "respond": _responses,
    "human": _human,
    "preference-pointwise": _reward_model("pointwise"),
    "preference-pairwise": _reward_model("pairwise"),
}


def _hand_in(body: dict[str, Any], unmeasured: dict[str, str], where: str, data: bytes) -> None:
    """People's evidence may add what the pipeline can't measure; it may not replace what it did. What was measured of
    another candidate is no evidence of this one, and a gap."""
    found = parse(data, where).model_dump(mode="json", exclude_unset=True)
    dates, about = found.pop("measured_at", {}), found.pop("candidate", None)
    for section in [*found, *dates]:
        if section not in BY_PEOPLE:
            raise InputError(
                f"{where}: '{section}' is measured by the pipeline; a file may give {', '.join(BY_PEOPLE)}"
            )
    for section, value in found.items():
        if section in body:
            raise InputError(f"{where}: '{section}' is handed in twice: keep one file for each")
        if section != "red_team" and about is None:
            raise InputError(f"{where}: whose '{section}' is it? say it in 'candidate', as STAGE/KEY")
        if about is not None and about != body.get("candidate"):
            unmeasured[section] = f"{where} is about {about}, the candidate is {body.get('candidate') or 'not named'}"
        else:
            body[section] = value
    taken = {section: at for section, at in dates.items() if section in body}
    body["measured_at"] = {**(body.get("measured_at") or {}), **taken}


def _rate(found: Json, key: str = "rate") -> dict[str, Any]:
    rate = {"rate": float(found[key]), "n": int(found["n"])}
    if found.get("low") is not None and found.get("high") is not None:
        # A percentile interval of a skewed statistic need not hold the point estimate.
        rate |= {"low": min(float(found["low"]), rate["rate"]), "high": max(float(found["high"]), rate["rate"])}
    return rate


def plain(evidence: Evidence) -> dict[str, Any]:
    """The evidence as JSON without the dates that differ between two runs of the same work."""
    found: dict[str, Any] = json.loads(evidence.model_dump_json(exclude_none=True))
    for name in ("measured_at", "candidate_made_at"):
        found.pop(name, None)
    return found
