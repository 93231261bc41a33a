"""Random assignment of units to arms (Sec. 2.5.2): deterministic, uniform and independent, by a keyed hash of the
unit id.

A layer is a partition of the traffic: experiments in one layer own disjoint slices of it and never share a unit;
experiments in different layers are independent. Within its slice an experiment hashes with a key of its own, made of
its layer, its name and its salt, so a salt may be used twice. Arm number
j of k starts at j/k and grows to the right, so resizing an arm never moves a unit from one arm to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flywheel_tasks.core.config import StageConfig

_DIGEST = 8


class Experiment(StageConfig):
    """One A/B test."""

    name: str = Field("", max_length=120, description="name in the exposure log (empty: release-CYCLE)")
    salt: str = Field("", max_length=200, description="part of the arm hash's key; a new one draws anew")
    arms: dict[str, float] = Field(
        {"test": 0.1, "control": 0.1},
        description="share of the slice per arm, in a fixed order; the paper gives each arm 10 %",
    )
    layer: str = Field("release", min_length=1, description="experiments in one layer exclude each other")
    slice_from: float = Field(0.0, ge=0, lt=1, description="start of the experiment's slice of its layer")
    slice_to: float = Field(1.0, gt=0, le=1, description="end of the slice")

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        if self.slice_from >= self.slice_to:
            raise ValueError(f"experiment '{self.name}': slice_from must lie below slice_to")
        if len(self.arms) < 2:
            raise ValueError(f"experiment '{self.name}' needs at least two arms")
        room = 1 / len(self.arms)
        for arm, share in self.arms.items():
            if not 0 < share <= room + 1e-12:
                raise ValueError(
                    f"experiment '{self.name}': arm '{arm}' has share {share:g}, above its room of {room:g}"
                )
        return self


def conflicts(experiments: Sequence[Experiment]) -> str | None:
    """The first pair that breaks mutual exclusion within a layer, or a repeated name."""
    for i, a in enumerate(experiments):
        for b in experiments[i + 1 :]:
            if a.name == b.name:
                return f"two experiments are named '{a.name}'"
            if a.layer == b.layer and a.slice_from < b.slice_to and b.slice_from < a.slice_to:
                return f"experiments '{a.name}' and '{b.name}' overlap in layer '{a.layer}': give them disjoint slices"
    return None


def positions(units: Sequence[str], key: str, purpose: str) -> NDArray[np.float64]:
    """A uniform number in [0, 1) per unit; keys and purposes give independent ones."""
    seed = hashlib.blake2b(key.encode(), digest_size=32).digest()
    base = hashlib.blake2b(key=seed, digest_size=_DIGEST, person=purpose.encode()[:16])
    digests = bytearray()
    for unit in units:
        h = base.copy()
        h.update(unit.encode())
        digests += h.digest()
    # 53 bits are what a float in [0, 1) can hold evenly.
    bits = np.frombuffer(bytes(digests), "<u8") >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def assign(units: Sequence[str], experiment: Experiment) -> NDArray[np.int32]:
    """The arm of each unit as a position in `experiment.arms`; -1 for a unit outside the experiment."""
    layer = positions(units, experiment.layer, "layer")
    inside = (layer >= experiment.slice_from) & (layer < experiment.slice_to)
    at = positions(units, "\0".join((experiment.layer, experiment.name, experiment.salt)), "arm")
    k = len(experiment.arms)
    arm = np.minimum((at * k).astype(np.int32), k - 1)
    shares = np.array(list(experiment.arms.values()))
    taken = inside & (at - arm / k < shares[arm])
    return np.where(taken, arm, np.int32(-1)).astype(np.int32)
