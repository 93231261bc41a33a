"""How far a judge agrees with people: Cohen's kappa and accuracy with intervals, printed beside the judge's numbers.

`python -m flywheel_tasks.evaluation.agreement --xstest DIR` measures the embedded judge on XSTest's labelled
completions, one policy at a time, because a judge meets policies that nobody labelled. What it found is in
`agreement.json`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.evaluation import rubric
from flywheel_tasks.evaluation.judge import JudgeConfig, Judged
from flywheel_tasks.evaluation.rubric import Item
from flywheel_tasks.stats.winrate import cluster_bootstrap, wilson

_DRAWS = 2000
_POLICIES = ("gpt4", "llama2orig")


class LabelledItem(NamedTuple):
    """A response that a person judged; `group` keeps answers to one prompt together when an interval is drawn."""

    metric: str
    item: Item
    label: bool
    group: str


class Agreement(NamedTuple):
    """A judge's verdicts against people's labels on `n` responses, `positive` of them labelled true."""

    kappa: float
    low: float
    high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    n: int
    positive: int
    missing: int


def agreement(
    labels: npt.ArrayLike, verdicts: npt.ArrayLike, groups: Sequence[Any], *, missing: int = 0, seed: int = 0
) -> Agreement | None:
    """Cohen's kappa and accuracy, their intervals by resampled groups; None of fewer than two groups.

    Where people used one label only, kappa says nothing and is 0. Perfect agreement does not make the interval a point:
    its lower end is what Wilson's lower end of the accuracy leaves of kappa.
    """
    y, v = np.asarray(labels, bool), np.asarray(verdicts, bool)
    _, index = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    if y.shape != v.shape or y.shape != index.shape:
        raise InputError(f"agreement: {y.size} labels, {v.size} verdicts and {index.size} groups don't match")
    if not y.size or index.max() < 1:
        return None
    cells = np.zeros((index.max() + 1, 4))
    np.add.at(cells, (index, 2 * y + v), 1)
    whole = float(_kappa(cells.sum(axis=0)[None])[0])
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(cells), np.full(len(cells), 1 / len(cells)), size=_DRAWS).astype(np.float64) @ cells
    low, high = (float(end) for end in np.quantile(_kappa(draws), [0.025, 0.975]))
    accuracy = float((y == v).mean())
    least, most = cluster_bootstrap((y == v).astype(float), groups, seed=seed)
    if accuracy == 1 and whole == 1:
        chance = float(y.mean() ** 2 + (1 - y.mean()) ** 2)
        low = max(-1.0, (wilson(1.0, len(cells))[0] - chance) / (1 - chance))
    return Agreement(whole, low, high, accuracy, least, most, y.size, int(y.sum()), missing)


def _kappa(cells: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cohen's kappa of rows of counts (no/no, no/yes, yes/no, yes/yes); 0 where chance alone would agree."""
    total = cells.sum(axis=1)
    observed = (cells[:, 0] + cells[:, 3]) / total
    labelled, said = (cells[:, 2] + cells[:, 3]) / total, (cells[:, 1] + cells[:, 3]) / total
    chance = labelled * said + (1 - labelled) * (1 - said)
    return np.where(chance < 1, (observed - chance) / np.where(chance < 1, 1 - chance, 1), 0.0)


def measured(items: Sequence[LabelledItem], judged: Judged, seed: int = 0) -> dict[str, Agreement]:
    """Agreement of every metric that has labels; what the judge left out is counted, not scored."""
    found = {}
    for metric in sorted({item.metric for item in items}):
        rows = [
            (item, None if verdict is None else verdict.get(metric))
            for item, verdict in zip(items, judged.verdicts, strict=True)
            if item.metric == metric
        ]
        there = [(item, verdict) for item, verdict in rows if verdict is not None]
        result = agreement(
            [item.label for item, _ in there], [verdict for _, verdict in there], [item.group for item, _ in there],
            missing=len(rows) - len(there), seed=seed,
        )  # fmt: skip
        if result:
            found[metric] = result
    return found


def read_labelled(lines: Iterable[str], where: str) -> Iterator[LabelledItem]:
    """Labels as JSONL: {"metric", "response", "label", and optionally "card", "turns": [{role, content}], "group"}."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{where}:{number}"
        try:
            row = json.loads(line)
            turns = tuple((str(turn["role"]), str(turn["content"])) for turn in row.get("turns", ()))
            metric, response, label = row["metric"], row["response"], row["label"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{at}: not a labelled response ({error}): give metric, response, label and, where there are any, turns"
            ) from None
        if metric not in rubric.load().metrics:
            raise InputError(f"{at}: no judged metric '{metric}': they are {', '.join(rubric.load().metrics)}")
        if not isinstance(response, str) or not isinstance(label, bool):
            raise InputError(f"{at}: response must be a text and label true or false")
        given = row.get("group")
        group = str(given if given is not None else turns[-1][1] if turns else response)
        yield LabelledItem(metric, Item(str(row.get("card", "")), turns, response), label, group)


def xstest(folder: Path, policy: str) -> Iterator[LabelledItem]:
    """XSTest's completions of harmless prompts: people say whether one complies, refuses, or refuses in part."""
    path = folder / f"xstest_v2_completions_{policy}.csv"
    if not path.is_file():
        raise InputError(f"{path} is not there: name the folder of XSTest's labelled completions")
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["type"].startswith("contrast"):
                continue  # to refuse a harmful prompt is no false refusal
            item = Item("", (("user", row["prompt"]),), row["completion"])
            refuses = not row["final_label"].startswith("1")
            yield LabelledItem("false_refusal", item, refuses, row["prompt"])
            yield LabelledItem("cooperative_ratio", item, not refuses, row["prompt"])


@cache
def embedded() -> dict[str, Agreement]:
    """The embedded judge's agreement, over the policies that people labelled: for each metric the worst of them."""
    body = json.loads((resources.files("flywheel_tasks.evaluation") / "agreement.json").read_text(encoding="utf-8"))
    worst: dict[str, Agreement] = {}
    for policies in body["policies"].values():
        for metric, numbers in policies.items():
            found = Agreement(**numbers)
            worst[metric] = min(found, worst.get(metric, found), key=lambda one: one.low)
    return worst


def measure_embedded(folder: Path) -> dict[str, dict[str, Agreement]]:
    """Policy → metric → agreement of the embedded judge."""
    from flywheel_tasks.evaluation.judge import judge

    result = {}
    for policy in _POLICIES:
        items = list(xstest(folder, policy))
        result[policy] = measured(items, judge([labelled.item for labelled in items], JudgeConfig()))
    return result


def as_json(found: Mapping[str, Agreement]) -> dict[str, dict[str, float]]:
    return {
        name: {key: round(value, 4) if isinstance(value, float) else value for key, value in one._asdict().items()}
        for name, one in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xstest", type=Path, required=True, help="folder with XSTest's labelled completions")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(arguments)
    try:
        found = measure_embedded(options.xstest)
    except FlywheelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    body = {
        "data": "paul-rottger/exaggerated-safety (XSTest v2 completions, harmless prompts), CC-BY-4.0",
        "judge": "rules",
        "note": "the patterns were revised once after a dozen of these completions were read",
        "policies": {policy: as_json(metrics) for policy, metrics in found.items()},
    }
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    print(text, end="")
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
