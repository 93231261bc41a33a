"""The user's job to be done behind a prompt (Table 1), zero-shot from prototypes.

Prototype utterances live in `jtbd.yaml`. A prompt takes the job with the highest mean similarity to its five nearest
prototypes: one lucky word in common is not enough, and a job may still have very different ways of being asked for.
Below `floor` nothing is near and the job is `other`. Any classifier that maps vectors to names can stand in its
place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import yaml
from numpy.typing import NDArray

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.core.storage import open_external
from flywheel_tasks.curation.cluster import Quantised, quantise, similarity

OTHER = "other"
_NEAREST = 5
_CHUNK = 16_384


@dataclass(frozen=True)
class Prototypes:
    """Prototype vectors of every job, job after job; `starts[j]` is where job j's begin."""

    names: tuple[str, ...]
    vectors: NDArray[np.float32]
    starts: NDArray[np.int64]


def utterances(uris: Sequence[str] = ()) -> dict[str, list[str]]:
    """Prototype utterances per job, from YAML files or the ones that come with the package."""
    if not uris:
        return _parse(resources.files(__package__).joinpath("jtbd.yaml").read_bytes(), "jtbd.yaml")
    found: dict[str, list[str]] = {}
    for uri in uris:
        with open_external(uri) as stream:
            found |= _parse(stream.read(), uri)
    return found


def _parse(data: bytes, where: str) -> dict[str, list[str]]:
    try:
        body = yaml.safe_load(data)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"diversify.jtbd: {where} is not YAML: {' '.join(str(error).split())}") from error
    lists = list(body.values()) if isinstance(body, dict) else []
    if not lists or not all(
        isinstance(lines, list) and lines and all(isinstance(u, str) for u in lines) for lines in lists
    ):
        raise ConfigError(
            f"diversify.jtbd: {where} must map every job to a list of utterances (quote those with ':' or '?')"
        )
    return {str(name): list(lines) for name, lines in body.items()}


def prototypes(spoken: dict[str, list[str]], embed: Callable[[list[str]], NDArray[np.float32]]) -> Prototypes:
    """Embed every utterance with the encoder that embeds the prompts."""
    vectors, valid = quantise(embed([line for lines in spoken.values() for line in lines]))
    if not valid.all():
        raise ConfigError(
            "diversify.jtbd: the encoder gives no usable vector for an utterance; remove it or change the encoder"
        )
    starts = np.cumsum([0, *map(len, spoken.values())])[:-1]
    return Prototypes(tuple(spoken), vectors.astype(np.float32), starts)


def classify(vectors: Quantised, jobs: Prototypes, floor: float = 0.0) -> NDArray[np.int64]:
    """Index of each row's job in `jobs.names`; -1 is `other`."""
    ends = np.append(jobs.starts[1:], len(jobs.vectors))
    best = np.empty(len(vectors), dtype=np.int64)
    for at in range(0, len(vectors), _CHUNK):
        products = vectors[at : at + _CHUNK].astype(np.float32) @ jobs.vectors.T
        scores = np.stack([_top_mean(products[:, s:e]) for s, e in zip(jobs.starts, ends, strict=True)], axis=1)
        best[at : at + _CHUNK] = np.where(similarity(scores.max(axis=1)) >= floor, scores.argmax(axis=1), -1)
    return best


def _top_mean(products: NDArray[np.float32]) -> NDArray[np.float64]:
    k = min(_NEAREST, products.shape[1])
    return np.partition(products, -k, axis=1)[:, -k:].mean(axis=1, dtype=np.float64)


def names(index: NDArray[np.int64], jobs: Prototypes) -> NDArray[np.object_]:
    return np.array([*jobs.names, OTHER], dtype=object)[index]
