"""Training rows for tests: a few preferences, examples and signals, and the real pairs of hh-rlhf."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from flywheel_tasks.core import schemas
from flywheel_tasks.models.chat import Card

CARDS = {"c1": Card("Mara", description="A lighthouse keeper who tells stories.", traits=("calm", "wry"))}
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ")


def turns(*texts: str) -> list[dict[str, str]]:
    """Alternating turns that begin and end with the user's."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def preference(name: str, history: list[dict[str, str]], chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    row = {
        "preference_id": name, "pair_id": name, "prompt_id": name, "user": "u-1", "character_id": "c1",
        "traffic": "internal", "locale": "en_US", "mode": "static", "split": "train", "turns": history,
        "chosen": chosen, "rejected": rejected, "agreement": "single", "n_reviews": 1, "conflict": False,
        "batch": "261101", "policy_chosen": "p", "policy_rejected": "p",
    }  # fmt: skip
    return row | more


def preferences(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schemas.get("preference"))


def hh(data_dir: Path, count: int) -> pa.Table:
    """The first pairs of hh-rlhf harmless that share their history, as people ranked them."""
    out: list[dict[str, Any]] = []
    with gzip.open(data_dir / "hh_rlhf_harmless" / "test.jsonl.gz", "rt") as stream:
        for number, line in enumerate(stream):
            pair = json.loads(line)
            sides = [_SPEAKER.split(pair[side])[1:] for side in ("chosen", "rejected")]
            if sides[0][:-1] != sides[1][:-1] or len(sides[0]) < 4 or len(out) == count:
                continue
            texts = [sides[0][i].strip() for i in range(1, len(sides[0]) - 1, 2)]
            if len(texts) % 2 == 0 or not all(texts):
                continue
            out.append(
                preference(
                    f"hh-{number}", turns(*texts), sides[0][-1].strip(), sides[1][-1].strip(), character_id="none"
                )
            )
    return preferences(out)


def example(name: str, messages: list[dict[str, Any]], source: str = "safety") -> dict[str, Any]:
    marked = [{"trained": m["role"] == "assistant", **m} for m in messages]
    return {
        "example_id": name,
        "user": "u-1",
        "source": source,
        "character_id": "c1",
        "locale": "en_US",
        "messages": marked,
    }


def examples(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schemas.get("example"))
