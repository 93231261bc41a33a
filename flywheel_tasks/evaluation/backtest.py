"""The gate on a history of versions (Table 10): what it would have decided, and what each rule alone would have done.

A history carries no sample sizes, so one is assumed for all and stated. Rules that Table 10 has no numbers for are not
in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from flywheel_tasks.evaluation.evidence import REWARD_MODELS, Change, Evidence, Metrics, Rate, WinRates
from flywheel_tasks.evaluation.gate import RULES, Decision, Finding, Verdict, decide
from flywheel_tasks.evaluation.gate_config import GateConfig
from flywheel_tasks.evaluation.history import Version

PROMPTS = 2000
TABLE_10 = ("win_rate", "loss", "divergence", "disagreement", "steerability", "false_refusal")
"""The rules that Table 10 has numbers for."""
BARE_LIMITS: dict[str, float] = {"bare < 60 %": 0.60, "bare < 65 %": 0.65, "bare < 70 %": 0.70}
"""Limits without a middle ground, beside the gate's rules."""
_REPLAY_AT = datetime(2025, 4, 1, tzinfo=UTC)


class Replay(NamedTuple):
    """One version of the history, and what the gate says of it."""

    name: str
    decision: Decision | None
    """On win-rates alone, which the gate of Sec. 3.1.2 knew. None where no reward model compared it with a predecessor:
    there was nothing to decide on."""
    whole: Decision | None
    """By every rule that Table 10 has numbers for."""
    by_rule: dict[str, Verdict | None]
    lifts: tuple[float | None, float | None]
    """Breadth and depth in its A/B test, in percent."""


class Alone(NamedTuple):
    """What one rule would have done by itself, and the lifts (breadth, depth) of the versions it would have stopped."""

    rule: str
    applies_to: int
    held: list[str]
    blocked: list[str]
    lifts: dict[str, tuple[float | None, float | None]]


def backtest(history: Sequence[Version], config: GateConfig) -> list[Replay]:
    """Replay every version against the one before it: on win-rates, which is what the gate of Sec. 3.1.2 knew, and on
    all that Table 10 has."""
    lenient = config.model_copy(update={"require": ()})
    found: list[Replay] = []
    for index, version in enumerate(history):
        wins = Evidence(candidate=version.name, rm_win_rate=_wins(version))
        whole = wins.model_copy(update={"metrics": _changes(version, history[index - 1]) if index else None})
        alone = {name: _alone(list(RULES[name](whole, lenient, _REPLAY_AT))) for name in TABLE_10}
        compared = wins.has("rm_win_rate")
        decision, all_rules = (decide(e, lenient, _REPLAY_AT) if compared else None for e in (wins, whole))
        lifts = tuple(version.numbers[name].value if name in version.numbers else None for name in ("breadth", "depth"))
        found.append(Replay(version.name, decision, all_rules, alone | _bare(wins), (lifts[0], lifts[1])))
    return found


def summary(versions: Sequence[Replay]) -> list[Alone]:
    """For the gate on win-rates, on all rules, and for each rule alone: which versions it would have held or blocked,
    and the lifts these gave."""
    verdicts: dict[str, dict[str, Verdict | None]] = {
        "on win-rates": {v.name: v.decision.decision if v.decision else None for v in versions},
        "on all rules": {v.name: v.whole.decision if v.whole else None for v in versions},
    }
    for rule in versions[0].by_rule if versions else ():
        verdicts[rule] = {v.name: v.by_rule[rule] for v in versions}
    return [
        Alone(
            rule=rule,
            applies_to=sum(verdict is not None for verdict in said.values()),
            held=[name for name, verdict in said.items() if verdict == "HOLD"],
            blocked=[name for name, verdict in said.items() if verdict == "BLOCK"],
            lifts={v.name: v.lifts for v in versions if said[v.name] in ("HOLD", "BLOCK")},
        )
        for rule, said in verdicts.items()
    ]


def _bare(evidence: Evidence) -> dict[str, Verdict | None]:
    rates = [r.rate for r in vars(evidence.rm_win_rate).values() if r is not None]
    if not rates:
        return dict.fromkeys(BARE_LIMITS)
    return {name: "BLOCK" if max(rates) >= limit else "PASS" for name, limit in BARE_LIMITS.items()}


def _alone(found: Sequence[Finding]) -> Verdict | None:
    if not found:
        return None
    verdicts = {f.verdict for f in found}
    return "BLOCK" if "BLOCK" in verdicts else "HOLD" if "HOLD" in verdicts else "PASS"


def _wins(version: Version) -> WinRates:
    return WinRates(**{name: _rate(version, name) for name in REWARD_MODELS})


def _changes(version: Version, before: Version) -> Metrics:
    both = {name: (_rate(version, name), _rate(before, name)) for name in Metrics.model_fields}
    return Metrics(**{name: Change(candidate=new, champion=old) for name, (new, old) in both.items() if new and old})


def _rate(version: Version, name: str) -> Rate | None:
    # A percentage with one decimal times 0.01 is off in the last bit, and 65 % must be 65 %.
    number = version.numbers.get(name)
    return None if number is None else Rate(rate=round(number.value, 12), n=PROMPTS)
