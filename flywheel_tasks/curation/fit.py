"""Fits the embedded classifiers from labelled texts: `python -m flywheel_tasks.curation.fit --data DIR --out DIR`.

Writes one safetensors file of 8-bit weights and one JSON card per classifier (sources, sizes, held-out numbers). Only
the `train` half of each set is used; the threshold comes from cross-validation inside that half.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GroupKFold

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.curation import labelled
from flywheel_tasks.curation.labelled import Labelled
from flywheel_tasks.curation.ngrams import FloatArray, LinearModel, features, probabilities, save

BoolArray = npt.NDArray[np.bool_]
LICENCES = {
    "openai_moderation": "openai/moderation-api-release, MIT",
    "surge_toxicity": "surge-ai/toxicity, MIT",
    "davidson_hate": "t-davidson/hate-speech-and-offensive-language, MIT",
    "hatecheck": "paul-rottger/hatecheck-data, CC-BY-4.0",
    "hatecheck_hindi": "rewire-online/multilingual-hatecheck, CC-BY-4.0",
    "hatecheck_spanish": "rewire-online/multilingual-hatecheck, CC-BY-4.0",
    "hh_harmless": "anthropics/hh-rlhf (red-team openings, weak label), MIT",
    "hinglish_top": "google-research-datasets/Hinglish-TOP-Dataset, Apache-2.0",
    "hinglish_top_en": "google-research-datasets/Hinglish-TOP-Dataset, Apache-2.0",
    "lingua": "pemistahl/lingua test data, Apache-2.0",
    "wordless": "the project's own list and the names of emoji",
    "truthfulqa": "sylinrl/TruthfulQA, Apache-2.0",
    "ifeval": "google-research instruction_following_eval, Apache-2.0",
    "topical_chat": "alexa/Topical-Chat, CDLA-Sharing-1.0",
    "xpersona": "HLTCHKUST/Xpersona, MIT",
}


class Task(NamedTuple):
    """What one classifier is trained on, and the shape of its features."""

    read: Callable[[Path], Iterable[Labelled]]
    bits: int
    orders: tuple[int, ...]
    words: bool
    false_positives: float
    """The threshold lets through at most this share of everyday text (or, without any, of all negatives)."""


TASKS: dict[str, Task] = {
    "safety": Task(labelled.safety, 18, (3, 4, 5), True, 0.01),
    "hindi": Task(labelled.romanised_hindi, 15, (2, 3, 4), True, 0.005),
    "hindi_word": Task(labelled.hindi_words, 14, (2, 3, 4), True, 0.05),
}
WINDOW = 300
_EVERYDAY = ("xpersona", "topical_chat", "hinglish_top", "lingua", "truthfulqa", "ifeval")


def fit(task: Task, items: Sequence[Labelled]) -> tuple[LinearModel, float]:
    """The model, and the regularisation strength that cross-validation chose."""
    matrix, labels = _matrix(task, items), np.array([item.positive for item in items])
    weights = _balance(items)
    groups = np.unique([item.group for item in items], return_inverse=True)[1]
    held_out: dict[float, FloatArray] = {}
    for strength in (16.0,):
        scores = np.zeros(len(items))
        for inside, outside in GroupKFold(3).split(matrix, labels, groups):
            fold = _logistic(strength).fit(matrix[inside], labels[inside], sample_weight=weights[inside])
            scores[outside] = fold.predict_proba(matrix[outside])[:, 1]
        held_out[strength] = scores
    best = max(held_out, key=lambda s: _mean_precision(items, labels, held_out[s]))
    model = _logistic(best).fit(matrix, labels, sample_weight=weights)
    chat = np.array([item.source.startswith(_EVERYDAY) for item in items])
    negatives = held_out[best][chat & ~labels if (chat & ~labels).any() else ~labels]
    threshold = float(max(np.quantile(negatives, 1 - task.false_positives), 0.05))
    linear = LinearModel(
        model.coef_[0].astype(np.float32), float(model.intercept_[0]), task.orders, task.words, WINDOW, threshold
    )
    return linear, best


def measure(model: LinearModel, items: Sequence[Labelled]) -> dict[str, dict[str, float]]:
    """Precision, recall, false-positive rate, accuracy and average precision for every source."""
    scores = probabilities(model, pa.array([item.text for item in items], pa.string()))
    rows: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        rows[item.source].append(index)
    labels = np.array([item.positive for item in items])
    report = {source: _numbers(labels[at], scores[at], model.threshold) for source, at in rows.items()}
    return report | {"all": _numbers(labels, scores, model.threshold)}


def nested(task: Task, items: Sequence[Labelled], folds: int = 5) -> dict[str, dict[str, float]]:
    """The numbers of the whole procedure, threshold and all, on texts that no part of it has seen: each fold of the
    groups is judged by a model that was fitted, and whose threshold was chosen, on the others."""
    groups = np.unique([item.group for item in items], return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(int(groups.max()) + 1)
    reports = []
    for fold in range(folds):
        outside = order[groups] % folds == fold
        model, _ = fit(task, [item for item, out in zip(items, outside, strict=True) if not out])
        reports.append(measure(model, [item for item, out in zip(items, outside, strict=True) if out]))
    return {source: _averaged([r[source] for r in reports if source in r]) for source in sorted(set().union(*reports))}


def _averaged(numbers: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums of rows, means of rates."""
    found = {}
    for name in sorted(set().union(*numbers)):
        values = [n[name] for n in numbers if name in n]
        found[name] = round(sum(values) if name in ("rows", "positive") else sum(values) / len(values), 4)
    return found


