"""A decision for people: a table on the terminal, and the page that a human approver reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flywheel_tasks.evaluation.backtest import PROMPTS, Replay, summary
from flywheel_tasks.evaluation.gate import Decision, Finding

_COLOUR = {"PASS": "green", "HOLD": "yellow", "BLOCK": "bold red", "NOTE": "dim"}


def render(decision: Decision) -> Any:
    """The decision and every rule, gravest first, ready for a rich console."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("rule", "verdict", "threshold", "reason"):
        table.add_column(name, overflow="fold")
    for f in _gravest_first(decision.findings):
        table.add_row(f.rule, Text(f.verdict, style=_COLOUR[f.verdict]), Text(f.threshold), Text(f.reason))
    return Group(Text(f"decision: {decision.decision}", style=_COLOUR[decision.decision]), table)


def render_history(versions: Sequence[Replay]) -> Any:
    """What the gate and each rule alone would have done on a history."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rules = list(versions[0].by_rule) if versions else []
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="replay", title_justify="left")
    for name in ("version", "breadth %", "depth %", "the gate", *rules):
        table.add_column(name, overflow="fold")
    for v in versions:
        verdicts = [v.decision.decision if v.decision else None, *(v.by_rule[name] for name in rules)]
        cells = [Text(w, style=_COLOUR[w]) if w else Text("-", style="dim") for w in verdicts]
        table.add_row(Text(v.name), *(Text("-" if x is None else f"{x:+.2f}") for x in v.lifts), *cells)
    alone = Table(box=SIMPLE_HEAD, pad_edge=False, title="each rule alone", title_justify="left")
    for name in ("rule", "applies to", "would have held", "would have blocked"):
        alone.add_column(name, overflow="fold")
    for line in summary(versions):
        alone.add_row(Text(line.rule), str(line.applies_to), Text(_list(line.held)), Text(_list(line.blocked)))
    note = f"Each rate is read as one of {PROMPTS:,} prompts, since the history states no sizes. '-': no number for it."
    return Group(table, alone, Text(note, style="dim"))


def history_json(versions: Sequence[Replay]) -> dict[str, Any]:
    return {
        "assumed_prompts": PROMPTS,
        "versions": [
            {
                "version": v.name,
                "decision": v.decision.decision if v.decision else None,
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
        findings=_gravest_first(decision.findings),
    )


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
