"""The readout as the benchmark calls it; scipy is imported here because imports are not what is timed."""

from __future__ import annotations

import scipy.optimize
import scipy.special

from benchmarks.bench_readout import AS_OF
from benchmarks.readout_files import files
from flywheel_tasks.release.parts import find
from flywheel_tasks.release.population import read_log
from flywheel_tasks.release.read import totals_of
from flywheel_tasks.release.readout_cli import read_out_files
from flywheel_tasks.release.readout_config import ReadoutConfig
from flywheel_tasks.release.resolve import resolve_window

IMPORTED = (scipy.optimize, scipy.special)


def sums(folder: str, layout: bool) -> dict[str, list[int]]:
    exposures, activity = (find(f, "Parquet") for f in files(folder, layout))
    config = ReadoutConfig(as_of=AS_OF)
    log = read_log(exposures, None, with_ids=not layout)
    totals, _ = totals_of(log, exposures, activity, config, resolve_window(log, activity, config).window)
    out = {}
    for group, m in sorted(totals.items()):
        out[group[0]] = [m["breadth"].n, *m["breadth"][1:], m["depth"].n, *m["depth"][1:]]
    return out


def whole(folder: str, layout: bool) -> str:
    return read_out_files(*files(folder, layout), ReadoutConfig(as_of=AS_OF)).decisions[0].verdict
