"""The allocator setting does what it is for: memory that was freed is used again instead of being faulted in anew."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from flywheel_tasks.models.memory import ENVIRONMENT, keep_pages

_PROGRAM = """
import resource, sys, threading
import numpy as np
from flywheel_tasks.models.memory import keep_pages

def work():
    bytearray(1 << 12)
    if sys.argv[1] == "keep" and not keep_pages():
        raise SystemExit("the C library refuses the setting")
    for round in range(6):
        if round == 2:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        parts = [np.ones(2_000_000), np.ones(11_000_000)]
        del parts
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start)

if sys.argv[2] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""


def faults(mode: str, where: str, settings: Mapping[str, str] | None = None) -> int:
    """Page faults of four rounds that allocate and free 104 MB each."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | dict(settings or {})
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode, where], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept_and_used_again() -> None:
    assert faults("keep", "main") * 10 < faults("leave", "main")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_thread_keeps_it_too_where_the_process_was_started_for_it() -> None:
    assert faults("leave", "thread", ENVIRONMENT) * 10 < faults("leave", "thread")


def test_settings_of_the_environment_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4294967296")
    assert not keep_pages()
