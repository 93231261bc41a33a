"""A cycle that several drills look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills.lived import Lived


@pytest.fixture(scope="session")
def lived(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Lived:
    return Lived(tmp_path_factory.mktemp("lived"), tiny_model)
