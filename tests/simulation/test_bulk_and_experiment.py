from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.simulation.bulk import write_benchmark_log
from flywheel_tasks.simulation.experiment import WINDOW_DAYS, Effect, ab_week, make_exposures, write_ab_week

START = dt.date(2026, 11, 16)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_bulk_log_holds_exactly_what_its_counts_say(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"bulk{ending}"
    truth = write_benchmark_log(path, 5_000, 7, malformed=0.01)
    with pa.input_stream(str(path), compression="detect") as stream:
        lines = stream.read().decode().splitlines()
    events: dict[str, dict[str, str]] = {}
    bad = 0
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            bad += 1
        else:
            assert events.setdefault(event["event_id"], event) == event
    assert len(lines) == truth.lines
    assert (len(events), bad) == (truth.events, truth.malformed) == (5_000, truth.malformed)
    assert truth.lines == truth.events + truth.duplicates + truth.malformed
    assert truth.malformed > 0
    messages = {(e["conversation_id"], e["message_id"]): e for e in events.values() if e["type"] == "message"}
    assert (len(messages), len({c for c, _ in messages})) == (truth.messages, truth.conversations)
    reactions = [e for e in events.values() if e["type"] == "reaction"]
    assert len(reactions) == truth.reactions > 100
    for event in reactions:
        target = messages[event["conversation_id"], event["message_id"]]
        assert target["role"] == "assistant"
        assert target["at"] < event["at"]
        assert target["user_id"] == event["user_id"]
    for (conversation, _), event in messages.items():
        number = int(event["message_id"].rsplit("m", 1)[1])
        assert event["role"] == ("user", "assistant")[number % 2]
        assert number == 0 or messages[conversation, f"{conversation}-m{number - 1}"]["at"] < event["at"]


def test_a_bulk_log_is_seeded_and_its_text_is_varied(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_benchmark_log(tmp_path / name, 20_000, seed)
    a, b, c = ((tmp_path / n).read_bytes() for n in "abc")
    assert a == b != c
    texts = [json.loads(x).get("content") for x in a.decode().splitlines() if x.endswith("}")]
    texts = [t for t in texts if t]
    assert len(set(texts)) > 0.95 * len(texts)


def _lift(test: np.ndarray, control: np.ndarray) -> tuple[float, float]:
    """Relative difference of means and its delta-method standard error."""
    m, c = test.mean(), control.mean()
    variance = test.var() / len(test) / c**2 + (m / c**2) ** 2 * control.var() / len(control)
    return m / c - 1, float(np.sqrt(variance))


def _per_unit(activity: pa.Table, exposures: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    joined = exposures.select(["unit_id", "arm"]).join(
        activity.group_by("unit_id").aggregate([("sends", "sum"), ("day", "count")]), "unit_id", join_type="left outer"
    )
    arms = {}
    for arm in ("control", "test"):
        rows = joined.filter(pa.compute.equal(joined["arm"], arm))
        days = np.nan_to_num(rows["day_count"].to_numpy(zero_copy_only=False).astype(float))
        sends = np.nan_to_num(rows["sends_sum"].to_numpy(zero_copy_only=False).astype(float))
        arms[arm] = (days / WINDOW_DAYS, sends[sends > 0])
    return arms


@pytest.mark.parametrize(("breadth", "depth"), [(0.0, 0.0), (0.088, 0.112), (0.0, 0.3), (0.2, -0.1), (-0.05, 0.0)])
def test_the_week_shows_the_lifts_it_was_given(breadth: float, depth: float) -> None:
    exposures = make_exposures("e1", 200_000, {"control": 0.5, "test": 0.5}, start=START, seed=4)
    activity, truth = ab_week(exposures, {"control": Effect(), "test": Effect(breadth, depth)}, start=START, seed=9)
    assert activity.schema == schemas.ACTIVITY
    assert truth.breadth["test"] / truth.breadth["control"] - 1 == pytest.approx(breadth)
    assert truth.depth["test"] / truth.depth["control"] - 1 == pytest.approx(depth)
    arms = _per_unit(activity, exposures)
    for place, known in enumerate((truth.breadth, truth.depth)):
        for arm in arms:
            values = arms[arm][place]
            assert abs(values.mean() - known[arm]) < 4 * values.std() / np.sqrt(len(values)), (place, arm)
        lift, error = _lift(arms["test"][place], arms["control"][place])
        assert abs(lift - (breadth, depth)[place]) < 4 * error


def test_activity_stays_in_the_window_and_has_strangers(tmp_path: Path) -> None:
    exposures = make_exposures("e1", 2_000, {"control": 0.9, "test": 0.1}, start=START, seed=1)
    assert exposures.schema == schemas.EXPOSURE
    assert 0.07 < exposures["arm"].to_pylist().count("test") / 2_000 < 0.13
    write_ab_week(
        tmp_path / "activity.parquet", exposures, {"control": Effect(), "test": Effect()}, start=START, seed=2
    )
    activity = pq.read_table(tmp_path / "activity.parquet")
    days = set(activity["day"].to_pylist())
    assert days == {START + dt.timedelta(days=d) for d in range(WINDOW_DAYS)}
    assert min(activity["sends"].to_pylist()) >= 1
    assert activity.group_by(["unit_id", "day"]).aggregate([]).num_rows == activity.num_rows
    assert set(activity["unit_id"].to_pylist()) - set(exposures["unit_id"].to_pylist())


def test_effects_that_no_probability_can_have_are_refused() -> None:
    exposures = make_exposures("e1", 10, {"a": 1, "b": 1}, start=START, seed=1)
    with pytest.raises(ValueError, match="arm b can't be simulated"):
        ab_week(exposures, {"a": Effect(), "b": Effect(0.6)}, start=START, seed=1)
    with pytest.raises(ValueError, match="no effect given for arm b"):
        ab_week(exposures, {"a": Effect()}, start=START, seed=1)
