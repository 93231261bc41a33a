"""Prompt quality and difficulty from reward scores of several responses to each prompt (Table 1, Sec. 3.5.4).

Difficulty is the variance of the scores within a prompt. A low mean score looks like difficulty too, but reward
models fix no scale across prompts: style, length or the number of turns shift all scores of a prompt together, and
selecting by the mean then selects those styles (the paper saw role-play four times over-represented). A shift common
to all responses of a prompt leaves the variance unchanged. The mean is offered only so that the bias can be measured.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError


def by_prompt(prompt_ids: pa.ChunkedArray, scores: pa.ChunkedArray) -> pa.Table:
    """prompt_id, responses, quality (mean score), difficulty (unbiased variance; null below two responses).

    Non-finite scores are no measurement and are left out.
    """
    finite = pc.fill_null(pc.is_finite(scores), False)
    table = pa.table({"prompt_id": prompt_ids, "score": scores}).filter(finite)
    grouped = table.group_by("prompt_id", use_threads=False).aggregate(
        [
            ("score", "count"),
            ("score", "mean"),
            ("score", "variance", pc.VarianceOptions(ddof=1, min_count=2)),
        ]
    )
    return grouped.select(["prompt_id", "score_count", "score_mean", "score_variance"]).rename_columns(
        ["prompt_id", "responses", "quality", "difficulty"]
    )


def hardest(scored: pa.Table, count: int, by: Literal["variance", "mean"] = "variance") -> pa.Array:
    """Ids of the `count` prompts with the highest variance (or, to show its bias, the lowest mean). Ties go by id."""
    column, order = {"variance": ("difficulty", "descending"), "mean": ("quality", "ascending")}[by]
    known = scored.filter(scored[column].is_valid())
    if count > known.num_rows:
        raise InputError(
            f"difficulty: {count} prompts are wanted, but only {known.num_rows} have scores for a {by}; "
            "score more responses per prompt"
        )
    return known.sort_by([(column, order), ("prompt_id", "ascending")])["prompt_id"].slice(0, count).combine_chunks()


def over_representation(groups: NDArray[np.object_], chosen: NDArray[np.bool_]) -> dict[str, float]:
    """Per group: its share among the chosen over its share among all (1 = proportional)."""
    names, codes = np.unique(groups, return_inverse=True)
    everyone = np.bincount(codes, minlength=len(names)) / len(codes)
    selected = np.bincount(codes[chosen], minlength=len(names)) / max(1, int(chosen.sum()))
    return {str(name): float(s / e) for name, s, e in zip(names, selected, everyone, strict=True)}
