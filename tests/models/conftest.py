"""One real engine for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_tasks.models.engine import Engine
from tests.models.engines import shared


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Engine:
    """Untied, serving `tiny_model`; whoever updates its weights puts these back."""
    return shared(tiny_model)
