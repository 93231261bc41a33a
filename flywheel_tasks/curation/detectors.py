"""Detectors beside our own rules (Sec. 2.6): presidio's pattern recognizers, and a token classifier ("model-based").

Both say nothing of a text by raising: the caller rejects the row, it never passes it unread.
"""

import inspect
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.curation.identifiers import Span

Detector = Callable[[str], list[Span]]

_NAMES: Final[dict[str, str]] = {
    "CREDIT_CARD": "CARD", "IBAN_CODE": "IBAN", "US_SSN": "SSN", "US_ITIN": "SSN", "IN_AADHAAR": "AADHAAR",
    "EMAIL_ADDRESS": "EMAIL", "PHONE_NUMBER": "PHONE", "IP_ADDRESS": "IP", "MAC_ADDRESS": "IP",
}  # fmt: skip
_TEXT_LIMIT = 20_000


@cache
def presidio(names: tuple[str, ...], minimum_score: float, seconds: float) -> Detector:
    """Presidio's pattern recognizers of these class names, without its NLP engine.

    Presidio's own `analyze` logs a pattern that times out and goes on; here the time-out is an error.
    """
    import presidio_analyzer.predefined_recognizers as predefined
    import regex  # type: ignore[import-untyped,unused-ignore]
    from presidio_analyzer import PatternRecognizer

    compiled = []
    for name in names:
        if name == "EmailRecognizer":
            raise ConfigError(
                "config key 'filter.privacy.presidio': EmailRecognizer reads the network; ours finds e-mail"
            )
        recognizer = getattr(predefined, name, None)
        if not (inspect.isclass(recognizer) and issubclass(recognizer, PatternRecognizer)):
            raise ConfigError(f"config key 'filter.privacy.presidio': '{name}' is no pattern recognizer of presidio")
        instance: Any = recognizer()
        entity = instance.supported_entities[0]
        checks = type(instance).validate_result is not PatternRecognizer.validate_result
        for pattern in instance.patterns:
            if not checks and pattern.score < minimum_score:
                continue  # it never counts, and looks ahead through the whole text (InPanRecognizer)
            expression = regex.compile(pattern.regex, instance.global_regex_flags)
            compiled.append((instance, _NAMES.get(entity, entity), pattern.score, expression))

    def detect(text: str) -> list[Span]:
        spans = []
        deadline = time.monotonic() + seconds
        for instance, entity, score, expression in compiled:
            for match in expression.finditer(text, timeout=max(deadline - time.monotonic(), 0.001)):
                found = match.group()
                valid = instance.validate_result(found)
                certain = valid or (valid is None and score >= minimum_score)
                if found and certain and not instance.invalidate_result(found):
                    spans.append(Span(match.start(), match.end(), entity))
        return spans

    return detect


@cache
def token_classifier(path: str, labels: tuple[tuple[str, str], ...], minimum_score: float, device: str) -> Detector:
    """A local transformers token-classification model; `labels` maps its labels (PER …) to entities (PERSON …)."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = AutoModelForTokenClassification.from_pretrained(
        path, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    known = {label.split("-", 1)[-1] for label in model.config.label2id}
    unknown = sorted(set(dict(labels)) - known)
    if unknown:
        raise ConfigError(
            f"config key 'filter.privacy.token_labels': the model has no label {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known))}"
        )
    length = min(tokenizer.model_max_length, 512, getattr(model.config, "max_position_embeddings", 512))
    tokenizer.model_max_length = length
    run = pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        stride=length // 4,
        device=device,
    )
    wanted = dict(labels)

    def detect(text: str) -> list[Span]:
        if len(text) > _TEXT_LIMIT:
            raise ValueError(
                f"a text of {len(text)} characters is longer than the token classifier's limit of {_TEXT_LIMIT}"
            )
        found: Sequence[dict[str, Any]] = run(text)
        return [
            Span(int(item["start"]), int(item["end"]), wanted[item["entity_group"]])
            for item in found
            if item["entity_group"] in wanted and float(item["score"]) >= minimum_score
        ]

    return detect
