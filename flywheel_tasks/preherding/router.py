"""Line 4 of Algorithm 1: the candidate policy most suitable for each prompt, from what each earned before.

A share of the prompts is routed by chance; from those alone the scores are learned, so a policy is not judged by the
prompts it was given for being good at them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

_PRIOR = 10.0
"""A segment counts for itself from about this many prompts on; below, mostly for what the policy earns everywhere."""


class Earned(TypedDict):
    """Best rewards of a policy on the prompts of a segment that chance gave it."""

    policy: str
    segment: str
    n: int
    mean: float


def route(
    prompt_ids: Sequence[str],
    segments: Sequence[str],
    pool: Sequence[str],
    earned: Sequence[Earned],
    *,
    explore: float,
    seed: int,
) -> tuple[list[str], NDArray[np.bool_]]:
    """The policy of each prompt, and which ones chance chose. `pool` begins with the champion: a new one is every
    segment's favourite until it is known. Another policy that was never tried is tried by chance only."""
    drawn = [_chances(prompt_id, seed) for prompt_id in prompt_ids]
    known = {policy for policy in pool if any(e["policy"] == policy for e in earned)}
    by_chance = np.array([u < explore or not known for u, _ in drawn], bool)
    tried = sorted(known, key=pool.index) if pool[0] in known else pool[:1]
    favourite = {segment: _favourite(segment, tried, earned) for segment in set(segments)}
    chosen = [
        pool[int(v * len(pool))] if chance else favourite[segment]
        for (_, v), segment, chance in zip(drawn, segments, by_chance, strict=True)
    ]
    return chosen, by_chance


def learn(
    policies: Sequence[str], segments: Sequence[str], highest: Sequence[float], before: Sequence[Earned]
) -> list[Earned]:
    """What each policy earned in each segment: give the prompts that chance routed. Where they tell nothing, what was
    known `before` stays known."""
    found: dict[tuple[str, str], list[float]] = {}
    for policy, segment, reward in zip(policies, segments, highest, strict=True):
        if np.isfinite(reward):
            found.setdefault((policy, segment), []).append(float(reward))
    learned = [
        Earned(policy=policy, segment=segment, n=len(rewards), mean=float(np.mean(rewards)))
        for (policy, segment), rewards in sorted(found.items())
    ]
    return learned or list(before)


def _favourite(segment: str, pool: Sequence[str], earned: Sequence[Earned]) -> str:
    if len(pool) == 1:
        return pool[0]
    value = {policy: _shrunk(policy, segment, earned) for policy in pool}
    return max(pool, key=lambda policy: value[policy])


def _shrunk(policy: str, segment: str, earned: Sequence[Earned]) -> float:
    mine = [e for e in earned if e["policy"] == policy]
    total = sum(e["n"] for e in mine)
    everywhere = sum(e["n"] * e["mean"] for e in mine) / total
    here = [e for e in mine if e["segment"] == segment]
    n = sum(e["n"] for e in here)
    return (sum(e["n"] * e["mean"] for e in here) + _PRIOR * everywhere) / (n + _PRIOR)


def segment_names(columns: Mapping[str, Sequence[str | None]], rows: int) -> list[str]:
    """One name for each row from the columns that tell segments apart."""
    if not columns:
        return ["all"] * rows
    return [" · ".join(value or "unknown" for value in row) for row in zip(*columns.values(), strict=True)]


def _chances(prompt_id: str, seed: int) -> tuple[float, float]:
    """Two uniform numbers that belong to the prompt, whatever other prompts there are."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}".encode(), digest_size=16).digest()
    return tuple(int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:]))  # type: ignore[return-value]
