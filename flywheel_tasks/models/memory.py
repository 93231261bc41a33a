"""What a process does about memory before it computes.

glibc gives large blocks back to the kernel at every free, so each step of training faults its activations in anew:
320,000 page faults a step were measured, a sixth of the time. A process that computes in its main thread can set the
thresholds itself. One that computes in another thread, as Ray Train's workers do, must be started with ENVIRONMENT:
that thread has an arena of its own by the time it could ask, and only the main arena holds blocks beyond 64 MiB.

A scoring model that is larger than the GPU it is meant for is refused before a byte of it is read.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

from flywheel_tasks.core.errors import InputError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_LARGEST = 2**31 - 1
_PAD = 64 << 20

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
    "MALLOC_TOP_PAD_": str(_PAD),
}
"""For a process that is yet to start (Ray: runtime_env's env_vars)."""


def keep_pages() -> bool:
    """Let this process keep freed memory and reuse it. Returns False where its environment has decided already, or the
    C library knows no such setting."""
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_ARENA_MAX, 1),
        (_MMAP_THRESHOLD, _LARGEST),
        (_TRIM_THRESHOLD, _LARGEST),
        (_TOP_PAD, _PAD),
    )
    taken = [mallopt(name, value) for name, value in settings]
    return all(taken)


def refuse_too_large(folder: Path, width: int, free: int, place: str) -> None:
    """An error of one line where the weights of a model folder, at `width` bytes a number, exceed what is free."""
    if (needed := numbers(folder) * width) > free:
        raise InputError(
            f"scoring model {folder}: its weights take {needed / 2**30:.1f} GiB and {place} has {free / 2**30:.1f} GiB "
            "free: a scoring model runs on one GPU, so give a smaller model, or a GPU with more memory"
        )


def numbers(folder: Path) -> int:
    """How many numbers the safetensors of a folder hold, from their headers."""
    from safetensors import safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return count
