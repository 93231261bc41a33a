"""Phase I, privacy (Sec. 2.2.1, 2.6): find high-risk identifiers, then mask them in place or drop the conversation.

A batch function over Arrow strings: one scan picks the texts that could hold an identifier, the rules read those. The
rules take time linear in a text, so a bound on its length bounds the time, and no clock decides what is rejected.
"""

import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.curation.candidates import candidate_rows
from flywheel_tasks.curation.identifiers import Span, find, merge
from flywheel_tasks.curation.normalise import fold

Action = Literal["mask", "drop"]

ENTITIES: Final = (
    "URL_SECRET", "URL", "EMAIL", "IBAN", "CARD", "SSN", "AADHAAR", "IP", "ADDRESS", "PHONE", "HANDLE",
)  # fmt: skip
_PRESIDIO: Final = (
    "CreditCardRecognizer", "IbanRecognizer", "UsSsnRecognizer", "UsItinRecognizer", "InAadhaarRecognizer",
    "InPanRecognizer", "EsNifRecognizer", "ItFiscalCodeRecognizer", "CryptoRecognizer", "MacAddressRecognizer",
)  # fmt: skip

_PRESIDIO_SIGN = re.compile(r"(?:\d\D*+){3}|(?:bc1|[13])[a-z0-9]{25}|(?:[0-9a-f]{2}[:-]){5}|(?:[0-9a-f]{4}\.){2}", re.I)
"""What every text holds that one of these recognizers finds something in."""


class PrivacyConfig(StageConfig):
    """What counts as an identifier and what happens to it."""

    policy: dict[str, Action] = Field(
        {"CARD": "drop", "IBAN": "drop", "SSN": "drop", "AADHAAR": "drop", "URL_SECRET": "drop"},
        description="per entity: 'mask' it as [ENTITY], or 'drop' the conversation; entities not named take `default`",
    )
    default: Action = Field("mask", description="what happens to an entity that `policy` does not name")
    presidio: tuple[str, ...] = Field(
        _PRESIDIO,
        description="presidio pattern recognizers that run beside our own (its import takes about 15 s per worker)",
    )
    presidio_score: float = Field(
        0.5, ge=0, le=1, description="least score of a presidio pattern without a check digit"
    )
    token_model: str | None = Field(
        None,
        description="folder of a transformers token-classification model (the model-based check); off by default",
    )
    token_labels: dict[str, str] = Field(
        {"PER": "PERSON", "LOC": "LOCATION"},
        description="labels of the token model that count, and the entity they mask as",
    )
    token_score: float = Field(0.5, ge=0, le=1, description="least score of a token-model entity")
    device: str = Field("cpu", description="device of the token model")
    longest_text: int = Field(
        2_000_000,
        ge=1,
        description="characters of a text that the rules read (some ten seconds at the worst); the row of a longer one "
        "that may hold an identifier is rejected",
    )
    timeout_s: float = Field(
        60.0,
        gt=0,
        description="time for presidio's patterns on one text, should one of them hang; past it the row is rejected",
    )

    @field_validator("policy", "token_labels")
    @classmethod
    def _entity_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"'{name}' is not an entity name")
        return value


class Scrubbed(NamedTuple):
    """A batch of texts after the privacy rules."""

    texts: pa.StringArray
    folded: pa.StringArray
    """The masked texts as the safety classifier reads them: without hiding characters."""
    rows: npt.NDArray[np.int64]
    entities: list[str]
    """One entry per mask: its row and the entity that it names."""
    inside: list[tuple[str, ...]]
    """Per mask, every entity found under it: a link may hold an address or a card."""
    failed: npt.NDArray[np.int64]
    """Rows on which a detector failed: they must not pass."""


def scrub(texts: pa.StringArray, config: PrivacyConfig) -> Scrubbed:
    """Mask every identifier of a batch; nulls stay null."""
    everything = config.token_model or not set(config.presidio) <= set(_PRESIDIO)
    candidates = np.arange(len(texts)) if everything else candidate_rows(texts)
    detectors = _detectors(config)
    masked, folded = {}, {}
    rows, entities, inside, failed = [], [], [], []
    for row in candidates.tolist():
        text = texts[row].as_py()
        if text is None:
            continue
        if len(text) > config.longest_text:
            failed.append(row)
            continue
        try:
            spans = identifiers(text, detectors)
        except Exception:
            failed.append(row)
            continue
        clean = mask(text, spans)
        view = fold(clean).text
        if spans:
            masked[row] = clean
            rows += [row] * len(spans)
            entities += [span.entity for span in spans]
            inside += [span.inside for span in spans]
        if view != text:
            folded[row] = view
    kept = _replace(texts, masked)
    return Scrubbed(
        kept, _replace(kept, folded), np.array(rows, np.int64), entities, inside, np.array(failed, np.int64)
    )


def identifiers(text: str, detectors: Sequence[Callable[[str], list[Span]]] = ()) -> list[Span]:
    """Disjoint spans of `text` itself (not of its folded view) that hold an identifier."""
    folded = fold(text)
    found = find(folded.text)
    for detect in detectors:
        found += detect(folded.text)
    return merge([Span(*folded.span(span.start, span.end), span.entity) for span in found])


def mask(text: str, spans: Sequence[Span]) -> str:
    """The text with a typed placeholder in place of every span."""
    pieces, position = [], 0
    for span in spans:
        pieces += [text[position : span.start], f"[{span.entity}]"]
        position = span.end
    return "".join([*pieces, text[position:]])


def _detectors(config: PrivacyConfig) -> list[Callable[[str], list[Span]]]:
    detectors: list[Callable[[str], list[Span]]] = []
    if config.presidio:
        detectors.append(lambda text: _presidio(text, config))
    if config.token_model:
        from flywheel_tasks.curation.detectors import token_classifier

        labels = tuple(sorted(config.token_labels.items()))
        detectors.append(token_classifier(config.token_model, labels, config.token_score, config.device))
    return detectors


def _presidio(text: str, config: PrivacyConfig) -> list[Span]:
    """Presidio is imported at the first text that may have something for it: for its recognizers that we don't know,
    that is any text."""
    if set(config.presidio) <= set(_PRESIDIO) and not _PRESIDIO_SIGN.search(text):
        return []
    from flywheel_tasks.curation.detectors import presidio

    return presidio(config.presidio, config.presidio_score, config.timeout_s)(text)


def _replace(texts: pa.StringArray, changed: dict[int, str]) -> pa.StringArray:
    if not changed:
        return texts
    at = np.zeros(len(texts), bool)
    at[list(changed)] = True
    return pc.replace_with_mask(texts, pa.array(at), pa.array([changed[row] for row in sorted(changed)], texts.type))
