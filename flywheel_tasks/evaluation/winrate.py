"""winrate: how often the reward models prefer the candidate's response over the champion's (Sec. 2.5.1, Figure 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import Operational, StageConfig
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Input, Inputs, Resources, Stage
from flywheel_tasks.evaluation.versus import Matched, match, outcomes, quarantine, rate_of, without
from flywheel_tasks.stats.winrate import WinRate

if TYPE_CHECKING:
    from flywheel_tasks.models.chat import Card
    from flywheel_tasks.models.score import PairRow, Scorer, ScoreRow

_ROWS = 512
Scores = NDArray[np.float64]


class WinRateConfig(StageConfig):
    max_tokens: int = Field(2048, ge=64, description="longest conversation that is scored; more history is cut off")
    draws: int = Field(2000, ge=200, le=100_000, description="bootstrap draws over characters")
    alpha: float = Field(0.05, gt=0, lt=1, description="level of the intervals")
    budget: int = Field(8192, ge=256, description="tokens scored at once", json_schema_extra=Operational)


def run(inputs: Inputs, config: WinRateConfig, out: Output) -> None:
    """Win-rates of the candidate against the champion on the same prompts: pointwise on internal and on user prompts,
    pairwise on user prompts in both orders. A tie is half a win; intervals resample characters.

    Outputs the rates and, for every response that was compared, its scores.
    """
    from flywheel_tasks.models.score import PairRow, ScoreRow

    responses, gone = without(inputs["responses"].read(), inputs.forgotten)
    matched = match(responses, inputs["prompts"].read(["prompt_id", "source"]))
    matched = matched._replace(rejected=pa.concat_tables([gone, matched.rejected]))
    cards = _cards(inputs)
    unmeasured: dict[str, str] = {}
    judged_by: dict[str, str] = {}
    scores: dict[str, tuple[Scores, Scores]] = {}
    outcome: dict[str, Scores] = {}

    if scorer := _scorer(inputs, "pointwise", config, judged_by):
        rows = [_rows(table, cards, ScoreRow) for table in (matched.candidate, matched.champion)]
        total = sum(map(len, rows))
        candidate = _in_chunks(scorer.pointwise, rows[0], lambda n: out.progress(n, total, "responses"))
        champion = _in_chunks(scorer.pointwise, rows[1], lambda n: out.progress(len(rows[0]) + n, total, "responses"))
        scores["pointwise"] = candidate, champion
        outcome["pointwise"] = outcomes(matched, candidate, champion)
    if scorer := _scorer(inputs, "pairwise", config, judged_by):
        pairs = _pairs(matched, cards, PairRow)
        wins = _in_chunks(scorer.pairwise, pairs, lambda n: out.progress(n, len(pairs), "pairs"))
        scores["pairwise_win"] = wins, 1 - wins
        outcome["pairwise"] = outcomes(matched, wins, 1 - wins)

    rates: dict[str, WinRate] = {}
    for model, prompt_set in (("pointwise", "internal"), ("pointwise", "user"), ("pairwise", "user")):
        name = f"{model}_{prompt_set}"
        if model not in outcome:
            unmeasured[name] = f"this cycle has no {model} reward model"
            continue
        found = rate_of(matched, outcome[model], prompt_set, alpha=config.alpha, draws=config.draws, seed=out.seed)
        if found is None:
            unmeasured[name] = f"no {prompt_set} prompt was answered by both models and scored"
        else:
            rates[name] = found
            for field in ("rate", "low", "high", "n"):
                out.metric(f"{name}.{field}", getattr(found, field))
    out.json(
        "winrate",
        {
            "rm_win_rate": {name: found._asdict() for name, found in rates.items()},
            "unmeasured": unmeasured,
            "judged_by": judged_by,
            "alpha": config.alpha,
        },
    )
    _write(matched, scores, outcome, out)


def _scorer(inputs: Inputs, name: str, config: WinRateConfig, judged_by: dict[str, str]) -> Scorer | None:
    from flywheel_tasks.models.resolve import artifact_folder
    from flywheel_tasks.models.score import Scorer

    found = inputs.maybe(name)
    if found is None:
        return None
    artifact, output = found
    judged_by[name] = f"{artifact.manifest.stage}/{artifact.manifest.key}"
    return Scorer(str(artifact_folder(artifact, output)), max_tokens=config.max_tokens, budget=config.budget)


def _cards(inputs: Inputs) -> dict[str, Card]:
    from flywheel_tasks.models.chat import Card

    found = inputs.get("characters")
    return {row["character_id"]: Card.of(row) for row in found.read().to_pylist()} if found else {}


def _rows(table: pa.Table, cards: dict[str, Card], kind: type[ScoreRow]) -> list[ScoreRow]:
    columns = (table.column(name).to_pylist() for name in ("turns", "text", "character_id"))
    return [kind(turns, text, cards.get(character)) for turns, text, character in zip(*columns, strict=True)]


def _pairs(matched: Matched, cards: dict[str, Card], kind: type[PairRow]) -> list[PairRow]:
    columns = [matched.candidate.column(name).to_pylist() for name in ("turns", "text", "character_id")]
    columns.insert(2, matched.champion.column("text").to_pylist())
    return [kind(turns, y0, y1, cards.get(character)) for turns, y0, y1, character in zip(*columns, strict=True)]


def _in_chunks(score: Callable[[Sequence[Any]], Any], rows: Sequence[Any], progress: Callable[[int], None]) -> Scores:
    found = np.empty(len(rows))
    for start in range(0, len(rows), _ROWS):
        found[start : start + _ROWS] = score(rows[start : start + _ROWS])
        progress(min(start + _ROWS, len(rows)))
    return found


def _write(matched: Matched, scores: dict[str, tuple[Scores, Scores]], outcome: dict[str, Scores], out: Output) -> None:
    """Every compared response with its scores; those that no reward model could judge go to quarantine."""
    judged = np.any([np.isfinite(values) for values in outcome.values()], axis=0)
    judged = (
        np.broadcast_to(judged, matched.candidate.num_rows) if outcome else np.ones(matched.candidate.num_rows, bool)
    )
    written, rejected = 0, [matched.rejected]
    with out.table("scored") as writer:
        for side, table in enumerate((matched.candidate, matched.champion)):
            values = [
                [
                    {"name": name, "value": float(pair[side][row])}
                    for name, pair in scores.items()
                    if np.isfinite(pair[side][row])
                ]
                for row in range(table.num_rows)
            ]
            column = pa.array(values, schemas.COMPLETION.field("scores").type)
            table = table.set_column(table.schema.get_field_index("scores"), "scores", column)
            writer.write(table.filter(pa.array(judged)))
            written += int(judged.sum())
            rejected.append(quarantine(table.filter(pa.array(~judged)), "too_long"))
    gone = pa.concat_tables(rejected)
    out.reject(gone)
    out.account("response", rows_in=written + gone.num_rows, rows_out=written)


STAGE = Stage(
    name="winrate",
    phase="evaluation",
    paper="Sec. 2.5.1, 3.1.2, Figure 8",
    inputs={
        "responses": Input("respond", "responses"),
        "prompts": Input("constrain", "prompts"),
        "characters": Input("ingest", "characters", optional=True),
        "pointwise": Input("preference-pointwise", "model", optional=True),
        "pairwise": Input("preference-pairwise", "model", optional=True),
    },
    outputs={"winrate": "json", "scored": "completion"},
    config=WinRateConfig,
    run=run,
    data=("models/card.j2",),
    resources=Resources(cpus=2, gpus=1, memory_gib=16),
)
