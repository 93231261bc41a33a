"""Table 8: accuracy of every version of a reward model on every batch, as rows, CSV and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flywheel_tasks.core import schemas
from flywheel_tasks.preherding.accuracy import ALL, Cell


def merge(before: Sequence[Cell], now: Sequence[Cell]) -> list[Cell]:
    """The matrix with this run's cells; a cell measured again replaces the old one. What an older version that is not
    measured again reached on all batches leaves the mode: those were fewer batches, and a column compares versions."""
    measured = {cell["mode"] for cell in now}
    still = [cell for cell in before if cell["batch"] != ALL or cell["mode"] not in measured]
    cells = {(cell["mode"], cell["model"], cell["batch"]): cell for cell in [*still, *now]}
    return [cells[key] for key in sorted(cells)]


def to_csv(matrix: Sequence[Cell]) -> str:
    """The paper's layout: a row for each version, a column for each batch of a mode and for all of them."""
    modes, models, batches = _axes(matrix)
    accuracy = {(c["mode"], c["model"], c["batch"]): c["accuracy"] for c in matrix}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["mode", "model", *batches])
    for mode in modes:
        for model in models:
            found = [accuracy.get((mode, model, batch)) for batch in batches]
            if any(value is not None for value in found):
                writer.writerow([mode, model, *("" if value is None else f"{value:.3f}" for value in found)])
    return out.getvalue()


def draw(matrix: Sequence[Cell], title: str, path: Path) -> None:
    """One heat map a mode: the diagonal is the newest batch of each version, right of it batches it never saw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    modes, models, batches = _axes(matrix)
    height, width = 0.45 * len(models) + 1.6, (0.85 * len(batches) + 1.4) * len(modes) + 0.6
    figure, panels = plt.subplots(1, len(modes), figsize=(max(width, 5), max(height, 2.4)), squeeze=False)
    for panel, mode in zip(panels[0], modes, strict=True):
        cells = {(c["model"], c["batch"]): c for c in matrix if c["mode"] == mode}
        grid = np.array([[cells[m, b]["accuracy"] if (m, b) in cells else np.nan for b in batches] for m in models])
        panel.imshow(grid, cmap="RdYlGn", vmin=0.4, vmax=0.9, aspect="auto")
        for row, column in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            cell = cells[models[row], batches[column]]
            text = f"{cell['accuracy']:.3f}\n±{(cell['high'] - cell['low']) / 2:.2f}"
            panel.text(column, row, text, ha="center", va="center", fontsize=7)
        panel.set_xticks(range(len(batches)), ["until now" if b == ALL else b for b in batches], fontsize=8)
        panel.set_yticks(range(len(models)), models if mode == modes[0] else [""] * len(models), fontsize=8)
        panel.set_title(f"{mode} preference data", fontsize=9)
        panel.tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _axes(matrix: Sequence[Cell]) -> tuple[list[str], list[str], list[str]]:
    found = {cell["mode"] for cell in matrix}
    models, batches = sorted({cell["model"] for cell in matrix}), sorted({cell["batch"] for cell in matrix})
    return [mode for mode in schemas.MODES if mode in found], models, [*(b for b in batches if b != ALL), ALL]
