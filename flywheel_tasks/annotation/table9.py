"""Table 9 (Sec. 3.4.1): what annotation agreement does to preference modelling, in the paper's layout.

Reward models are trained and evaluated elsewhere; this takes their accuracies as they come and leaves a gap where one
is missing, so that the table can be shown before, during and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Training = Literal["baseline", "multi_agree", "single_all", "single_random"]
Evaluation = Literal["single_random", "multi_agree"]
Model = Literal["pointwise", "pairwise"]

ROWS: dict[Training, str] = {
    "baseline": "Baseline (Not Trained)",
    "multi_agree": "Multi-Review (With Agreement)",
    "single_all": "Single-Review (All)",
    "single_random": "Single-Review (Random)",
}
COLUMNS: tuple[tuple[Model, Evaluation, str], ...] = (
    ("pointwise", "single_random", "Pointwise, Single (Rand)"),
    ("pointwise", "multi_agree", "Pointwise, Multi (Agree)"),
    ("pairwise", "single_random", "Pairwise, Single (Rand)"),
    ("pairwise", "multi_agree", "Pairwise, Multi (Agree)"),
)
Key = tuple[Training, Model, Evaluation]


class Row(NamedTuple):
    training: Training
    size: int
    """Preferences in the training set; the baseline has none."""
    accuracies: tuple[float | None, ...]
    """One for each of COLUMNS, from 0 to 1."""


def table9(sizes: Mapping[Training, int], accuracies: Mapping[Key, float] | None = None) -> list[Row]:
    """The rows of the table, from the sizes of the training sets and whatever accuracies are known."""
    known = accuracies or {}
    return [
        Row(name, sizes.get(name, 0), tuple(known.get((name, model, on)) for model, on, _ in COLUMNS)) for name in ROWS
    ]


def markdown(rows: Sequence[Row], evaluation_sizes: Mapping[Evaluation, int]) -> str:
    """The table as Markdown, accuracies in percent."""
    titles = [f"{title}, n = {evaluation_sizes[on]}" if on in evaluation_sizes else title for _, on, title in COLUMNS]
    lines = ["| Training data | Size | " + " | ".join(titles) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        cells = ["" if value is None else f"{100 * value:.2f}" for value in row.accuracies]
        lines.append(f"| {ROWS[row.training]} | {row.size or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
