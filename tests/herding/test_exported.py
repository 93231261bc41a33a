"""A stage whose checkpoint can't be served as it was trained commits nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.store import Store
from flywheel_tasks.herding.exported import ServingConfig, prove
from tests.curation.curation_runs import commit
from tests.herding.conftest import store as store
from tests.models.engines import SMALL


def test_a_checkpoint_that_nobody_vouches_for_is_not_committed(
    store: Store, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    def run(out: Output) -> None:
        for file in tiny_model.iterdir():
            (out.folder("model") / file.name).write_bytes(file.read_bytes())
        prove(out, 3, ServingConfig(engine=SMALL))

    outputs = {"model": "checkpoint", "steps": "checkpoints"}
    with pytest.raises(FlywheelError, match=r"checkpoint of step 3: model: no trainer_logprobs\.json"):
        commit(store, "sft", outputs, run, "7" * 32)
    assert store.find("sft", "7" * 32) is None
