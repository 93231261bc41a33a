"""The filter's batch function: conversations in; cleaned conversations, prompts and rejections out (Sec. 2.6)."""

from collections import Counter
from typing import Final, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from flywheel_tasks.core import schemas
from flywheel_tasks.core.quarantine import FORGOTTEN
from flywheel_tasks.curation import language, privacy, prompts, safety
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.curation.privacy import PrivacyConfig, Scrubbed
from flywheel_tasks.curation.prompts import PromptConfig, TurnMarks
from flywheel_tasks.curation.safety import SafetyConfig, Turns

CLASSIFIER_ERROR: Final = "classifier_error"
UNSAFE_PROMPT: Final = "unsafe_prompt"
UNSAFE_RESPONSE: Final = "unsafe_response"
NO_USER_TURN: Final = "no_user_turn"

Counts = dict[tuple[str, ...], int]


class Rules(NamedTuple):
    """Everything the batch function depends on beside the batch."""

    privacy: PrivacyConfig
    safety: SafetyConfig
    language: LanguageConfig
    prompts: PromptConfig
    champion: str | None = None
    forgotten: frozenset[str] = frozenset()


class Cleaned(NamedTuple):
    """One batch after the filter; `counts` holds nothing but labels and numbers."""

    conversations: pa.Table
    prompts: pa.Table
    rejected: pa.Table
    counts: Counts


def clean(table: pa.Table, part: str, first_row: int, rules: Rules) -> Cleaned:
    """Filter one batch. Every conversation comes out once: cleaned, or rejected with the first reason that holds."""
    table = table.combine_chunks()
    reason = np.full(table.num_rows, None, object)
    _reject(reason, pc.is_in(table["user"], pa.array(sorted(rules.forgotten), pa.string())).to_numpy(), FORGOTTEN)
    turns, owner = _flat_turns(table)
    content = privacy.scrub(turns.field("content"), rules.privacy)
    feedback = privacy.scrub(turns.field("signals").field("feedback"), rules.privacy)
    image = privacy.scrub(_decoded(turns.field("image")), rules.privacy)
    for scrubbed in (content, feedback, image):
        _reject(reason, _has(owner[scrubbed.failed], table.num_rows), CLASSIFIER_ERROR)
    for scrubbed in (content, feedback):
        _drop_by_policy(reason, scrubbed, owner, rules.privacy)
    is_user = pc.equal(turns.field("role"), "user").to_numpy(zero_copy_only=False).astype(bool)
    _reject(reason, ~_has(owner[is_user], table.num_rows), NO_USER_TURN)
    _judge(reason, content.folded, turns.field("role"), owner, is_user, rules.safety)

    kept = np.flatnonzero(reason == None)  # noqa: E711 - elementwise
    inside = _has(kept, table.num_rows)[owner]
    told = np.flatnonzero(inside)
    every = language.detect(content.folded.take(pa.array(told)), rules.language)
    found = language.Detected(*(values[is_user[told]] for values in every))
    asked = told[is_user[told]]
    spoken = language.of_conversations(found, np.searchsorted(kept, owner[asked]), len(kept))
    marks = TurnMarks(every.language, every.mixed)
    tags = np.full(len(owner), None, object)
    tags[told] = every.language
    cleaned = _with_turns(table, _clean_turns(turns, content, feedback, image, tags)).take(pa.array(kept, pa.int64()))
    cleaned = cleaned.set_column(cleaned.schema.get_field_index("language"), "language", pa.array(spoken, pa.string()))
    rows = prompts.cut(cleaned, marks, rules.champion, rules.prompts)
    counts = _count_rows(table, reason) + _count_entities((content, feedback, image), _has(kept, table.num_rows)[owner])
    counts.update(Counter(("turn_language", str(tag)) for tag in found.language))
    counts.update(Counter(("conversation_language", tag) for tag in spoken))
    counts.update(Counter(("prompt_depth", depth) for depth in rows["depth"].to_pylist()))
    counts["code_mixed_user_turns",] = int(found.mixed.sum())
    counts["prompts", "all"], counts["prompts", "near_policy"] = len(rows), pc.sum(rows["near_policy"]).as_py() or 0
    return Cleaned(cleaned, rows, _quarantine(table, reason, part, first_row), dict(counts))


def _flat_turns(table: pa.Table) -> tuple[pa.StructArray, npt.NDArray[np.int64]]:
    column = table["turns"]
    lists = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lists.flatten(), np.repeat(np.arange(len(lists)), lengths)


def _with_turns(table: pa.Table, turns: pa.StructArray) -> pa.Table:
    lengths = pc.fill_null(pc.list_value_length(table["turns"]), 0).to_numpy()
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, turns).cast(pa.list_(schemas.LOGGED_TURN))
    return table.set_column(table.schema.get_field_index("turns"), "turns", lists)


