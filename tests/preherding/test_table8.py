"""The paper's own Table 8 goes through the matrix and comes back as printed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from flywheel_tasks.preherding import table8
from flywheel_tasks.preherding.accuracy import ALL, Cell


@pytest.fixture
def printed(data_dir: Path) -> list[dict[str, str]]:
    with (data_dir / "paper" / "table8.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def cells(printed: list[dict[str, str]]) -> list[Cell]:
    return [
        Cell(
            model=row["model"],
            mode=row["mode"],
            batch=ALL if batch.startswith("all") else batch,
            n=1000,
            accuracy=float(value),
            low=float(value) - 0.02,
            high=float(value) + 0.02,
        )
        for row in printed
        for batch, value in row.items()
        if batch not in ("mode", "model")
    ]


def test_the_layout_is_the_papers(printed: list[dict[str, str]], cells: list[Cell]) -> None:
    found = list(csv.DictReader(table8.to_csv(cells).splitlines()))
    key = lambda row: (row["mode"], row["model"])  # noqa: E731
    for mine, theirs in zip(sorted(found, key=key), sorted(printed, key=key), strict=True):
        assert [float(v) for k, v in mine.items() if k not in ("mode", "model")] == [
            float(v) for k, v in theirs.items() if k not in ("mode", "model")
        ]


def test_a_version_measured_again_replaces_its_cells(cells: list[Cell]) -> None:
    again = [cell | {"accuracy": 0.9} for cell in cells if cell["model"] == "RM_241229"]
    merged = table8.merge(cells, again)
    assert {c["accuracy"] for c in merged if c["model"] == "RM_241229"} == {0.9}
    assert [c for c in merged if c["batch"] != ALL and c["model"] != "RM_241229"] == sorted(
        (c for c in cells if c["batch"] != ALL and c["model"] != "RM_241229"),
        key=lambda c: (c["mode"], c["model"], c["batch"]),
    )


def test_until_now_compares_versions_on_the_same_batches() -> None:
    """Every version is as good on what it learned as the others, and no better than chance on later batches."""
    names, matrix = ["240101", "240201", "240301", "240401"], list[Cell]()
    for now in range(len(names)):
        cells = []
        for version in range(max(0, now - 1), now + 1):
            seen = {name: 0.8 if place <= version else 0.5 for place, name in enumerate(names[: now + 1])}
            seen[ALL] = sum(seen.values()) / len(seen)
            cells += [
                Cell(
                    model=f"RM_{names[version]}", mode="static", batch=batch, n=100 * (now + 1 if batch == ALL else 1),
                    accuracy=value, low=value, high=value,
                )
                for batch, value in seen.items()
            ]  # fmt: skip
        matrix = table8.merge(matrix, cells)
    assert {c["model"]: c["n"] for c in matrix if c["batch"] == ALL} == {"RM_240301": 400, "RM_240401": 400}
    rows = list(csv.DictReader(table8.to_csv(matrix).splitlines()))
    assert [row[ALL] for row in rows] == ["", "", "0.725", "0.800"]
    assert rows[0]["240201"] == "0.500"
    other = [Cell(model="RM_240501", mode="interactive", batch=ALL, n=1, accuracy=1.0, low=1.0, high=1.0)]
    assert len(table8.merge(matrix, other)) == len(matrix) + 1


def test_the_figure_is_drawn_with_and_without_gaps(cells: list[Cell], tmp_path: Path) -> None:
    table8.draw(cells, "Pointwise", tmp_path / "whole.png")
    table8.draw(cells[:1], "Pointwise", tmp_path / "first.png")
    for name in ("whole.png", "first.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
