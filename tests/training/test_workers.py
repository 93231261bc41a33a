"""Two workers make the update of one, as copies of the model and as shards of it (FSDP2), on real layers."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.training import bags, pair


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "copies-lora-float32",
        "copies-full-bfloat16",
        "shards-lora-bfloat16",
        "shards-lora-float32",
        "shards-full-float32",
    ],
)
def test_two_workers_make_the_update_of_one(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    alone = bags.run(tmp_path / "alone", **pair.settings(tiny_model, kind))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.pair", str(rank), port, str(tmp_path), str(tiny_model), kind],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=280)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    found = [[float.fromhex(x) for x in (tmp_path / f"worker-{r}/losses").read_text().split()] for r in (0, 1)]
    assert found[0] == found[1]
    loose = 2e-2 if kind.endswith("bfloat16") else 1e-4
    assert np.allclose(found[0], bags.losses_of(alone), rtol=loose)
    both = bags.gradient(tmp_path / "worker-0", tmp_path / "worker-1")
    assert bags.apart(bags.gradient(tmp_path / "alone"), both) < (2e-2 if kind.endswith("bfloat16") else 1e-5)
