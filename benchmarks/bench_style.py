"""Style features and the linter against datatrove's repetition and quality filters, on the same real chat responses.

datatrove's Gopher filters are the nearest kept peer: they also look for repetition, bullets and word statistics, one
document at a time. Ours measures every feature of the registry; the linter's contender finds and repairs as well.
Imports and compilation are outside the clock.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Contender, Report, compare


def responses(count: int) -> list[str]:
    """Real responses: persona chat in four languages, topical chat, and assistant replies with markdown."""
    data = Path(os.environ.get("FLYWHEEL_DATA", ROOT.parent / "shared" / "data"))
    found: list[str] = []
    for path in sorted((data / "xpersona").glob("*.json")):
        found += [
            t for d in json.loads(path.read_text(encoding="utf-8")) for exchange in d["dialogue"] for t in exchange
        ]
    for dialogue in json.loads((data / "topical_chat/valid_freq.json").read_text(encoding="utf-8")).values():
        found += [turn["message"] for turn in dialogue["content"]]
    replies: list[str] = []

    def walk(node: dict[str, Any]) -> None:
        if node["role"] == "assistant":
            replies.append(node["text"])
        for reply in node["replies"]:
            walk(reply)

    for line in (data / "oasst_en100/en_100_tree.jsonl").read_text(encoding="utf-8").splitlines():
        walk(json.loads(line)["prompt"])
    found += replies * 10  # a chat policy answers in markdown more often than people do
    random.Random(7).shuffle(found)
    return [found[n % len(found)] for n in range(count)]


def features(count: int) -> dict[str, int]:
    import pyarrow as pa

    measured = _SETUP["measure"](_SETUP["exchange"](pa.array(responses(count))))
    return {"rows": len(measured["words"]), "features": len(measured)}


def lint(count: int) -> dict[str, int]:
    import numpy as np

    texts = responses(count)
    done = _SETUP["repair"](texts, np.full(count, "prompt"), [None] * count, [None] * count, [""] * count)
    return {"rows": len(done), "broken": sum(bool(each.broken) for each in done)}


def datatrove(count: int) -> dict[str, int]:
    from datatrove.data import Document

    kept = 0
    texts = responses(count)
    for text in texts:
        document = Document(text=text, id="")
        kept += all(f.filter(document) is True for f in _SETUP["filters"])
    return {"rows": len(texts), "kept": kept}


def _ours_setup() -> dict[str, Any]:
    import pyarrow as pa

    from flywheel_tasks.style.features import Exchange, measure
    from flywheel_tasks.style.linter import repair_all

    measure(Exchange(pa.array(["warm **up 😀"])))
    responses(1)
    return {"measure": measure, "exchange": Exchange, "repair": repair_all}


def _datatrove_setup() -> dict[str, Any]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

    filters = [GopherRepetitionFilter(), GopherQualityFilter(min_doc_words=0, min_stop_words=0)]
    for f in filters:
        f.filter(Document(text="warm up", id=""))
    return {"filters": filters}


_SETUPS: dict[str, Callable[[], dict[str, Any]]] = {"ours": _ours_setup, "datatrove": _datatrove_setup}
_SETUP = _SETUPS[os.environ["BENCH_STYLE"]]() if "BENCH_STYLE" in os.environ else {}


def same(values: dict[str, Any]) -> None:
    rows = {name: value["rows"] for name, value in values.items()}
    if len(set(rows.values())) != 1:
        raise SystemExit(f"the contenders read different responses: {rows}")


def main(quick: bool) -> Report:
    count = 10_000 if quick else 100_000
    contenders = [
        Contender(name, f"benchmarks.bench_style:{call}", {"count": count}, count, {"BENCH_STYLE": setup})
        for name, call, setup in (
            ("flywheel: all style features", "features", "ours"),
            ("flywheel: lint and repair", "lint", "ours"),
            ("datatrove: Gopher repetition + quality", "datatrove", "datatrove"),
        )
    ]
    title = f"style of {count:,} chat responses"
    return compare(f"style_{count}", title, contenders, repeats=1 if quick else 3, unit="responses", agree=same)
