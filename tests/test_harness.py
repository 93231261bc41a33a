"""The benchmark harness measures what it says: time, the memory of a whole process tree, and failures as failures."""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.harness import Contender, Report, compare, machine, save, show

MIB = 1024 * 1024


def sleeps(seconds: float) -> dict[str, float]:
    time.sleep(seconds)
    return {"slept": seconds}


def holds(mib: int, in_child: bool) -> None:
    """Touch memory for a second, here or in a child process."""
    code = f"import time; x = bytearray({mib * MIB}); time.sleep(1)"
    if in_child:
        import subprocess

        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        exec(code)


def fails() -> None:
    raise ValueError("the reason")


def contender(name: str, function: str, **kwargs: Any) -> Contender:
    return Contender(name, f"tests.test_harness:{function}", kwargs, work=10)


def test_time_is_the_calls_own_and_commands_count_whole() -> None:
    command = Contender("command", [sys.executable, "-c", "import time; time.sleep(0.3)"])
    report = compare("t", "title", [contender("call", "sleeps", seconds=0.3), command], repeats=3, unit="naps")
    call, whole = report.rows
    assert 0.3 <= call.wall_s < 1.0
    assert call.process_s > call.wall_s
    assert whole.wall_s == whole.process_s >= 0.3
    assert len(call.wall_all_s) == 3
    assert call.rate == pytest.approx(10 / call.wall_s, rel=0.01)
    assert call.result == {"slept": 0.3}


@pytest.mark.parametrize("in_child", [False, True])
def test_memory_is_that_of_the_whole_tree(in_child: bool) -> None:
    rows = compare(
        "m", "m", [contender(str(size), "holds", mib=size, in_child=in_child) for size in (50, 250)], repeats=1
    ).rows
    assert 150 < rows[1].peak_pss_mib - rows[0].peak_pss_mib < 250
    assert rows[1].max_rss_mib > 250


def test_a_contender_that_fails_hangs_or_differs_stops_the_benchmark() -> None:
    with pytest.raises(SystemExit, match=r"'bad' failed \(exit 1\)[\s\S]*the reason"):
        compare("f", "f", [contender("bad", "fails")], repeats=1)
    with pytest.raises(SystemExit, match=r"'slow' failed \(over 1 s\)"):
        compare("f", "f", [contender("slow", "sleeps", seconds=30)], repeats=1, timeout_s=1)
    assert not [p for p in psutil.Process().children(recursive=True) if "benchmarks.harness" in p.cmdline()]

    def same(values: dict[str, Any]) -> None:
        if values["a"] != values["b"]:
            raise SystemExit(f"different answers: {values}")

    with pytest.raises(SystemExit, match="different answers"):
        compare(
            "d",
            "d",
            [contender("a", "sleeps", seconds=0.0), contender("b", "sleeps", seconds=0.01)],
            repeats=1,
            agree=same,
        )


def test_results_tell_the_machine_but_not_which_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report: Report = compare("r", "The title", [contender("call", "sleeps", seconds=0.0)], repeats=1, notes=["a note"])
    show(report)
    printed = capsys.readouterr().out
    assert "The title" in printed
    assert "a note" in printed
    text = save(report, tmp_path, quick=True).read_text()
    body = json.loads(text)
    assert body["quick"]
    assert body["machine"] == machine()
    assert body["machine"]["cores"] >= 1
    assert platform.node() not in text
    assert str(Path.home()) not in text
