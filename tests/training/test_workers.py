"""Two workers make the update of one, as copies of the model and as shards of it (FSDP2), on real layers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.tiny_llama import build_tiny_llama
from tests.training import bags, pair, whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "copies-lora-float32-sft",
        "copies-full-bfloat16-sft",
        "shards-lora-bfloat16-sft",
        "shards-lora-float32-dpo-again",
        "shards-full-float32-sft",
        "shards-full-float32-pointwise",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_two_workers_make_the_update_of_one(tmp_path: Path, kind: str, tied: bool) -> None:
    if tied and kind not in ("shards-full-float32-sft", "shards-lora-bfloat16-sft"):
        pytest.skip("a tied head matters where it is spread")
    model = build_tiny_llama(tmp_path / "model", tied=tied)
    alone = bags.run(tmp_path / "alone", **pair.settings(model, kind))
    two("tests.training.pair", str(tmp_path), str(model), kind)
    found = [[float.fromhex(x) for x in (tmp_path / f"worker-{r}/losses").read_text().split()] for r in (0, 1)]
    assert found[0] == found[1]
    loose = 2e-2 if "bfloat16" in kind else 1e-4
    assert np.allclose(found[0], bags.losses_of(alone), rtol=loose)
    both = bags.gradient(tmp_path / "worker-0", tmp_path / "worker-1")
    assert bags.apart(bags.gradient(tmp_path / "alone"), both) < (2e-2 if "bfloat16" in kind else 1e-5)
    first, second = ((tmp_path / f"worker-{r}/built").read_text().split() for r in (0, 1))
    if kind.startswith("shards"):
        assert first[:2] == ["meta", "cpu"]
        assert second == ["meta"]


@pytest.mark.slow
def test_only_the_first_worker_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """The second worker's memory grows by its half and a tensor or two, the first one's by half as much again as the
    model at least; and both end up with the same weights, buffers too."""
    two("tests.training.whole", str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert second["grown"] < 0.7 * whole.BYTES < whole.BYTES < first["grown"]
    assert first["total"] == pytest.approx(second["total"], rel=1e-12)
    torch.manual_seed(0)
    alone = whole.build(torch.device("cpu"))
    known = sum(float(tensor.detach().double().sum()) for tensor in (*alone.parameters(), *alone.buffers()))
    assert first["total"] == pytest.approx(known, rel=1e-9)


def two(module: str, *arguments: str) -> None:
    """Run a module as both workers, who find each other at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), port, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=280)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
