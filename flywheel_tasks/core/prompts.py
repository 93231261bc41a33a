"""Which prompts a stage may work on: those near the policy (Sec. 3.5.2), and at most so many of them."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def near_policy(prompts: pa.Table, older_versions: bool = False) -> tuple[pa.Table, pa.Table]:
    """Prompts from the champion's own traffic, and those refused because another version answered them.

    Internal chats name no version; they belong to the cycle in which they were held.
    """
    if older_versions:
        return prompts, prompts.slice(0, 0)
    near = pc.or_(prompts["near_policy"], pc.equal(prompts["source"], "internal"))
    return prompts.filter(near), prompts.filter(pc.invert(near))


def at_most(prompts: pa.Table, most: int | None, seed: int) -> tuple[pa.Table, pa.Table]:
    """At most so many prompts, chosen by hash, in the order in which they came; and the rest."""
    if most is None or prompts.num_rows <= most:
        return prompts, prompts.slice(0, 0)
    digests = [hashlib.blake2b(f"{seed}\0{p}".encode()).digest() for p in prompts["prompt_id"].to_pylist()]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    chosen = np.zeros(prompts.num_rows, bool)
    chosen[order[:most]] = True
    # Not `take`, which joins all text of a column: Arrow can't beyond 2 GiB.
    return prompts.filter(pa.array(chosen)), prompts.filter(pa.array(~chosen))
