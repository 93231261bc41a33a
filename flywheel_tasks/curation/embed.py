"""Sentence embeddings of prompts (Sec. 2.2.1, Phase II; the paper runs DRAMA-1B through MultiRay).

Any encoder that transformers can load from a local folder of safetensors will do: pooling and length limit are read
from the sentence-transformers files beside the weights where there are any. Nothing is fetched and no remote code
runs."""

import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel_tasks.core.errors import ConfigError

_TOKENS_PER_BATCH = 8192
_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker needs to load the encoder by itself."""

    path: str
    max_tokens: int
    pooling: str = "auto"
    attention: str = "auto"


def prompt_text(last: str, before: str | None, user_chars: int, context_chars: int) -> str:
    """The last user turn, then the end of the turn before it: length limits cut the context first, never the
    request."""
    request = _plain(last[: 4 * user_chars])[:user_chars]
    context = _plain(before[-4 * context_chars :])[-context_chars:] if before and context_chars else ""
    return f"{request}\n{context}" if context else request


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()


def folder(path: str) -> Path:
    """The folder that a path or `package:NAME` stands for."""
    found: Path | None = Path(path)
    if path.startswith("package:"):
        spec = importlib.util.find_spec(path.removeprefix("package:"))
        roots = list(spec.submodule_search_locations or []) if spec else []
        found = next((config.parent for root in roots for config in sorted(Path(root).rglob("config.json"))
                      if list(config.parent.glob("*.safetensors"))), None)  # fmt: skip
    if found is None or not (found / "config.json").is_file():
        raise ConfigError(
            f"diversify.encoder '{path}' holds no encoder: give package:NAME of an installed package, or a folder with "
            "config.json, a tokenizer and safetensors"
        )
    return found


@lru_cache(maxsize=1)
def _load(spec: EncoderSpec) -> tuple[Any, Any, str, int]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    place = folder(spec.path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        model = AutoModel.from_pretrained(
            place, config=_attention(spec, place), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"diversify.encoder '{spec.path}' cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    limit = min(spec.max_tokens, getattr(model.config, "max_position_embeddings", spec.max_tokens))
    limit = min(limit, _sidecar(place / "sentence_bert_config.json").get("max_seq_length") or limit)
    return tokenizer, model.to(device).eval(), _pooling(spec, place), limit


def _attention(spec: EncoderSpec, place: Path) -> Any:
    """The model's config. DRAMA and its kind are decoders that attend both ways through code of their own, which is not
    run: transformers would then read them as plain causal decoders without a word, so the choice has to be stated."""
    from transformers import AutoConfig

    if spec.attention == "auto" and "auto_map" in _sidecar(place / "config.json"):
        raise ConfigError(
            f"diversify.encoder '{spec.path}' brings its own code, which is not run: set diversify.attention to "
            "'bidirectional' (as DRAMA attends) or 'causal'"
        )
    config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    if spec.attention != "auto":
        config.is_causal = spec.attention == "causal"
    return config


def _sidecar(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _pooling(spec: EncoderSpec, place: Path) -> str:
    if spec.pooling != "auto":
        return spec.pooling
    named = [
        _POOLING[key]
        for key, on in _sidecar(place / "1_Pooling" / "config.json").items()
        if on is True and key in _POOLING
    ]
    return named[0] if named else "mean"


def length_batches(lengths: Sequence[int], tokens: int = _TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices of texts, longest first, cut where a padded batch would pass `tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def embed(texts: Sequence[str], spec: EncoderSpec) -> NDArray[np.float32]:
    """One vector per text. A pure function of (texts, spec); the loaded encoder stays in the worker's process."""
    import torch

    tokenizer, model, pooling, limit = _load(spec)
    tokens = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    for batch in length_batches([len(t) for t in tokens]):
        inputs = tokenizer.pad({"input_ids": [tokens[i] for i in batch]}, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        vectors[batch] = _pool(hidden, inputs["attention_mask"], pooling).float().cpu().numpy()
    return vectors


def _pool(hidden: Any, mask: Any, pooling: str) -> Any:
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[range(len(hidden)), mask.sum(1) - 1]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)