def _numbers(labels: BoolArray, scores: FloatArray, threshold: float) -> dict[str, float]:
    flagged = scores >= threshold
    hits = int((flagged & labels).sum())
    numbers: dict[str, float] = {
        "rows": len(labels), "positive": int(labels.sum()), "accuracy": float((flagged == labels).mean()),
    }  # fmt: skip
    if labels.any():
        numbers |= {"recall": hits / int(labels.sum()), "precision": hits / max(int(flagged.sum()), 1)}
    if not labels.all():
        numbers["false_positive_rate"] = float(flagged[~labels].mean())
    if labels.any() and not labels.all():
        numbers["average_precision"] = float(average_precision_score(labels, scores))
    return {name: round(value, 4) for name, value in numbers.items()}


def _logistic(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, solver="liblinear", max_iter=300, random_state=0)


def _matrix(task: Task, items: Sequence[Labelled]) -> sparse.csr_matrix:
    found = features(pa.array([item.text for item in items], pa.string()), task.bits, task.orders, task.words)
    count = np.bincount(found.rows, minlength=len(items))
    values = 1 / np.sqrt(np.maximum(count, 1))[found.rows]
    return sparse.csr_matrix((values, (found.rows, found.columns)), shape=(len(items), 1 << task.bits))


def _balance(items: Sequence[Labelled]) -> FloatArray:
    """Each source counts by the square root of its size, so that the largest does not decide alone."""
    sizes: dict[tuple[str, bool], int] = defaultdict(int)
    for item in items:
        sizes[item.source, item.positive] += 1
    weights = np.array([1 / np.sqrt(sizes[item.source, item.positive]) for item in items])
    return weights / weights.mean()


def _mean_precision(items: Sequence[Labelled], labels: BoolArray, scores: FloatArray) -> float:
    """Average precision within each source that has both labels, averaged; over everything where none has."""
    sources = np.array([item.source for item in items])
    inside = [sources == name for name in np.unique(sources)]
    both = [at for at in inside if 0 < labels[at].sum() < at.sum()] or [np.ones(len(labels), bool)]
    return float(np.mean([average_precision_score(labels[at], scores[at]) for at in both]))


def train(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Fit, store and measure one classifier; returns its card."""
    items = list(TASKS[name].read(data))
    halves = {half: [item for item in items if labelled.half_of(item) == half] for half in ("train", "test")}
    model, strength = fit(TASKS[name], halves["train"])
    out.mkdir(parents=True, exist_ok=True)
    stored = save(model, out / f"{name}.safetensors")
    unseen = list(labelled.unseen(data)) if name == "safety" else []
    card = {
        "classifier": name,
        "trained_on": dict(_sources(halves["train"])),
        "features": {"orders": list(model.orders), "words": model.words, "columns": len(model.weights)},
        "regularisation_C": strength,
        "threshold": stored.threshold,
        "held_out_half": measure(stored, halves["test"]),
        "never_trained_on": measure(stored, unseen) if unseen else {},
    }
    (out / f"{name}.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")
    return card


def _sources(items: Sequence[Labelled]) -> Iterator[tuple[str, dict[str, Any]]]:
    for source in sorted({item.source for item in items}):
        licence = LICENCES.get(source) or LICENCES[source.split("_")[0]]
        yield source, {"licence": licence, "rows": sum(item.source == source for item in items)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled sets, one sub-folder each")
    parser.add_argument("--out", type=Path, help="folder for the weights and cards")
    parser.add_argument("--only", choices=sorted(TASKS), help="fit one classifier instead of all")
    parser.add_argument("--nested", type=int, metavar="FOLDS", help="only print what nested cross-validation finds")
    options = parser.parse_args(arguments)
    try:
        for name in ([options.only] if options.only else TASKS) if options.nested else ():
            task = TASKS[name]
            print(json.dumps({name: nested(task, list(task.read(options.data)), options.nested)}, indent=1))
        if options.nested:
            return 0
        if options.out is None:
            parser.error("give --out, the folder for the weights and cards")
        for name in [options.only] if options.only else TASKS:
            card = train(name, options.data, options.out)
            print(json.dumps({name: card["held_out_half"]}, indent=1))
    except FlywheelError as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
