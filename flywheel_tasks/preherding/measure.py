"""One version of a preference model on held-out pairs, beside the versions before it (Sec. 3.4, Table 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.quarantine import quarantined
from flywheel_tasks.models.chat import Card, card_of
from flywheel_tasks.models.resolve import local_folder
from flywheel_tasks.models.score import PairRow, Scorer, ScoreRow
from flywheel_tasks.preherding import accuracy, table8
from flywheel_tasks.preherding.accuracy import Floats
from flywheel_tasks.preherding.preference_config import PreferenceConfig
from flywheel_tasks.stats import winrate
from flywheel_tasks.training.encode import with_card

Kind = Literal["pointwise", "pairwise"]


@dataclass(frozen=True)
class Measured:
    report: dict[str, Any]
    rejected: pa.Table
    rows: int


def margins(kind: Kind, scorer: Scorer, pairs: pa.Table, cards: Mapping[str, Card]) -> Floats:
    """By how much the model prefers the chosen response: its sigmoid is the probability (eq. 1, 2). NaN where a
    response does not fit. The pairwise model reads both orders."""
    rows = pairs.select(["turns", "chosen", "rejected", "character_id"]).to_pylist()
    if kind == "pairwise":
        p = scorer.pairwise(
            [PairRow(r["turns"], r["chosen"], r["rejected"], card_of(cards, r["character_id"])) for r in rows]
        )
        p = np.clip(p.astype(np.float64), 1e-9, 1 - 1e-9)
        return np.log(p / (1 - p))
    sides = [
        scorer.pointwise([ScoreRow(r["turns"], r[side], card_of(cards, r["character_id"])) for r in rows])
        for side in ("chosen", "rejected")
    ]
    return (sides[0] - sides[1]).astype(np.float64)


def run(
    kind: Kind,
    held_out: pa.Table,
    cards: Mapping[str, Card],
    version: str,
    before: Mapping[str, Any],
    config: PreferenceConfig,
    out: Output,
) -> Measured:
    """Measure the new model, and earlier versions on the same pairs; write Table 8 and its figure."""
    readable, strangers = with_card(held_out, cards, "preference_id")
    scorer, seed = Scorer(out.folder("model"), max_tokens=config.max_tokens), out.seed
    margin = margins(kind, scorer, readable, cards)
    fits = np.isfinite(margin)
    if not fits.any():
        raise InputError(
            f"none of {held_out.num_rows} held-out pairs can be measured: {strangers.num_rows} are of characters "
            f"without a card, the others are longer than max_tokens={config.max_tokens}: raise it"
        )
    pairs, margin = readable.filter(pa.array(fits)), margin[fits]
    outcomes = winrate.compare(margin, np.zeros_like(margin))
    earlier, purged = _earlier(kind, pairs, cards, _recent(before["versions"], version, config.earlier_versions))
    cells = accuracy.by_batch(pairs, outcomes, version, seed=seed)
    for name, theirs in earlier.items():
        both = np.isfinite(theirs)
        cells += accuracy.by_batch(pairs.filter(pa.array(both)), theirs[both], name, seed=seed)
    blind = accuracy.baselines(pairs)
    newest = version.removeprefix("RM_")
    lost: list[accuracy.Drop] = []
    for theirs in list(earlier.values())[-1:]:
        both = np.isfinite(theirs)
        lost += accuracy.drops(pairs.filter(pa.array(both)), theirs[both], outcomes[both], newest, seed=seed)
    calibrated = accuracy.calibration(margin)
    matrix = table8.merge(before["matrix"], cells)
    out.file("table8", "table8.csv").write_text(table8.to_csv(matrix))
    table8.draw(matrix, f"{kind.capitalize()} preference model by batch", out.file("figure", "table8.png"))
    overall = {name: accuracy.overall(pairs, found, seed=seed) for name, found in {"model": outcomes, **blind}.items()}
    for name, share in overall.items():
        out.metric(f"eval/accuracy/{name}", share["accuracy"])
    out.metric("eval/calibration_error", calibrated["expected_calibration_error"])
    report = {
        "kind": kind,
        "version": version,
        "overall": overall,
        "accuracy": [cell for cell in cells if cell["model"] == version],
        "baselines": [c for name, found in blind.items() for c in accuracy.by_batch(pairs, found, name, seed=seed)],
        "calibration": calibrated,
        "lost_on_old_batches": lost,
        "not_measured_again": purged,
        "too_long": scorer.too_long,
        "dropped_turns": scorer.dropped_turns,
        "matrix": matrix,
        "versions": [*_others(before["versions"], version), {"version": version, "uri": f"{out.uri}/model"}],
    }
    too_long = quarantined(readable.filter(pa.array(~fits)), "preference_id", "too_long")
    return Measured(report, pa.concat_tables([strangers, too_long]), pairs.num_rows)


def _earlier(
    kind: Kind, pairs: pa.Table, cards: Mapping[str, Card], versions: list[dict[str, str]]
) -> tuple[dict[str, Floats], list[dict[str, str]]]:
    """What each earlier version makes of the pairs, NaN where one does not fit it; and versions that are no longer
    there, with the reason."""
    found: dict[str, Floats] = {}
    gone: list[dict[str, str]] = []
    for known in versions:
        try:
            folder = local_folder(known["uri"])
        except FlywheelError as error:
            gone.append({"version": known["version"], "reason": str(error)[:300]})
            continue
        margin = margins(kind, Scorer(folder), pairs, cards)
        fits = np.isfinite(margin)
        outcomes = np.full(len(margin), np.nan)
        outcomes[fits] = winrate.compare(margin[fits], np.zeros(int(fits.sum())))
        if fits.any():
            found[known["version"]] = outcomes
        else:
            gone.append({"version": known["version"], "reason": "no held-out pair fits it"})
    return found, gone


def _recent(versions: list[dict[str, str]], version: str, most: int) -> list[dict[str, str]]:
    others = _others(versions, version)
    return others[max(len(others) - most, 0) :]


def _others(versions: list[dict[str, str]], version: str) -> list[dict[str, str]]:
    """A version trained again on the same newest batch takes the place of the old one."""
    return [known for known in versions if known["version"] != version]
