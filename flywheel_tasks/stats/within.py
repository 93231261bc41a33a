"""Values within their prompt. Eq. 1 fixes a reward up to a constant of each prompt, so only what tells two responses to
one prompt apart means something (Sec. 3.5.4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_ROUNDING = 1e-9
"""Deviations this small beside the values themselves are left over from the mean."""


def deviations(prompt: Ints, values: Floats) -> Floats:
    """Each value less the mean of its prompt's; what is no number stays so. `prompt` counts from 0."""
    known = np.isfinite(values)
    count = np.bincount(prompt[known], minlength=int(prompt.max(initial=0)) + 1)
    mean = np.bincount(prompt[known], values[known], minlength=count.size) / np.maximum(count, 1)
    return np.where(known, values - mean[prompt], np.nan)


def spread(prompt: Ints, values: Floats) -> float:
    """The standard deviation within a prompt, pooled over prompts; 0 where no prompt has two values that differ."""
    known = np.isfinite(values)
    freedom = int(known.sum()) - np.unique(prompt[known]).size
    if not freedom:
        return 0.0
    found = float(np.sqrt(np.square(deviations(prompt, values)[known]).sum() / freedom))
    return found if found > _ROUNDING * float(np.abs(values[known]).max()) else 0.0
