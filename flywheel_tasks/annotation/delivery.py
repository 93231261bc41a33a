"""What came back from annotators (Sec. 2.2.2): files of reviews, in our contract or as Label Studio exports them.

A delivery is named by its batch, YYMMDD as in Table 8. Nothing in a file can stop the week: a line that is broken, in
whatever way, becomes a refusal with its place and a reason.
"""

from __future__ import annotations

import codecs
import datetime
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from flywheel_tasks.annotation import label_studio
from flywheel_tasks.annotation.contract import Review
from flywheel_tasks.core import ids

_BATCH = re.compile(r"(\d{6})(?!\d)")
_LONGEST_LINE = 1 << 20
_SAID_BEFORE, _SAID_AFTER = datetime.timedelta(days=3 * 365), datetime.timedelta(days=7)
"""How far from its batch's day a review may say it was given. A Label Studio export repeats all that a project ever
got; but nobody could correct an answer from the future, and a batch gathers a week at most."""
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


class Line(NamedTuple):
    """One review, or the reason why there is none."""

    where: str
    batch: str
    review: Review | None
    reason: str | None = None


def batch_of(name: str) -> datetime.datetime | None:
    """The first moment of the batch that a delivery's file name begins with."""
    match = _BATCH.match(name.rsplit("/", 1)[-1])
    if match is None:
        return None
    try:
        return datetime.datetime.strptime(match[1], "%y%m%d").replace(tzinfo=datetime.UTC)
    except ValueError:
        return None


def read_as(name: str) -> str:
    """All that a delivery's name says about how its lines are read: the batch, and in whose format."""
    batch = batch_of(name)
    return ("unnamed" if batch is None else f"{batch:%y%m%d}") + (".json" if _exported(name) else ".jsonl")


def _exported(name: str) -> bool:
    return name.endswith(".json")


def lines(name: str, content: bytes, cycle: str) -> Iterator[Line]:
    """Every line of a delivery that is not blank. Batches sort by two digits of the year, so one that is not of the
    cycle's year or of its neighbours is refused: it would be the oldest or the newest for ever."""
    batch = batch_of(name)
    rows = _label_studio(content) if _exported(name) else _json_lines(content)
    for number, row in rows:
        where = f"{name}:{number}"
        if batch is None:
            yield Line(where, "", None, "batch_unnamed")
        elif abs(batch.year - ids.cycle_start(cycle).year) > 1:
            yield Line(where, "", None, "bad_batch")
        elif isinstance(row, str):
            yield Line(where, f"{batch:%y%m%d}", None, row)
        else:
            yield _validated(where, batch, row)


def _validated(where: str, day: datetime.datetime, row: dict[str, Any]) -> Line:
    batch = f"{day:%y%m%d}"
    try:
        review = Review.model_validate(row, strict=False)
    except ValidationError as error:
        problem = error.errors()[0]
        field = next((str(part) for part in problem["loc"] if part in Review.model_fields), "line")
        kind = {"missing": "missing", "extra_forbidden": "unknown"}.get(problem["type"], "bad")
        return Line(where, batch, None, f"{kind}_{field}" if kind != "unknown" else "unknown_field")
    if not day - _SAID_BEFORE <= review.at <= day + _SAID_AFTER:
        return Line(where, batch, None, "bad_at")
    return Line(where, batch, review)


def _json_lines(content: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and the object of each line, or a reason. A byte-order mark and CRLF are no part of a line."""
    text = _decoded(content)
    # One bad byte must cost its own line, not the file.
    whole = content.removeprefix(codecs.BOM_UTF8) if text is None else text.encode("utf-8", "surrogatepass")
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if line.strip():
            yield number, _object(line)


def _object(line: bytes) -> dict[str, Any] | str:
    if len(line) > _LONGEST_LINE:
        return "too_long"
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return "not_utf8"
    except (ValueError, RecursionError):
        return "not_json"
    return row if isinstance(row, dict) else "not_an_object"


def _label_studio(content: bytes) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """A JSON array of tasks with their annotations; a task that is malformed costs its own reviews only."""
    text = _decoded(content)
    try:
        exported = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        exported = None
    if not isinstance(exported, list):
        yield 1, "not_label_studio"
        return
    number = 0
    for task in exported:
        try:
            found: list[dict[str, Any] | str] = list(label_studio.reviews([task]))
            skipped = sum(bool(a.get("was_cancelled")) for a in task["annotations"])
        except Exception:  # somebody else's JSON, as deep and as odd as they like: what it raises has no end of kinds
            found, skipped = ["malformed_task"], 0
        for row in (*found, *["skipped"] * skipped):
            number += 1
            yield number, row


def _decoded(content: bytes) -> str | None:
    mark, encoding = next((known for known in _BOMS if content.startswith(known[0])), (b"", "utf-8"))
    try:
        return content.removeprefix(mark).decode(encoding)
    except UnicodeDecodeError:
        return None
