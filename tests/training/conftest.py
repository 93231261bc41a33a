"""Models of these tests are tiny: a second thread would cost more than it gives, and fight with other tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
