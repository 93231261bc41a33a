"""Annotations → preferences (Sec. 3.4.1): one label for each pair, by agreement of its reviewers, the conflict kept.

Labels are chosen on arrays; the paper's three data variants and the consolidation are the same four small functions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from flywheel_tasks.annotation.agreement import counted
from flywheel_tasks.annotation.pairing import draws
from flywheel_tasks.core import schemas

Rule = Literal["unanimous", "majority", "single"]
LABELS = ("y0", "y1", "tie", "neither")
MANDATED = ("image_timing", "image_prompt")
"""Sec. 2.7: image pairs are kept only where reviewers agree on these."""
_COPIED = ("pair_id", "prompt_id", "user", "character_id", "locale", "language", "jtbd", "mode", "split", "turns")
IntArray = NDArray[np.int64]


class Votes(NamedTuple):
    """Reviews as arrays: which pair, and which of LABELS."""

    pair: IntArray
    label: IntArray
    pairs: int

    @property
    def table(self) -> IntArray:
        """Reviews by pair and label."""
        return counted(self.pair, self.label, self.pairs, len(LABELS))


class Decided(NamedTuple):
    """A chosen side (0: y0, 1: y1) for some pairs, and the one review it rests on (-1: on all of them)."""

    pair: IntArray
    side: IntArray
    review: IntArray


class Collected(NamedTuple):
    preferences: pa.Table
    undecided: dict[str, int]
    """Pairs with reviews but without a preference, by reason."""


def unanimous(votes: Votes, fewest: int = 2) -> Decided:
    """Pairs whose reviewers, at least `fewest`, all chose the same response: Multi-Review (With Agreement)."""
    table = votes.table
    sizes = table.sum(axis=1)
    return _on_all((table[:, :2] == sizes[:, None]) & (sizes >= max(fewest, 1))[:, None])


def majority(votes: Votes, fewest: int = 1) -> Decided:
    """Pairs of which more than half of the reviewers, ties and failures included, chose the same response."""
    table = votes.table
    sizes = table.sum(axis=1)
    return _on_all((2 * table[:, :2] > sizes[:, None]) & (sizes >= max(fewest, 1))[:, None])


def single_random(votes: Votes, luck: NDArray[np.float64], fewest: int = 1) -> Decided:
    """Each pair once, with the label of one reviewer drawn by `luck`: Single-Review (Random). A drawn tie is none."""
    order = np.lexsort((luck, votes.pair))
    first = order[np.unique(votes.pair[order], return_index=True)[1]] if len(order) else order
    enough = np.bincount(votes.pair, minlength=votes.pairs)[votes.pair[first]] >= fewest
    return _on_one(votes, first[enough])


def single_all(votes: Votes) -> Decided:
    """Every review that chose a response, conflicts and all: Single-Review (All)."""
    return _on_one(votes, np.arange(len(votes.pair)))


def collect(annotations: pa.Table, ledger: pa.Table, rule: Rule, fewest: int, seed: int) -> Collected:
    """The preference of every pair on which the reviewers decide."""
    votes, tasks = ballots(annotations, ledger)
    if rule == "single":
        decided = single_random(votes, _luck(annotations, seed), fewest)
    else:
        decided = (unanimous if rule == "unanimous" else majority)(votes, fewest)
    apart = _image_conflicts(annotations, tasks)
    decided = Decided(*(column[~apart[decided.pair]] for column in decided))
    why = _undecided(votes, decided, apart, fewest)
    return Collected(preferences(annotations, tasks, votes, decided), why)


def variants(annotations: pa.Table, ledger: pa.Table, seed: int) -> dict[str, pa.Table]:
    """The three training sets of Table 9, from the same reviews."""
    votes, tasks = ballots(annotations, ledger)
    decided = {
        "multi_agree": unanimous(votes),
        "single_all": single_all(votes),
        "single_random": single_random(votes, _luck(annotations, seed)),
    }
    return {name: preferences(annotations, tasks, votes, one) for name, one in decided.items()}


def ballots(annotations: pa.Table, ledger: pa.Table) -> tuple[Votes, pa.Table]:
    """Reviews as votes, and the tasks that have any, in the order of the votes' pair numbers."""
    reviewed = annotations["pair_id"].unique()
    tasks = ledger.filter(pc.is_in(ledger["pair_id"], reviewed)).sort_by("pair_id")
    pair = pc.index_in(annotations["pair_id"], tasks["pair_id"]).to_numpy().astype(np.int64)
    label = pc.index_in(annotations["preferred"], pa.array(LABELS)).to_numpy().astype(np.int64)
    return Votes(pair, label, len(tasks)), tasks


