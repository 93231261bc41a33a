"""A decision for people: a table on the terminal, and the page that a human approver reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flywheel_tasks.core.terminal import Table, line
from flywheel_tasks.evaluation.backtest import PROMPTS, TABLE_10, Replay, summary
from flywheel_tasks.evaluation.gate import Decision, Finding

_COLOUR = {"PASS": "green", "HOLD": "yellow", "BLOCK": "bold red", "NOTE": "dim"}


def render(decision: Decision) -> list[Any]:
    """The decision and every rule, gravest first, ready for `terminal.show`."""
    rows = [(f.rule, (f.verdict, _COLOUR[f.verdict]), f.threshold, f.reason) for f in _gravest_first(decision.findings)]
    return [
        line(f"decision: {decision.decision}", _COLOUR[decision.decision]),
        Table(("rule", "verdict", "threshold", "reason"), rows),
    ]


def render_history(versions: Sequence[Replay]) -> list[Any]:
    """What the gate and each rule alone would have done on a history."""
    rows = []
    for v in versions:
        lifts = ("-" if x is None else f"{x:+.2f}" for x in v.lifts)
        stopped = (
            f"{rule} {said}" for rule, said in v.by_rule.items() if rule in TABLE_10 and said in ("HOLD", "BLOCK")
        )
        rows.append((v.name, *lifts, _verdict(v.decision), _verdict(v.whole), ", ".join(stopped)))
    alone = [(one.rule, one.applies_to, _list(one.held), _list(one.blocked)) for one in summary(versions)]
    return [
        Table(
            ("version", "breadth %", "depth %", "on win-rates", "on all rules", "rules that stop it"), rows, "replay"
        ),
        Table(("rule", "applies to", "would have held", "would have blocked"), alone, "each rule alone"),
        "On win-rates: what the gate of Sec. 3.1.2 knew. On all rules: all that Table 10 has numbers for. Each rate is "
        f"read as one of {PROMPTS:,} prompts, since the history states no sizes. '-': no number for it.",
    ]


def _verdict(decision: Decision | None) -> tuple[str, str]:
    return (decision.decision, _COLOUR[decision.decision]) if decision else ("-", "dim")


def history_json(versions: Sequence[Replay]) -> dict[str, Any]:
    return {
        "assumed_prompts": PROMPTS,
        "versions": [
            {
                "version": v.name,
                "decision": v.decision.decision if v.decision else None,
                "decision_by_all_rules": v.whole.decision if v.whole else None,
                "reasons": v.decision.reasons if v.decision else ["no reward model compared it with a predecessor"],
                "by_rule": v.by_rule,
                "breadth_lift_pct": v.lifts[0],
                "depth_lift_pct": v.lifts[1],
            }
            for v in versions
        ],
        "rules": [line._asdict() for line in summary(versions)],
    }


def page(decision: Decision, title: str, facts: Mapping[str, str]) -> str:
    """The page that an approver reads: no script, nothing fetched, every text escaped; numbers and ids, never words."""
    return html(
        "gate.html.j2",
        title=title,
        decision=decision.decision,
        reasons=decision.reasons,
        facts=list(facts.items()),
        findings=[f._asdict() | {"value": _in_unit(f)} for f in _gravest_first(decision.findings)],
    )


def _in_unit(finding: Finding) -> str:
    """The value in the unit that its threshold is in."""
    value, limit = finding.value, finding.threshold
    if value is None:
        return ""
    if "points" in limit:
        return f"{100 * value:.1f} points"
    return f"{100 * value:.1f} %" if "%" in limit else f"{value:.4g}"


_ODD = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 127, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "�")


def plain(text: str) -> str:
    """Control characters, and those that turn the text around them, are shown and not obeyed."""
    return text.translate(_ODD)


def html(template: str, **values: object) -> str:
    """A template of this package, filled in; whatever comes from outside is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flywheel_tasks.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: plain(value) if isinstance(value, str) else value,
    )
    return environment.get_template(template).render(**values)


def _list(names: Sequence[str]) -> str:
    return " ".join(names) or "-"


def _gravest_first(findings: Sequence[Finding]) -> list[Finding]:
    order = ("BLOCK", "HOLD", "NOTE", "PASS")
    return sorted(findings, key=lambda f: order.index(f.verdict))
