"""The picture of the climb: docs/climb.png from benchmarks/results/climb.json (`python -m benchmarks climb`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).parent
RESULT = HERE.parent / "benchmarks" / "results" / "climb.json"
COLOURS = {"whole": "#1b7837", "SFT only": "#2166ac", "no gate": "#d9730d", "signals": "#b2182b"}


def main() -> None:
    found = [row["result"] for row in json.loads(RESULT.read_text())["rows"]]
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (champions, candidates) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    for place, (arm, colour) in enumerate(COLOURS.items()):
        mine = [one for one in found if one["arm"] == arm]
        if mine:
            _reign(champions, mine, colour, 0.06 * (place - 1.5))
            _bets(candidates, mine, colour)
    champions.set_title("true chance that the champion's reply is answered", loc="left", fontsize=10)
    champions.set_xticks(range(4), ["start", "cycle 1", "cycle 2", "cycle 3"])
    champions.set_xlim(-0.3, 3.3)
    champions.legend(frameon=False, fontsize=9)
    candidates.axhline(0, color="#8a94a3", linewidth=0.8)
    candidates.axvline(50, color="#8a94a3", linewidth=0.8)
    candidates.set_title("what a candidate's win-rate was worth (filled: crowned)", loc="left", fontsize=10)
    candidates.set_xlabel("win-rate by the reward that it climbed, %")
    candidates.set_ylabel("true change, points")
    figure.tight_layout()
    figure.savefig(HERE / "climb.png", dpi=120)


def _reign(axes: Any, mine: list[dict[str, Any]], colour: str, shift: float) -> None:
    """Champion by cycle with its interval over questions."""
    reigns = [mine[0]["champion"], *(one["next_champion"] for one in mine)]
    at = [place + shift for place in range(len(reigns))]
    mean = [100 * one["mean"] for one in reigns]
    half = [100 * (one["high"] - one["mean"]) for one in reigns]
    axes.errorbar(at, mean, half, color=colour, marker="o", markersize=4, linewidth=1.6, label=mine[0]["arm"])


def _bets(axes: Any, mine: list[dict[str, Any]], colour: str) -> None:
    """Each candidate: how its own reward ranks it against the champion, and what people think; filled if crowned."""
    for one in (one for one in mine if one["candidate"]):
        rate = one.get("signal_win_rate", one["rm_win_rate"]["pointwise_user"])
        face = colour if one["crowned"] else "none"
        axes.plot(100 * rate, 100 * one["difference"]["mean"], "o", color=colour, markerfacecolor=face)


if __name__ == "__main__":
    main()