def preferences(annotations: pa.Table, tasks: pa.Table, votes: Votes, decided: Decided) -> pa.Table:
    """Rows of schema `preference`. A preference belongs to the batch in which its pair's first review came, so that
    "all data until a batch" (Table 8) does not change when a late review arrives."""
    chosen_rows = tasks.take(pa.array(decided.pair))
    table = votes.table[decided.pair]
    sizes = table.sum(axis=1)
    agreement = np.where(sizes == 1, "single", np.where(table.max(axis=1) == sizes, "unanimous", "majority"))
    agreement = np.where(decided.review >= 0, "single", agreement)
    batch = annotations["batch"].to_numpy(zero_copy_only=False)
    first_batch = _first(votes, batch)[decided.pair] if len(batch) else np.array([], object)
    own_batch = batch[decided.review] if len(batch) else first_batch
    texts = [_with_call(chosen_rows, y) for y in (0, 1)]
    policies = [chosen_rows[f"policy{y}"].to_numpy(zero_copy_only=False) for y in (0, 1)]
    ids = chosen_rows["pair_id"].to_pylist()
    review_ids = annotations["annotation_id"].to_numpy(zero_copy_only=False)
    names = [p if r < 0 else f"{p}\0{review_ids[r]}" for p, r in zip(ids, decided.review, strict=True)]
    columns = {
        **{name: chosen_rows[name] for name in _COPIED},
        "preference_id": [hashlib.sha256(f"preference\0{name}".encode()).hexdigest()[:32] for name in names],
        "traffic": np.where(chosen_rows["source"].to_numpy(zero_copy_only=False) == "internal", "internal", "user"),
        "chosen": np.where(decided.side == 0, texts[0], texts[1]),
        "rejected": np.where(decided.side == 0, texts[1], texts[0]),
        "agreement": agreement,
        "n_reviews": sizes.astype(np.int32),
        "conflict": table.max(axis=1) < sizes,
        "batch": np.where(decided.review >= 0, own_batch, first_batch),
        "policy_chosen": np.where(decided.side == 0, policies[0], policies[1]),
        "policy_rejected": np.where(decided.side == 0, policies[1], policies[0]),
    }
    schema = schemas.get("preference")
    plain = {name: c.tolist() if isinstance(c, np.ndarray) else c for name, c in columns.items()}
    arrays = [pa.array(plain[f.name], f.type) if isinstance(plain[f.name], list) else plain[f.name] for f in schema]
    return pa.table(arrays, schema=schema)


def _on_all(wins: NDArray[np.bool_]) -> Decided:
    pair, side = np.nonzero(wins)
    return Decided(pair.astype(np.int64), side.astype(np.int64), np.full(len(pair), -1))


def _on_one(votes: Votes, reviews: IntArray) -> Decided:
    reviews = reviews[votes.label[reviews] < 2]
    return Decided(votes.pair[reviews], votes.label[reviews], reviews.astype(np.int64))


def _luck(annotations: pa.Table, seed: int) -> NDArray[np.float64]:
    return draws(seed, "single", annotations["annotation_id"].to_pylist())


def _first(votes: Votes, batch: NDArray[np.object_]) -> NDArray[np.object_]:
    """Each pair's earliest batch; two digits a year sort by themselves."""
    order = np.lexsort((batch.astype(str), votes.pair))
    pairs, at = np.unique(votes.pair[order], return_index=True)
    first = np.full(votes.pairs, "", object)
    first[pairs] = batch[order[at]]
    return first


def _undecided(votes: Votes, decided: Decided, apart: NDArray[np.bool_], fewest: int) -> dict[str, int]:
    table = votes.table
    sizes = table.sum(axis=1)
    left = np.ones(votes.pairs, bool)
    left[decided.pair] = False
    sided, conflict = table[:, :2].sum(axis=1) > 0, (table[:, :2] > 0).all(axis=1)
    names: Sequence[str] = np.select(
        [sizes < np.where(apart, max(fewest, 2), fewest), apart, ~sided, conflict],
        ["too_few_reviews", "image_dimensions_differ", "no_preference", "conflict"],
        "no_majority",
    )[left]
    return dict(sorted(Counter(map(str, names)).items()))


def _image_conflicts(annotations: pa.Table, tasks: pa.Table) -> NDArray[np.bool_]:
    """Image pairs whose reviewers, at least two, do not all give the same answers on the mandated dimensions."""
    apart = (tasks["mode"].to_numpy(zero_copy_only=False) == "image").astype(bool)
    images = annotations.filter(pc.equal(annotations["mode"], "image")).select(["pair_id", "questions"]).to_pylist()
    said: dict[str, list[tuple[tuple[str, str, str], ...]]] = {}
    for row in images:
        mandated = sorted((q["name"], q["about"], q["answer"]) for q in row["questions"] if q["name"] in MANDATED)
        said.setdefault(row["pair_id"], []).append(tuple(mandated))
    agree = {pair for pair, answers in said.items() if len(answers) >= 2 and len(set(answers)) == 1}
    apart[[i for i, pair in enumerate(tasks["pair_id"].to_pylist()) if pair in agree]] = False
    return apart


def _with_call(rows: pa.Table, y: int) -> NDArray[np.object_]:
    """A response as the policy wrote it, its tool call behind the words."""
    texts, calls = rows[f"y{y}"].to_pylist(), rows[f"tool_call{y}"].to_pylist()
    whole = [f"{t}\n<tool_call>{c}</tool_call>".strip() if c else t for t, c in zip(texts, calls, strict=True)]
    return np.array([*whole, ""], object)[:-1]
