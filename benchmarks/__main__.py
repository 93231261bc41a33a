"""`python -m benchmarks [names] [--quick]`: run benchmarks/bench_*.py, print tables, write results/*.json."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.harness import Report, save, show


def main() -> None:
    found = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of: {', '.join(found) or '(none yet)'}")
    parser.add_argument("--quick", action="store_true", help="small sizes; results go to NAME.quick.json")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(found)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are: {', '.join(found)}")
    for name in options.names or found:
        made = importlib.import_module(f"benchmarks.bench_{name}").main(quick=options.quick)
        for report in [made] if isinstance(made, Report) else made:
            show(report)
            print(f"  -> {save(report, quick=options.quick).name}")


if __name__ == "__main__":
    main()
