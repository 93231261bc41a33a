"""Candidate against champion on the same prompts (Sec. 2.5.1): who answered what, and which answer wins."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.quarantine import FORGOTTEN
from flywheel_tasks.stats import winrate
from flywheel_tasks.stats.winrate import WinRate, win_rate

CANDIDATE, CHAMPION = "candidate", "champion"
SETS = {"internal": "internal", "user": "production"}
"""A set of evaluation prompts, and the source of traffic it was drawn from."""


class Matched(NamedTuple):
    """Row i of both tables answers the same prompt; `rejected` are quarantine rows of those without a counterpart."""

    candidate: pa.Table
    champion: pa.Table
    source: NDArray[np.str_]
    rejected: pa.Table


def match(responses: pa.Table, prompts: pa.Table) -> Matched:
    """Pair the responses of both models by prompt and sample.

    A model that failed to answer has lost that prompt; where both failed, nothing can be said of it.
    """
    sides = {policy: responses.filter(pc.equal(responses.column("policy"), policy)) for policy in (CANDIDATE, CHAMPION)}
    keys = {policy: _keys(table) for policy, table in sides.items()}
    for policy, key in keys.items():
        if len(pc.unique(key)) != len(key):
            raise InputError(f"responses of the {policy} repeat a prompt and sample: run respond again")
    source_of = pc.index_in(sides[CANDIDATE].column("prompt_id"), prompts.column("prompt_id"))
    other = pc.index_in(keys[CANDIDATE], keys[CHAMPION])
    failed = _failed(sides[CANDIDATE])
    partner_failed = _failed(sides[CHAMPION])
    there = np.asarray(pc.is_valid(other))
    known = np.asarray(pc.is_valid(source_of))
    index = np.asarray(pc.fill_null(other, 0)).astype(np.int64)
    both_failed = there & failed & (partner_failed[index] if len(partner_failed) else False)
    keep = there & known & ~both_failed
    reason = np.where(~there, "no_counterpart", np.where(~known, "unknown_prompt", "both_failed"))
    gone_here = quarantine(sides[CANDIDATE].filter(pa.array(~keep)), reason[~keep])
    unused = np.ones(sides[CHAMPION].num_rows, dtype=bool)
    unused[index[keep]] = False
    why = np.full(unused.size, "no_counterpart", dtype="<U16")
    why[index[there & ~keep]] = reason[there & ~keep]
    gone_there = quarantine(sides[CHAMPION].filter(pa.array(unused)), why[unused])
    source = prompts.column("source").combine_chunks().take(pc.fill_null(source_of, 0)) if prompts.num_rows else None
    sources = np.asarray(source.to_pylist() if source is not None else [], dtype=np.str_)
    return Matched(
        sides[CANDIDATE].filter(pa.array(keep)),
        sides[CHAMPION].take(pa.array(index[keep])),
        sources[keep] if sources.size else np.asarray([], dtype=np.str_),
        pa.concat_tables([gone_here, gone_there]),
    )


def outcomes(matched: Matched, candidate: NDArray[np.floating], champion: NDArray[np.floating]) -> NDArray[np.float64]:
    """1, 1/2 or 0 a row from both scores; NaN where a score is missing although both answered."""
    return winrate.outcomes(candidate, champion, _failed(matched.candidate), _failed(matched.champion))


def rate_of(
    matched: Matched, outcome: NDArray[np.float64], prompt_set: str, *, alpha: float, draws: int, seed: int
) -> WinRate | None:
    """The win-rate on one set of prompts, clustered by character; None where no prompt of it was compared."""
    mine = (matched.source == SETS[prompt_set]) & np.isfinite(outcome)
    if not mine.any():
        return None
    characters = np.asarray(matched.candidate.column("character_id").to_pylist())[mine]
    return win_rate(outcome[mine], characters.tolist(), alpha=alpha, draws=draws, seed=seed)


def without(responses: pa.Table, forgotten: frozenset[str]) -> tuple[pa.Table, pa.Table]:
    """The responses that may be used, and quarantine rows, which name no one, for those of forgotten users."""
    compared = responses.filter(pc.is_in(responses.column("policy"), pa.array([CANDIDATE, CHAMPION])))
    mask = pc.is_in(compared.column("user"), pa.array(sorted(forgotten), pa.string()))
    rows = quarantine(compared.filter(mask), FORGOTTEN)
    nobody = pa.nulls(rows.num_rows, pa.string())
    return compared.filter(pc.invert(mask)), rows.set_column(rows.schema.get_field_index("user"), "user", nobody)


def _keys(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table.column("prompt_id"), pc.cast(table.column("sample"), pa.string()), "\x1f")


def _failed(table: pa.Table) -> NDArray[np.bool_]:
    return np.asarray(pc.equal(table.column("finish"), "error")).astype(bool)


def quarantine(table: pa.Table, reason: str | NDArray[np.str_]) -> pa.Table:
    """Rows of responses that can't be compared, with the reason of each or of all."""
    rows = table.num_rows
    reasons = [reason] * rows if isinstance(reason, str) else reason.tolist()
    return pa.table(
        {
            "row_id": table.column("completion_id"),
            "reason": pa.array(reasons, pa.string()),
            "where": pa.array(["respond/responses"] * rows, pa.string()),
            "user": table.column("user"),
            "raw": pa.nulls(rows, pa.string()),
        },
        schema=schemas.QUARANTINE,
    )
