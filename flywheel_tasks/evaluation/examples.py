"""Side-by-side examples for a report: where the reward model sees the largest difference, and a few at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.evaluation.versus import CANDIDATE, CHAMPION, match

_TURNS = 4
_LONGEST = 4000


def side_by_side(
    scored: pa.Table, sources: pa.Table, *, extreme: int = 2, drawn: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Pairs as a template shows them; the texts are as the models wrote them and must be escaped."""
    matched = match(scored, sources)
    pairs = matched.candidate.num_rows
    if not pairs:
        return []
    scores = np.array(
        [[_score(row) for row in side.column("scores").to_pylist()] for side in (matched.candidate, matched.champion)]
    )
    gap = scores[0] - scores[1]
    known = np.flatnonzero(np.isfinite(gap))
    ranked = known[np.argsort(gap[known], kind="stable")]
    rng = np.random.default_rng(seed)
    chosen: dict[int, str] = {}
    for index in ranked[gap[ranked] > 0][::-1][:extreme]:
        chosen.setdefault(int(index), "candidate furthest ahead")
    for index in ranked[gap[ranked] < 0][:extreme]:
        chosen.setdefault(int(index), "champion furthest ahead")
    most = len(chosen) + drawn
    for index in rng.permutation(pairs)[:most]:
        if len(chosen) < most:
            chosen.setdefault(int(index), "drawn at random")
    rows = pa.array(list(chosen), pa.int64())
    candidate, champion = (side.take(rows).to_pylist() for side in (matched.candidate, matched.champion))
    return [
        _example(why, new, old, gap[index])
        for (index, why), new, old in zip(chosen.items(), candidate, champion, strict=True)
    ]


def _example(why: str, new: dict[str, Any], old: dict[str, Any], gap: float) -> dict[str, Any]:
    shown = new["turns"][-_TURNS:]
    left_out = len(new["turns"]) - len(shown)
    return {
        "why": f"{why}, {left_out} earlier turns not shown" if left_out else why,
        "character": _cut(new["character_id"]),
        "locale": _cut(new["locale"]),
        "turns": [{"role": _cut(t["role"]), "content": _cut(t["content"])} for t in shown],
        "sides": [
            {
                "policy": CHAMPION,
                "text": _cut(old["text"]),
                "score": _finite(_score(old["scores"])),
                "won": bool(gap < 0),
            },
            {
                "policy": CANDIDATE,
                "text": _cut(new["text"]),
                "score": _finite(_score(new["scores"])),
                "won": bool(gap > 0),
            },
        ],
    }


def _cut(text: str) -> str:
    """Cut where nobody would read on."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … {len(text) - _LONGEST:,} characters more"


def _score(scores: list[dict[str, Any]]) -> float:
    found = {s["name"]: s["value"] for s in scores}
    return float(found.get("pointwise", found.get("pairwise_win", np.nan)))


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