def _clean_turns(
    turns: pa.StructArray, content: Scrubbed, feedback: Scrubbed, image: Scrubbed, tags: npt.NDArray[np.object_]
) -> pa.StructArray:
    signals = turns.field("signals")
    parts = [feedback.texts if f.name == "feedback" else signals.field(f.name) for f in schemas.SIGNALS]
    signals = pa.StructArray.from_arrays(parts, fields=list(schemas.SIGNALS), mask=signals.is_null())
    # An image field holds a link, often a signed one: a mask would break it, to drop the talk for it would be too much.
    telling = [row for row, inside in zip(image.rows, image.inside, strict=True) if set(inside) != {"URL"}]
    hidden = np.zeros(len(turns), bool)
    hidden[telling] = True
    images = pc.if_else(pa.array(hidden), None, turns.field("image"))
    changed = {"content": content.texts, "image": images, "signals": signals, "language": pa.array(tags, pa.string())}
    parts = [changed.get(f.name, turns.field(f.name)) for f in schemas.LOGGED_TURN]
    return pa.StructArray.from_arrays(parts, fields=list(schemas.LOGGED_TURN))


def _decoded(links: pa.StringArray) -> pa.StringArray:
    """Links as a person reads them: `jane%40example.org` is an address."""
    if not pc.any(pc.match_substring(links, "%")).as_py():
        return links
    return pa.array([link and unquote(link) for link in links.to_pylist()], links.type)


def _drop_by_policy(
    reason: npt.NDArray[np.object_], found: Scrubbed, owner: npt.NDArray[np.int64], config: PrivacyConfig
) -> None:
    for row, inside in zip(found.rows.tolist(), found.inside, strict=True):
        dropped = next((entity for entity in inside if config.policy.get(entity, config.default) == "drop"), None)
        if dropped and reason[owner[row]] is None:
            reason[owner[row]] = f"privacy_{dropped.lower()}"


def _judge(
    reason: npt.NDArray[np.object_], text: pa.StringArray, role: pa.StringArray, owner: npt.NDArray[np.int64],
    is_user: npt.NDArray[np.bool_], config: SafetyConfig,
) -> None:  # fmt: skip
    """Safety over the turns of conversations that are still in; NaN is no verdict, and no verdict is no pass."""
    open_turns = np.flatnonzero((reason == None)[owner])  # noqa: E711 - elementwise
    if not len(open_turns):
        return
    classifier, threshold = safety.classifier_and_threshold(config)
    at, owners = pa.array(open_turns), owner[open_turns]
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    turns = Turns(text.take(at), role.take(at), np.repeat(first, np.diff(first, append=len(owners))))
    scores = safety.judge(classifier, turns, config.turns_per_call(), config.timeout_s)
    unsafe = scores >= threshold
    user = is_user[open_turns]
    for rows, why in (
        (np.isnan(scores), CLASSIFIER_ERROR),
        (unsafe & user, UNSAFE_PROMPT),
        (unsafe & ~user, UNSAFE_RESPONSE),
    ):
        _reject(reason, _has(owners[rows], len(reason)), why)


def _reject(reason: npt.NDArray[np.object_], rows: npt.NDArray[np.bool_], why: str) -> None:
    reason[rows.astype(bool) & (reason == None)] = why  # noqa: E711 - elementwise


def _has(rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(count, bool)
    mask[rows] = True
    return mask


def _quarantine(table: pa.Table, reason: npt.NDArray[np.object_], part: str, first_row: int) -> pa.Table:
    """Ids and reasons only: keeping the text would keep what was removed."""
    rows = np.flatnonzero(reason != None)  # noqa: E711 - elementwise
    out = table.select(["conversation_id", "user"]).take(pa.array(rows, pa.int64()))
    places = pa.array([f"{part}:{first_row + row}" for row in rows.tolist()], pa.string())
    reasons = pa.array(reason[rows], pa.string())
    raw = pa.nulls(len(rows), pa.string())
    users = pc.if_else(pc.equal(reasons, FORGOTTEN), pa.scalar(None, pa.string()), out["user"])
    return pa.table([out["conversation_id"], reasons, places, users, raw], schema=schemas.QUARANTINE)


def _count_rows(table: pa.Table, reason: npt.NDArray[np.object_]) -> Counter[tuple[str, ...]]:
    outcome = [why or "accepted" for why in reason.tolist()]
    counts: Counter[tuple[str, ...]] = Counter(("outcome", why) for why in outcome)
    for column in ("locale", "source"):
        counts.update((column, value, why) for value, why in zip(table[column].to_pylist(), outcome, strict=True))
    return counts


def _count_entities(found: tuple[Scrubbed, ...], kept: npt.NDArray[np.bool_]) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for scrubbed in found:
        for row, entity in zip(scrubbed.rows.tolist(), scrubbed.entities, strict=True):
            counts["entity", entity, "masked" if kept[row] else "rejected"] += 1
    return counts
