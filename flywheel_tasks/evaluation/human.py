"""Human comparison of two models, side by side in a conversation (Sec. 2.5.1).

At each turn an annotator sees a response of both models (`annotation.side_by_side`). Whichever they prefer, the
conversation goes on with one of the two drawn at random (`annotation.sessions`), so that the history favours neither.
What counts is the preferences.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.stats.winrate import WinRate, win_rate

_OUTCOME = {"y0": 1.0, "y1": 0.0, "tie": 0.5, "neither": 0.5}


class Comparison(NamedTuple):
    """The candidate's win-rate among people, and what it rests on."""

    rate: WinRate | None
    annotators: int
    conversations: int
    left_out: dict[str, int]


def compare(
    annotations: pa.Table,
    pairs: pa.Table,
    candidate: str,
    champion: str,
    *,
    alpha: float = 0.05,
    draws: int = 2000,
    seed: int = 0,
) -> Comparison:
    """The candidate's win-rate over the champion; a tie and 'neither' are half a win.

    Turns of one conversation are alike, and so are conversations of one character: the interval resamples characters.
    Several annotators of one turn are averaged by majority, so that a turn shown to many counts once.
    """
    left_out: dict[str, int] = {}
    strange = set(annotations.column("preferred").unique().to_pylist()) - set(_OUTCOME)
    if strange:
        raise InputError(f"annotations: preferred '{sorted(map(str, strange))[0]}' is not one of {', '.join(_OUTCOME)}")
    at = pc.index_in(annotations.column("pair_id"), pairs.column("pair_id"))
    known = np.asarray(pc.is_valid(at))
    left_out["unknown_pair"] = int((~known).sum())
    rows = annotations.filter(pa.array(known))
    shown = pairs.take(pc.drop_null(at))
    first, second = (np.asarray(shown.column(name).to_pylist(), dtype=object) for name in ("policy0", "policy1"))
    forward, backward = (first == candidate) & (second == champion), (first == champion) & (second == candidate)
    ours = forward | backward
    left_out["another_pair_of_models"] = int((~ours).sum())
    outcome = np.array([_OUTCOME[p] for p in rows.column("preferred").to_pylist()])
    outcome = np.where(backward, 1 - outcome, outcome) if outcome.size else outcome
    counted, turn = rows.filter(pa.array(ours)), shown.filter(pa.array(ours))
    left_out = {why: count for why, count in left_out.items() if count}
    if not counted.num_rows:
        return Comparison(None, 0, 0, left_out)
    merged, characters = _per_turn(outcome[ours], turn)
    found = win_rate(merged, characters.tolist(), alpha=alpha, draws=draws, seed=seed)
    return Comparison(
        found, len(counted.column("annotator").unique()), len(turn.column("prompt_id").unique()), left_out
    )


def _per_turn(outcome: NDArray[np.float64], turn: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """One outcome for each pair: the side that most of its annotators are on, a tie where they balance."""
    names, index = np.unique(np.asarray(turn.column("pair_id").to_pylist()), return_inverse=True)
    lean = np.bincount(index, weights=outcome - 0.5)
    characters = np.empty(names.size, dtype=object)
    characters[index] = turn.column("character_id").to_pylist()
    return 0.5 + 0.5 * np.sign(np.round(lean, 9)), characters
