"""Models of these tests are tiny: a second thread would cost more than it gives, and fight with other tests."""

from __future__ import annotations

import os

import pytest
import torch

# TRL imports Ray, which reads this once, before any test of ours has started one.
os.environ.setdefault("RAY_AUTH_MODE", "token")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
