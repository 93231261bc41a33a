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
    seeds = sorted({one["seed"] for one in found})
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, len(seeds) + 1, figsize=(5 * len(seeds) + 3, 3.6))
    *reigns, bets = panels
    for axes, seed in zip(reigns, seeds, strict=True):
        for place, (arm, colour) in enumerate(COLOURS.items()):
            mine = [one for one in found if (one["arm"], one["seed"]) == (arm, seed)]
            if mine:
                _reign(axes, mine, colour, 0.06 * (place - 1.5))
                _bets(bets, mine, colour)
        axes.set_title(f"chance that the champion is answered, %: seed {seed}", loc="left", fontsize=10)
        axes.set_xticks(range(4), ["start", "cycle 1", "cycle 2", "cycle 3"])
        axes.set_xlim(-0.3, 3.3)
        axes.sharey(reigns[0])
        axes.legend(frameon=False, fontsize=9)
    bets.axhline(0, color="#8a94a3", linewidth=0.8)
    bets.axvline(50, color="#8a94a3", linewidth=0.8)
    bets.set_title("candidates (filled: crowned)", loc="left", fontsize=10)
    bets.set_xlabel("win-rate by the reward that it climbed, %")
    bets.set_ylabel("true change, points")
    figure.tight_layout()
    figure.savefig(HERE / "climb.png", dpi=110)


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
