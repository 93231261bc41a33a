"""Table 4's metrics, language match and Table 7's failure rates: what each counts, on which prompts, and by whom.

A value is a mean over responses with a cluster-bootstrap interval, because responses of one character are alike. Of no
response there is no value: a metric with n = 0 says why it has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.evaluation.agreement import Agreement
from flywheel_tasks.evaluation.versus import SETS
from flywheel_tasks.stats.winrate import cluster_bootstrap
from flywheel_tasks.style import features
from flywheel_tasks.style.features import Exchange

FloatArray = npt.NDArray[np.float64]
PromptSet = Literal["internal", "user", "all"]
SOURCES: dict[str, str] = {source: name for name, source in SETS.items()}
"""Where a prompt's traffic came from → Table 4's prompt set."""


@dataclass(frozen=True)
class Metric:
    """One number of a policy: the mean of `column` over the responses to one set of prompts."""

    name: str
    prompts: PromptSet
    by: Literal["rule", "judge"]
    column: str
    unit: Literal["share", "tokens"] = "share"


TABLE4 = (
    Metric("average_length", "user", "rule", "tokens", "tokens"),
    Metric("contains_list", "internal", "rule", "has_list"),
    Metric("contains_emoji", "internal", "rule", "has_emoji"),
    Metric("positive_sentiment", "internal", "judge", "positive_sentiment"),
    Metric("instruction_violation", "internal", "judge", "instruction_violation"),
    Metric("cooperative_ratio", "internal", "judge", "cooperative_ratio"),
    Metric("non_preachy_rate", "internal", "judge", "non_preachy_rate"),
    Metric("templated_responses", "internal", "rule", "templated_response"),
    Metric("wall_of_text", "user", "rule", "wall_of_text"),
    Metric("preachy_tone", "internal", "judge", "preachy_tone"),
    Metric("false_refusal_internal", "internal", "judge", "false_refusal"),
    Metric("false_refusal_user", "user", "judge", "false_refusal"),
)
"""In the paper's order; false refusal is measured on both sets."""
TABLE7 = (
    Metric("infinity_loop", "all", "rule", "loop"),
    Metric("repetitive_phrases", "all", "rule", "repetitive_phrase"),
    Metric("broken_markdown", "all", "rule", "broken_markdown"),
    Metric("unrequested_translation", "all", "rule", "translation"),
)
LANGUAGE_MATCH = "language_match"


class Responses(NamedTuple):
    """The responses of one policy that came about, each with its prompt set and languages; `failed` did not."""

    table: pa.Table
    prompt_set: npt.NDArray[np.str_]
    language: pa.StringArray
    wanted: pa.StringArray
    failed: int


class Judgement(NamedTuple):
    """How far the judge is to be believed."""

    name: str
    agreement: Mapping[str, Agreement]
    least_agreement: float
    most_missing: float


def rule_columns(responses: Responses) -> dict[str, FloatArray]:
    """Every style feature of every response, and what Table 4 and Table 7 make of them."""
    table = responses.table
    history = table["turns"].combine_chunks()
    exchange = Exchange(table["text"].combine_chunks(), history, responses.language, responses.wanted)
    found = features.measure(exchange)
    cut = pc.equal(table["finish"], "length").to_numpy(zero_copy_only=False).astype(float)
    either = np.maximum
    derived = {
        "tokens": table["tokens"].to_numpy(zero_copy_only=False).astype(float),
        "cut_off": cut,
        # Table 7: a response that loops is often cut in the middle of its loop, or repeats itself up to the limit.
        "loop": either(found["infinity_loop"], cut * found["repetitive"]),
        "repetitive_phrase": either(found["overused_phrase"], either(found["repetitive"], found["templated_refusal"])),
        "templated_response": either(found["templated"], found["templated_refusal"]),
        "language_match": 1 - found["language_mismatch"],
    }
    return found | derived


def judge_columns(verdicts: Sequence[Mapping[str, bool] | None], names: Sequence[str]) -> dict[str, FloatArray]:
    """Verdicts as columns; NaN where there is none."""
    rows = [{} if verdict is None else verdict for verdict in verdicts]
    return {name: np.array([float(row.get(name, np.nan)) for row in rows], np.float64) for name in names}


