"""Does the flywheel climb? Three cycles on simulated people with a known latent engagement, against three ways to lose.

    whole      every stage, the gate, an A/B week; a champion changes only when the readout says ship
    SFT only   the candidate is the SFT model on rejection-sampled answers
    signals    RL is rewarded by the user-signal model itself (Sec. 3.5.5 forbids it; the product's configuration too)
    no gate    every candidate becomes champion

`--quick` is the first seed's first cycle alone. Work is kept under $FLYWHEEL_HOME/climb: a run that was cut off goes on
there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.climb_wheel import ARMS, SIZES, UNITS, Bench, Wheel
from benchmarks.harness import Report, Row
from flywheel_tasks.core import ids
from flywheel_tasks.core.config import home

CYCLES = ("2026-W40", "2026-W41", "2026-W42")
SEEDS = (26,)


def main(quick: bool) -> Report:
    os.environ.setdefault(ids.USER_KEY_VARIABLE, "climb-only-key-0123456789abcdef")
    found: list[dict[str, Any]] = []
    for seed in SEEDS[:1] if quick else SEEDS:
        bench = Bench(home().absolute() / "climb" / str(seed), seed)
        wheels = [Wheel(arm, bench) for arm in ARMS]
        for cycle in CYCLES[:1] if quick else CYCLES:
            for wheel in wheels:
                found.append({"seed": seed} | _kept(wheel, cycle))
                print(line(found[-1]), flush=True)
    return report(found)


def report(found: list[dict[str, Any]]) -> Report:
    rows = []
    for one in found:
        seconds = round(one["seconds"], 1)
        result = {name: value for name, value in one.items() if name != "next_path"}
        name = f"{one['arm']}, {one['cycle']}, seed {one['seed']}"
        rows.append(Row(name, seconds, [seconds], seconds, 0.0, 0.0, None, result, [result]))
    return Report("climb", "true chance that a reply is answered, by cycle", "cycles", rows, notes(found))


def _kept(wheel: Wheel, cycle: str) -> dict[str, Any]:
    """The cycle, or what an earlier run of the benchmark found of it."""
    file: Path = wheel.folder / f"{cycle}.json"
    if file.exists():
        found = json.loads(file.read_text())
        wheel.champion = wheel.champion.model_copy(update={"path": found["next_path"]})
        return dict(found)
    found = wheel.turn(cycle)
    found["next_path"] = wheel.champion.path
    file.write_text(json.dumps(found, indent=1))
    return found


def line(one: dict[str, Any]) -> str:
    def span(x: dict[str, float]) -> str:
        return f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"

    began = f"seed {one['seed']}  {one['arm']:<9} {one['cycle']}  champion {span(one['champion'])}  "
    if one["candidate"] is None:
        return f"{began}no candidate: {one['gate_reasons'][0]}"
    change = one["difference"]
    rates = ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in one["rm_win_rate"].items())
    signal = f", signals {100 * one['signal_win_rate']:.0f} %" if "signal_win_rate" in one else ""
    guarded = f", RL's guardrail would say {one['rl_guardrail']['level']}" if "rl_guardrail" in one else ""
    return (
        f"{began}candidate {span(one['candidate'])}  change {change['mean']:+.3f} "
        f"[{change['low']:+.3f}, {change['high']:+.3f}]  win-rates {rates}{signal}{guarded}  "
        f"gate {one['gate']}  A/B {one['ab']}  {'crowned' if one['crowned'] else 'not crowned'}  "
        f"then {span(one['next_champion'])}"
    )


def notes(found: list[dict[str, Any]]) -> list[str]:
    return [
        *(line(one) for one in found),
        f"A/B weeks of {UNITS:,} units an arm with the true effect",
        "set after looks at seeds 23 to 25, which are not among these: the gate's style line, what the arm 'signals' "
        "is free of, conversations that end, people in an A/B week; after a look at seed 26: what nobody can read",
        f"over the demo's profile: {', '.join(SIZES)}",
        "seconds are those of the last start: what an earlier one had made was not made again",
    ]
