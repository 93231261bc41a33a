"""Constrain (Sec. 2.2.1, Phase III): choosing rows under Table 1's bounds and six distribution targets.

The peer gives the same linear program, written out whole, to the same solver (HiGHS, as shipped in scipy).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import Contender, Report, compare
from flywheel_tasks.curation.apportion import Cells, Goal, distance

CAP, FLOOR, CHARACTERS = 0.03, 0.10, 5000


def _table(rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, CHARACTERS + 1) ** 1.1
    locale = rng.choice(20, size=rows, p=(w := 1 / np.arange(1, 21) ** 1.5) / w.sum())
    depth = rng.choice(3, size=rows, p=[0.5, 0.3, 0.2])
    codes = {
        "character_id": rng.choice(CHARACTERS, size=rows, p=popularity / popularity.sum()),
        "locale": locale,
        "language": np.where(rng.random(rows) < 0.9, locale // 3, rng.integers(0, 7, rows)),
        "jtbd": rng.choice(11, size=rows),
        "depth": depth,
    }
    columns: dict[str, Any] = {name: pa.array(code).cast(pa.string()) for name, code in codes.items()}
    return pa.table(
        columns
        | {
            "prompt_id": pa.array(np.arange(rows)).cast(pa.string()),
            "first_turn": (depth == 0) & (rng.random(rows) < 0.25),
            "quality": rng.normal(size=rows),
            "difficulty": rng.gamma(2.0, size=rows),
        }
    )


def _problem(rows: int, size: int | None) -> tuple[pa.Table, Any, list[Any]]:
    from flywheel_tasks.curation.constrain import ConstrainConfig, _dimensions

    config = ConstrainConfig(size=size, targets={"jtbd": {"0": 0.25}, "difficulty": {"q3": 0.5}})
    table = _table(rows)
    return table, config, _dimensions(table, {}, config)[0]


def ours(rows: int, size: int | None) -> dict[str, Any]:
    """From the table of candidates to the flags of the rows that stay, certificate included."""
    from flywheel_tasks.curation.select import select

    table, config, dimensions = _problem(rows, size)
    chosen = select(table, dimensions, config, 0)
    far = sum(float(np.abs(d.shares(chosen.rows) - d.target).sum()) for d in dimensions) * int(chosen.rows.sum())
    return {
        "selected": int(chosen.rows.sum()), "distance_rows": round(far, 1), "gap_rows": round(chosen.gap_rows, 2),
        "character": chosen.largest_character_share, "first_turn": round(chosen.first_turn_share, 4),
    }  # fmt: skip


def peer(rows: int, size: int | None) -> dict[str, Any]:
    """The same cells and bounds; one call of scipy's HiGHS on the whole program; no rounding, no choice of rows."""
    from flywheel_tasks.curation import sizing
    from flywheel_tasks.curation.select import Pool, _grouped, _numbered

    table, _, dimensions = _problem(rows, size)
    character, first = _numbered(table["character_id"]), table["first_turn"].to_numpy()
    pool = Pool(
        character, first, np.bincount(character), np.bincount(character[first], minlength=CHARACTERS), dimensions
    )
    chosen = sizing.largest(pool.rows, pool.first_turns, CAP, FLOOR, size)
    cells, _, base = _grouped(pool, sizing.cap_rows(CAP, chosen), chosen)
    goal = Goal(CAP, FLOOR, chosen, chosen, tuple(d.target for d in dimensions), (1.0,) * len(dimensions))
    take = _whole_program(cells, goal, base)
    return {"selected": chosen, "distance_rows": round(distance(cells, goal, take), 1)}


def _whole_program(cells: Cells, goal: Goal, base: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from scipy import optimize, sparse

    from flywheel_tasks.curation.apportion import _EPSILON, _layout, _matrix

    layout, n = _layout(cells, goal), len(cells.rows)
    moves = sparse.hstack([_matrix(layout.entries, np.full(n, sign), layout.count) for sign in (1.0, -1.0)])
    k = len(layout.dimension)
    sides = sparse.vstack(
        [sparse.csc_array((layout.values, 2 * k)), sparse.hstack([-sparse.eye_array(k), sparse.eye_array(k)])]
    )
    matrix = sparse.hstack([moves, sides]).tocsr()
    held = _matrix(layout.entries, np.ones(n), layout.count) @ base.astype(float)
    aim = np.concatenate([[goal.most, goal.floor * goal.most], np.full(cells.groups, goal.cap * goal.most),
                          np.concatenate(goal.targets) * goal.most]) - held  # fmt: skip
    equal = np.r_[0, layout.values : layout.tolerances]
    less = np.r_[1, 2 : layout.values]
    flip = np.r_[-1.0, np.ones(layout.values - 2)]
    most = np.concatenate([cells.rows - base, base, np.full(2 * k, np.inf)])
    answer = optimize.linprog(
        np.concatenate([np.full(2 * n, _EPSILON), np.ones(2 * k)]), A_eq=matrix[equal], b_eq=aim[equal],
        A_ub=sparse.diags_array(flip) @ matrix[less], b_ub=flip * aim[less],
        bounds=np.stack([np.zeros(len(most)), most], axis=1),
        method="highs",
    )  # fmt: skip
    moved: np.ndarray[Any, Any] = base + answer.x[:n] - answer.x[n : 2 * n]
    return moved


def _agree(results: dict[str, Any]) -> None:
    ours_found, peer_found = results["flywheel: column generation"], results["whole program in one call"]
    if (
        ours_found["selected"] != peer_found["selected"]
        or abs(ours_found["distance_rows"] - peer_found["distance_rows"]) > 200
    ):
        raise SystemExit(f"the two programs disagree: {results}")


def main(*, quick: bool = False) -> list[Report]:
    reports = []
    for rows, size in [(20_000, None)] if quick else [(1_000_000, None), (1_000_000, 300_000)]:
        arguments = {"rows": rows, "size": size}
        wanted = f"{size:,} wanted" if size else "as many as the bounds allow"
        report = compare(
            f"constrain_{rows}_{size or 'largest'}",
            f"constrain {rows:,} prompts, {CHARACTERS:,} characters, {wanted}",
            [
                Contender("flywheel: column generation", "benchmarks.bench_constrain:ours", arguments, work=rows),
                Contender("whole program in one call", "benchmarks.bench_constrain:peer", arguments, work=rows),
            ],
            repeats=3, agree=_agree, unit="prompts",
            notes=["both times include making the table and its cells; only the first rounds and chooses rows"],
        )  # fmt: skip
        report.notes.extend(f"{row.name}: {row.result}" for row in report.rows)
        reports.append(report)
    return reports
