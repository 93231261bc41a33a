"""Table 9: what annotation agreement does to a preference model (Sec. 3.4.1).

The same reviews give three training sets; each model, and one that was not trained, is measured on held-out pairs with
one random label each and on those where all reviewers agreed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.annotation import collect
from flywheel_tasks.annotation.table9 import ROWS, Evaluation, Key, Training, table9
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import without
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.models.chat import Card, Template
from flywheel_tasks.models.score import Scorer
from flywheel_tasks.preherding import accuracy
from flywheel_tasks.preherding.measure import Kind, margins
from flywheel_tasks.preherding.preference_config import PreferenceConfig
from flywheel_tasks.stats import winrate
from flywheel_tasks.training import preference
from flywheel_tasks.training.encode import with_card
from flywheel_tasks.training.learn import fit

EVALUATIONS: tuple[Evaluation, ...] = ("single_random", "multi_agree")


class Sets(NamedTuple):
    """The variants that are trained on, and the held-out pairs of the evaluation sets."""

    train: dict[str, pa.Table]
    held_out: dict[Evaluation, pa.Table]


def sets(inputs: Inputs, cards: Mapping[str, Card], seed: int) -> Sets:
    """What the reviews give; refused where Table 9 would have a hole."""
    found = collect.variants(*reviews(inputs), seed)
    train = {name: _of(pairs, "train") for name, pairs in found.items()}
    held_out = {name: with_card(_of(found[name], "eval"), cards, "preference_id")[0] for name in EVALUATIONS}
    for what, tables in (("held-out pair", held_out), ("pair to train on", train)):
        if empty := [name for name, pairs in tables.items() if not pairs.num_rows]:
            raise InputError(f"Table 9: no {what} is in '{empty[0]}': import more reviews, or set variants=false")
    return Sets(train, held_out)


def measure(
    kind: Kind,
    sets: Sets,
    cards: Mapping[str, Card],
    base: Path,
    template: Template,
    config: PreferenceConfig,
    out: Output,
) -> dict[str, Any]:
    """Train on each variant and measure it on both evaluation sets; the paper's rows, with intervals beside."""
    accuracies: dict[Key, float] = {}
    intervals: list[dict[str, Any]] = []
    for name in ROWS:
        with _model(name, kind, sets.train, cards, base, template, config, out) as folder:
            scorer = Scorer(folder, max_tokens=config.max_tokens)
            for on, pairs in sets.held_out.items():
                margin = margins(kind, scorer, pairs, cards)
                fits = np.isfinite(margin)
                if not fits.any():
                    raise InputError(f"Table 9: no pair of '{on}' fits in max_tokens={config.max_tokens}: raise it")
                outcomes = winrate.compare(margin[fits], np.zeros(int(fits.sum())))
                share = accuracy.overall(pairs.filter(pa.array(fits)), outcomes, seed=out.seed)
                accuracies[name, kind, on] = share["accuracy"]
                intervals.append({"training": name, "evaluation": on, **share})
    rows = table9({name: pairs.num_rows for name, pairs in sets.train.items()}, accuracies)  # type: ignore[misc]
    return {"rows": [row._asdict() for row in rows], "intervals": intervals}


def reviews(inputs: Inputs) -> tuple[pa.Table, pa.Table]:
    """Annotations and tasks without those of forgotten users."""
    annotations, tasks = inputs.get("annotations"), inputs.get("tasks")
    if annotations is None or tasks is None:
        raise InputError("Table 9 needs the reviews: run annotate-import, or set variants=false")
    kept, _ = without(annotations.read(), inputs.forgotten, "annotation_id")
    return kept, without(tasks.read(), inputs.forgotten, "task_id")[0]


@contextmanager
def _model(
    name: Training,
    kind: Kind,
    learn: Mapping[str, pa.Table],
    cards: Mapping[str, Card],
    base: Path,
    template: Template,
    config: PreferenceConfig,
    out: Output,
) -> Iterator[Path]:
    """The model of a variant in a folder of its own; the baseline is the base with a head that learned nothing."""
    with tempfile.TemporaryDirectory(prefix="flywheel-table9-") as scratch:
        folder = Path(scratch)
        if name == "baseline":
            from flywheel_tasks.models.checkpoint import save_scorer
            from flywheel_tasks.models.heads import load_scorer

            save_scorer(load_scorer(base, kind=kind, seed=out.seed), template.tokenizer, folder)
        else:
            encoded = preference.encode(learn[name], cards, template, kind=kind, max_tokens=config.max_tokens)
            task = preference.task(base, kind=kind, lora=config.lora, seed=out.seed, max_tokens=config.max_tokens)
            fit(task, [encoded.table], config, out, f"table9-{name}")[1].fetch(folder)
        yield folder


def _of(pairs: pa.Table, split: str) -> pa.Table:
    return pairs.filter(pc.equal(pairs["split"], split))
