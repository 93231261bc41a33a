"""Evidence from the stages' reports: what was to be measured and was not is a gap that is named, never a silent one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flywheel_tasks.evaluation.assemble import assemble
from flywheel_tasks.evaluation.gate import decide
from flywheel_tasks.evaluation.gate_config import GateConfig

MMLU = {side: {"rate": 0.5, "n": 100} for side in ("candidate", "champion")}


def reasons(sections: dict[str, Any], *waived: str) -> list[str]:
    found = decide(assemble(sections, {}), GateConfig(require=(), waived=waived), datetime.now(UTC))
    return [reason for reason in found.reasons if "could not be measured" in reason]


def test_a_benchmark_that_has_files_and_was_not_run_is_a_gap_until_it_is_waived() -> None:
    report = {"benchmarks": {"benchmarks": {"mmlu": MMLU}, "skipped": ["humaneval", "mbpp"]}}
    first, second = reasons(report)
    assert first.startswith("BLOCK: benchmarks.humaneval could not be measured")
    assert "benchmarks.run_code is off" in first
    assert second.startswith("BLOCK: benchmarks.mbpp")
    assert reasons(report, "benchmarks.humaneval", "benchmarks.mbpp") == []


def test_a_metric_that_one_side_has_no_number_for_is_a_gap_whoever_judges() -> None:
    for trusted in (True, False):
        new = {"value": None, "n": 0, "why": "no response could be judged"}
        old = {"value": 0.1, "n": 10, "can_gate": trusted}
        report = {
            "policies": {side: {"instruction_violation": one} for side, one in (("candidate", new), ("champion", old))}
        }
        (gap,) = [reason for reason in reasons({"metrics": report}) if "instruction_violation" in reason]
        assert "no response could be judged (candidate)" in gap
