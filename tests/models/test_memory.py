"""Memory: what was freed is used again instead of being faulted in anew, and a GPU is never promised twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.engine_worker import gpu_memory, utilisation
from flywheel_tasks.models.memory import ENVIRONMENT, keep_pages, numbers, refuse_too_large
from flywheel_tasks.models.score import Scorer

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


GIB = 1 << 30
HELD = [(79 * GIB, 80 * GIB), (47 * GIB, 80 * GIB)]
"""One GPU of 80 GiB with nothing on it but a context, and one on which two scoring models of 8B are loaded."""


def test_an_engine_takes_its_share_of_what_is_free_of_its_fullest_gpu() -> None:
    assert utilisation(0.9, HELD[:1]) == pytest.approx(0.9 * 79 / 80)
    assert utilisation(0.9, HELD) == utilisation(0.9, HELD[1:]) == pytest.approx(0.9 * 47 / 80)


@pytest.mark.slow
@pytest.mark.parametrize(("free", "total"), HELD)
def test_vllm_starts_beside_scoring_models(free: int, total: int) -> None:
    """vLLM's own arithmetic: of 0.9 of the whole GPU it would say that too little is free."""
    from types import SimpleNamespace

    from vllm.v1.worker.utils import request_memory

    seen = SimpleNamespace(total_memory=total, free_memory=free, device_="cuda:0")
    told = SimpleNamespace(gpu_memory_utilization=utilisation(0.9, [(free, total)]))
    assert request_memory(seen, told) == pytest.approx(0.9 * free)


def test_an_engine_over_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: HELD[gpu])
    assert gpu_memory(1) == HELD[:1]
    with pytest.raises(InputError, match="over 8 GPUs sees 1: lower tensor_parallel"):
        gpu_memory(8)


def test_a_scoring_model_larger_than_its_gpu_is_refused_before_it_is_read(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    assert numbers(tiny_model) == count
    refuse_too_large(tiny_model, 2, 2 * count, "cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (2 * count - 1, 80 * GIB))
    with pytest.raises(InputError, match=r"its weights take .* GiB and cuda:0 has .* GiB free"):
        Scorer(tiny_model, device="cuda:0")
