"""What annotators write goes through the filter of Phase I (Sec. 2.2.1, 2.2.2, 2.6), as everybody's words do.

A rewrite is read as the reply of its conversation, a next message as what is said after the response that the session
goes on with. Text that the filter would drop stays out; the vote that it came with counts all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.annotation.resolve import Resolved
from flywheel_tasks.annotation.sessions import MODES, continued
from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.curation.privacy import PrivacyConfig
from flywheel_tasks.curation.prompts import PromptConfig
from flywheel_tasks.curation.safety import SafetyConfig
from flywheel_tasks.curation.scrubbing import CLASSIFIER_ERROR, Rules, clean

_BATCH = 2048
UNHEARD = f"next_message_{CLASSIFIER_ERROR}"
"""Why a next message stays out that no classifier could judge."""
Outcome = tuple[str | None, str | None]
"""Of a conversation: its last turn's text as the filter leaves it, or why the filter drops it."""


class _Said(NamedTuple):
    """One text: whose review (its place), which field, and the whole conversation that it ends."""

    place: int
    field: str
    turns: list[dict[str, Any]]


def rules(inputs: Inputs) -> Rules:
    """Those of the cycle's filter; in a store without one, the filter's defaults."""
    found = inputs.maybe("filter")
    told = found[0].manifest.config if found else {}
    privacy = PrivacyConfig.model_validate(told.get("privacy", {}))
    return Rules(privacy, SafetyConfig.model_validate(told.get("safety", {})), LanguageConfig(), PromptConfig())


def filtered(
    resolved: Sequence[Resolved], ledger: pa.Table, of_filter: Rules, seed: int
) -> tuple[list[Resolved], list[Resolved]]:
    """The reviews with their words as the filter leaves them, and for every text that it drops a refusal."""
    kept, refused = list(resolved), list[Resolved]()
    told = list(_said(resolved, ledger, seed))
    for start in range(0, len(told), _BATCH):
        some = told[start : start + _BATCH]
        for said, (text, reason) in zip(some, _cleaned([said.turns for said in some], of_filter), strict=True):
            one = kept[said.place]
            if said.field == "next_message":
                kept[said.place] = one._replace(next_message=text)
            else:
                kept[said.place] = one._replace(row=(one.row or {}) | {"rewrite": text})
            if reason:
                refused.append(one._replace(next_message=None, reason=f"{said.field}_{reason}"))
    return kept, refused


def _said(resolved: Sequence[Resolved], ledger: pa.Table, seed: int) -> Iterator[_Said]:
    spoken = {one.row["pair_id"] for one in resolved if one.row and (one.row["rewrite"] or one.next_message)}
    pairs = {
        pair["pair_id"]: pair
        for pair in ledger.filter(pc.is_in(ledger["pair_id"], pa.array(sorted(spoken), pa.string()))).to_pylist()
    }
    for place, one in enumerate(resolved):
        if one.row is None:
            continue
        if one.row["rewrite"]:
            reply = {"role": "assistant", "content": one.row["rewrite"]}
            yield _Said(place, "rewrite", [*pairs[one.row["pair_id"]]["turns"], reply])
        if one.next_message and one.row["mode"] in MODES:
            pair = pairs[one.row["pair_id"]]
            goes_on = {"role": "assistant", "content": pair[continued(pair, seed)]}
            yield _Said(place, "next_message", [*pair["turns"], goes_on, {"role": "user", "content": one.next_message}])


def unjudged(unfit: Sequence[Resolved]) -> list[Resolved]:
    """Those refusals that say nothing about the words: the classifier failed, and may do better another time."""
    return [one for one in unfit if (one.reason or "").endswith(CLASSIFIER_ERROR)]


def _cleaned(conversations: Sequence[list[dict[str, Any]]], of_filter: Rules) -> list[Outcome]:
    found = _outcomes(conversations, of_filter)
    if any(reason == CLASSIFIER_ERROR for _, reason in found):
        # A delivery is read once more at most: what a guard that stays down could not judge would be lost, and nobody
        # would know.
        (_, silent), *_ = _outcomes([[{"role": "user", "content": "Good morning!"}]], of_filter)
        if silent:
            raise FlywheelError(
                f"annotations: the filter's {of_filter.safety.classifier} classifier cannot judge even a greeting: see "
                "whether it is up, then run the stage again"
            )
    return found


def _outcomes(conversations: Sequence[list[dict[str, Any]]], of_filter: Rules) -> list[Outcome]:
    same = dict.fromkeys(("user", "character_id", "locale"), "") | {"source": "internal", "split": "train"}
    rows = [
        same | {"conversation_id": str(number), "turns": [turn | {"at": 0} for turn in turns]}
        for number, turns in enumerate(conversations)
    ]
    made = clean(pa.Table.from_pylist(rows, schema=schemas.CONVERSATION), "reviews", 0, of_filter)
    texts = {row["conversation_id"]: row["turns"][-1]["content"] for row in made.conversations.to_pylist()}
    reasons = {row["row_id"]: row["reason"] for row in made.rejected.to_pylist()}
    return [(texts.get(str(number)), reasons.get(str(number))) for number in range(len(rows))]
