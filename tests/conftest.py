"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from flywheel_tasks.core import ids
from tests.tiny_llama import build_tiny_llama

settings.register_profile("flywheel", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", parent=settings.get_profile("flywheel"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "flywheel"))

ROOT = Path(__file__).resolve().parent.parent
USER_KEY = "test-only-user-key-0123456789abcdef"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("FLYWHEEL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set FLYWHEEL_DATA to the folder that holds it")
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tiny random Llama; read it, never write to it."""
    return build_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def user_key(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The key that user ids are pseudonymised with, set in the environment for one test."""
    monkeypatch.setenv(ids.USER_KEY_VARIABLE, USER_KEY)
    return USER_KEY.encode()
