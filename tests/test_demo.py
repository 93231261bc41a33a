"""What `make demo` prints at its end: the climb, turn by turn."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from flywheel_tasks import demo
from flywheel_tasks import demo_week as week


class Readout:
    """Of a depth whose Fieller set has no two ends."""

    def __init__(self, kind: str, bounds: list[float | None] | None) -> None:
        self.depth = {"lift_pct": 12.0, "lift_pct_bounds": bounds, "kind": kind}

    def json(self, name: str) -> dict[str, Any]:
        return {"comparisons": {week.ARM: {"depth": self.depth}}, "decisions": [{"verdict": "undecided"}]}


def test_the_climb_shows_every_kind_of_fiellers_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(demo, "gate", lambda cycle: {"decision": "HOLD"})
    monkeypatch.setattr(week, "truth", lambda folder: {"a": dict.fromkeys(("mean", "low", "high"), float("nan"))})
    monkeypatch.setattr(week, "crowned", lambda cycle: False)
    read = [Readout("whole_line", None), Readout("exclusive", [None, 3.0]), Readout("bounded", [-2.0, 8.0])]
    run = demo.Run(datetime.datetime.now(datetime.UTC), [], "success")
    demo.climb([demo.Turn("2026-W48", run, one) for one in read])  # type: ignore[arg-type]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("2026-W48")]
    said = ("+12.0 % [whole_line]", "+12.0 % [unbounded, +3.0]", "+12.0 % [-2.0, +8.0]")
    for line, lift in zip(lines, said, strict=True):
        assert lift in line
        assert "nan [nan, nan]" in line