def values(
    responses: Responses, columns: Mapping[str, FloatArray], judge: Judgement, seed: int
) -> dict[str, dict[str, Any]]:
    """Every metric of one policy, ready for JSON."""
    characters = responses.table["character_id"].to_numpy(zero_copy_only=False)
    found = {
        metric.name: _value(metric, columns.get(metric.column), _rows(metric, responses), characters, judge, seed)
        for metric in (*TABLE4, *TABLE7)
    }
    for name in features.FEATURES:
        if name.startswith("phrase:"):
            metric = Metric(name, "all", "rule", name)
            found[name] = _value(metric, columns[name], _rows(metric, responses), characters, judge, seed)
    return found | _language_match(responses, columns[LANGUAGE_MATCH], characters, judge, seed)


def _rows(metric: Metric, responses: Responses) -> npt.NDArray[np.bool_]:
    if metric.prompts == "all":
        return np.ones(len(responses.prompt_set), bool)
    return np.asarray(responses.prompt_set == metric.prompts)


def _language_match(
    responses: Responses, matched: FloatArray, characters: npt.NDArray[np.object_], judge: Judgement, seed: int
) -> dict[str, dict[str, Any]]:
    """LMR (Table 7): the share of responses in the language and script they answer; over all, and by language."""
    wanted = np.array([tag or "und" for tag in responses.wanted.to_pylist()], object)
    found = {}
    for tag in ["", *sorted({str(tag) for tag in wanted} - {"und"})]:
        name = f"{LANGUAGE_MATCH}:{tag}" if tag else LANGUAGE_MATCH
        rows = (wanted == tag) if tag else np.ones(len(wanted), bool)
        found[name] = _value(Metric(name, "all", "rule", LANGUAGE_MATCH), matched, rows, characters, judge, seed)
    return found


def _value(
    metric: Metric,
    column: FloatArray | None,
    rows: npt.NDArray[np.bool_],
    characters: npt.NDArray[np.object_],
    judge: Judgement,
    seed: int,
) -> dict[str, Any]:
    body: dict[str, Any] = {"set": metric.prompts, "by": metric.by, "unit": metric.unit}
    if column is None:
        return body | _absent(f"the judge '{judge.name}' does not measure it")
    if len(column) != len(rows):
        raise InputError(f"metric {metric.name}: {len(column)} values for {len(rows)} responses")
    known = rows & ~np.isnan(column)
    body["missing"] = int(rows.sum() - known.sum())
    if not known.any():
        return body | _absent(
            f"no response to {metric.prompts} prompts" if not rows.any() else "no response could be judged"
        )
    picked, clusters = column[known], characters[known]
    scale = float(picked.max()) if metric.unit == "tokens" and picked.max() > 0 else 1.0
    low, high = cluster_bootstrap(picked / scale, clusters, seed=seed)
    value = float(picked.mean())
    # A percentile interval of a skewed statistic need not hold the value; what is printed does.
    body |= {"value": value, "low": min(low * scale, value), "high": max(high * scale, value), "n": int(known.sum())}
    body["clusters"] = len(set(clusters))
    why = _why_not(metric, body, int(rows.sum()), judge)
    return body | {"can_gate": why is None} | ({"why": why} if why else {})


def _absent(why: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "n": 0, "why": why}


def _why_not(metric: Metric, body: Mapping[str, Any], asked: int, judge: Judgement) -> str | None:
    """Why a number may be looked at but not decide."""
    if metric.by == "rule":
        return None
    found = judge.agreement.get(metric.column)
    if found is None:
        return f"unvalidated: no human labels were compared with '{judge.name}'"
    if found.low < judge.least_agreement:
        return f"agreement with people too low: kappa {found.kappa:.2f} [{found.low:.2f}, {found.high:.2f}]"
    if body["missing"] > judge.most_missing * asked:
        return f"{body['missing']} of {asked} judgements are missing"
    return None
