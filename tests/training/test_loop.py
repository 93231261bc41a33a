"""The loop in one process: the update is defined by the global batch, a resume is exact, and bad numbers stop a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from flywheel_tasks.core.errors import CorruptArtifact, InputError
from flywheel_tasks.training import batching, loop, rows, state
from flywheel_tasks.training.loop import run_loop
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import After, Loss, Step, Stop, Values
from tests.training import bags


def test_it_learns(tmp_path: Path) -> None:
    lines = bags.run(tmp_path, epochs=8)
    assert lines[-1]["metrics"]["loss"] < 0.3 * lines[0]["metrics"]["loss"]
    assert lines[-1]["metrics"]["accuracy"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_of_eight_rows_is_eight_passes_of_one(tmp_path: Path, dtype: torch.dtype) -> None:
    """Batch 1 × accumulate 8 equals 8 × 1: a token budget of one forces every row into a pass of its own."""
    whole = bags.run(tmp_path / "whole", what=bags.task(dtype=dtype), epochs=2)
    single = bags.run(tmp_path / "single", what=bags.task(dtype=dtype), epochs=2, token_budget=1)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    assert np.allclose(bags.losses_of(whole), bags.losses_of(single), **close)
    ours, theirs = bags.weights(tmp_path / "whole", 12), bags.weights(tmp_path / "single", 12)
    assert all(torch.allclose(ours[n].float(), theirs[n].float(), **close) for n in ours)


def test_a_ragged_last_batch_weighs_its_rows_alike(tmp_path: Path) -> None:
    """48 rows in batches of 20: the last has 8, and its loss is the mean over those 8."""
    lines = bags.run(tmp_path, batch=20, epochs=1, learning_rate=1e-9)
    sizes = [20, 20, 8]
    whole = bags.run(tmp_path / "whole", batch=48, epochs=1, learning_rate=1e-9)
    mean = np.average(bags.losses_of(lines), weights=sizes)
    assert mean == pytest.approx(whole[0]["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize("stop", [2, 4, 10])
def test_a_resumed_run_has_the_same_losses_to_the_last_bit(tmp_path: Path, stop: int) -> None:
    settings: dict[str, Any] = {"what": bags.task(dropout=0.3), "epochs": 2, "save_every": 2, "token_budget": 200}
    straight = bags.run(tmp_path / "straight", **settings)
    folder = tmp_path / "broken"
    folder.mkdir()
    first = bags.Here(folder, stop_after=stop)
    with pytest.raises(InterruptedError):
        run_loop(bags.job(folder, **settings), World(), first)
    again = bags.Here(folder)
    run_loop(bags.job(folder, **settings), World(), again)
    assert bags.losses_of(again.lines) == bags.losses_of(straight)
    assert [line["step"] for line in again.lines] == list(range(12))
    ours, theirs = bags.weights(folder, 12), bags.weights(tmp_path / "straight", 12)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_dropout_would_show_an_inexact_resume(tmp_path: Path) -> None:
    """The test above can fail: with another seed, dropout changes the losses."""
    one = bags.run(tmp_path / "a", what=bags.task(dropout=0.3), batch=48)
    other = bags.run(tmp_path / "b", what=bags.task(dropout=0.3), batch=48, seed=6)
    assert bags.losses_of(one) != bags.losses_of(other)


def test_nan_stops_the_run_names_the_rows_and_keeps_the_last_state(tmp_path: Path) -> None:
    bad = "pair-007"
    order = [bags.table().column("row_id").to_pylist()[i] for s in range(6) for i in batching.step_rows(48, 8, s, 5)]
    step = order.index(bad) // 8
    link = bags.Here(tmp_path)
    run_loop(bags.job(tmp_path, bags.task(poison=bad), save_every=1, token_budget=1, epochs=1), World(), link)
    message = link.lines[-1]["failed"]
    assert f"at step {step} (rows {bad})" in message
    saved = sorted(tmp_path.glob("step-*"))
    assert len(saved) == step
    tensors, _ = state.load(saved[-1], 0) if saved else ({}, {})
    assert all(t.isfinite().all() for t in tensors.values())


def test_the_parameters_are_untouched_by_the_step_that_failed(tmp_path: Path) -> None:
    """Every row is bad from the start: what is saved would be the initial model, and nothing is published."""
    link = bags.Here(tmp_path)
    poisoned = bags.table().set_column(0, "row_id", pa.array(["x"] * 48))
    run_loop(bags.job(tmp_path, bags.task(poison="x"), poisoned), World(), link)
    assert "the last good checkpoint is step 0" in link.lines[-1]["failed"]
    assert state.published(f"file://{tmp_path}/run") == []


class Recorder:
    """A hook with state: counts steps, stops at one, and averages a parameter."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen, self.stop = torch.zeros(1), stop

    def start(self, module: nn.Module) -> None:
        self.first = next(module.parameters()).detach().clone()

    def after_step(self, at: After) -> Stop | Values | None:
        self.seen += 1
        if self.stop == at.step:
            return Stop(f"enough at {at.step}")
        moved = float((next(at.module.parameters()).detach() - self.first).abs().max())
        return {"seen": float(self.seen), "moved": moved}

    def tensors(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.seen = tensors["seen"]


def test_hooks_report_run_after_the_update_and_survive_a_resume(tmp_path: Path) -> None:
    link = bags.Here(tmp_path, stop_after=4)
    with pytest.raises(InterruptedError):
        run_loop(bags.job(tmp_path, save_every=4, hooks=(Recorder,)), World(), link)
    assert link.lines[0]["metrics"]["moved"] > 0
    again = bags.Here(tmp_path)
    run_loop(bags.job(tmp_path, save_every=4, hooks=(Recorder,)), World(), again)
    assert [line["metrics"]["seen"] for line in again.lines] == list(range(1, 13))


def test_a_hook_stops_the_run_and_the_model_at_that_step_is_published(tmp_path: Path) -> None:
    link = bags.Here(tmp_path)
    run_loop(bags.job(tmp_path, hooks=(lambda: Recorder(stop=3),)), World(), link)
    assert link.lines[-1] == {"step": 3, "metrics": link.lines[-1]["metrics"], "stopped": "enough at 3"}
    assert [p.step for p in state.published(f"file://{tmp_path}/run")] == [4]
    again = bags.Here(tmp_path)
    run_loop(bags.job(tmp_path, hooks=(lambda: Recorder(stop=3),)), World(), again)
    assert len(again.lines) == 4, "a stopped run that is started again has stopped"


class Rollouts:
    """A source whose batches are made on the way, and whose state must come back after a resume."""

    steps = 5

    def __init__(self) -> None:
        self.made = 0

    def batch(self, step: int) -> pa.Table | None:
        assert step == self.made, "a batch was asked for twice or left out"
        self.made += 1
        return bags.table(6, seed=step) if step < 4 else None

    def state(self) -> dict[str, Any]:
        return {"made": self.made}

    def restore(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


def test_a_dynamic_source_feeds_the_same_loop_and_may_end_early(tmp_path: Path) -> None:
    def job() -> Any:
        made = bags.job(tmp_path, save_every=2, source=Rollouts)
        return type(made)(**{**vars(made), "rows": None})

    with pytest.raises(InterruptedError):
        run_loop(job(), World(), bags.Here(tmp_path, stop_after=2))
    link = bags.Here(tmp_path)
    run_loop(job(), World(), link)
    assert [line["step"] for line in link.lines] == [0, 1, 2, 3]
    assert state.published(f"file://{tmp_path}/run")[-1].step == 4


def test_models_are_published_when_asked_for_and_at_the_end(tmp_path: Path) -> None:
    bags.run(tmp_path, publish_every=5)
    assert [p.step for p in state.published(f"file://{tmp_path}/run")] == [5, 10, 12]


def test_a_damaged_checkpoint_or_model_is_refused(tmp_path: Path) -> None:
    bags.run(tmp_path, epochs=1)
    tensors = next(tmp_path.glob("step-*/*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptArtifact, match="start anew"):
        run_loop(bags.job(tmp_path, epochs=1), World(), bags.Here(tmp_path))
    model = next((tmp_path / "run" / "models").glob("step-*/model.safetensors"))
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors is damaged"):
        state.fetch(f"file://{tmp_path}/run", state.published(f"file://{tmp_path}/run")[-1], tmp_path / "copy")


@pytest.mark.parametrize("rank", [0, 3])
def test_shards_of_fewer_workers_are_refused_by_old_workers_and_new_ones(tmp_path: Path, rank: int) -> None:
    for worker in range(2):
        state.save(tmp_path, worker, {"w": torch.zeros(1)}, {"step": 5, "workers": 2})
    with pytest.raises(InputError, match=r"step 5 is in 2 shards, this run has 4 workers: set placement\.workers back"):
        loop._restore(None, tmp_path, World(rank, 4, sharded=True))  # type: ignore[arg-type]


def test_a_shard_that_is_gone_is_no_matter_of_workers(tmp_path: Path) -> None:
    state.save(tmp_path, 0, {"w": torch.zeros(1)}, {"step": 5, "workers": 2})
    with pytest.raises(FileNotFoundError, match="worker-00001"):
        loop._restore(None, tmp_path, World(1, 2, sharded=True))  # type: ignore[arg-type]


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        rows.RowFile.write(f"file://{tmp_path}/rows.arrow", [bags.table().slice(0, 0)])


def test_rows_that_a_learner_has_mapped_stay_while_others_are_written(tmp_path: Path) -> None:
    """Truncated in place, the file would take its readers with it (SIGBUS)."""
    file = tmp_path / "rows.arrow"
    rows.RowFile.write(f"file://{file}", [bags.table(20)])
    before = file.read_bytes()

    def of_another_attempt(whole: bool) -> Iterator[pa.Table]:
        yield bags.table(40, seed=1)
        assert file.read_bytes() == before
        if not whole:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        rows.RowFile.write(f"file://{file}", of_another_attempt(whole=False))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before
    mapped = rows.RowFile(f"file://{file}", 20).open()
    again = rows.RowFile.write(f"file://{file}", of_another_attempt(whole=True))
    assert mapped.to_pylist() == bags.table(20).to_pylist()
    assert again.open().to_pylist() == bags.table(40, seed=1).to_pylist()


def test_one_batch_only(tmp_path: Path) -> None:
    lines = bags.run(tmp_path, batch=1000, epochs=1)
    assert len(lines) == 1


def test_taking_rows_reads_those_rows(tmp_path: Path) -> None:
    table = bags.table(100)
    pieces = [table.slice(i, 7) for i in range(0, 100, 7)]
    opened = rows.RowFile.write(f"file://{tmp_path}/rows.arrow", pieces).open()
    wanted = np.random.default_rng(0).permutation(100)[:30]
    assert rows.take(opened, wanted).to_pylist() == table.take(pa.array(wanted)).to_pylist()


def test_a_metric_that_is_no_number_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = bags.task()

    def loss(module: nn.Module, table: pa.Table, at: Step) -> Loss:
        found = plain.loss(module, table, at)
        return replace(found, sums={**found.sums, "ratio": (float("inf"), 1.0)})

    lines = bags.run(tmp_path, what=replace(plain, loss=loss, metrics=("accuracy", "ratio")), epochs=1)
    assert all("ratio" not in line["metrics"] and line["metrics"]["metrics_left_out"] == 1 for line in lines)
    assert lines[-1]["metrics"]["loss"] < lines[0]["metrics"]["loss"]
    assert "step 0: left out, since they are no numbers: ratio" in caplog.text
    assert [model.step for model in state.published(f"file://{tmp_path}/run")] == [len(lines)]
