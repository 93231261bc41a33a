"""Each bias of Sec. 3.5.5 is found where it was planted, and not where it was not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from flywheel_tasks.preherding.biases import auc, measured, rates

N = 4000


@pytest.fixture
def clean() -> dict[str, np.ndarray]:
    """Labels that depend on nothing, and a score that is honest noise."""
    rng = np.random.default_rng(3)
    return {
        "label": (rng.random(N) < 0.3).astype(float),
        "score": rng.random(N),
        "is_last": rng.random(N) < 0.25,
        "words": rng.integers(1, 80, N).astype(float),
        "jtbd": rng.choice(np.array(["romance", "advice"], object), N),
        "earlier": np.where(rng.random(N) < 0.2, np.nan, (rng.random(N) < 0.3).astype(float)),
    }


def test_auc_is_the_references_also_with_ties() -> None:
    rng = np.random.default_rng(1)
    label, score = (rng.random(500) < 0.4).astype(float), rng.integers(0, 9, 500).astype(float)
    assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
    assert auc(np.array([1.0] * 4 + [0.0] * 40), np.arange(44.0)) is None


def test_clean_signals_show_no_bias(clean: dict[str, np.ndarray]) -> None:
    found = measured(**clean)
    assert abs(found["ending"]["label_last"] - found["ending"]["label_earlier"]) < 0.05
    assert abs(found["verbosity"]["label"]) < 0.05
    assert abs(found["jtbd"]["auc_of_jtbd_alone"] - 0.5) < 0.03
    assert abs(found["context"]["label"]) < 0.05


def test_planted_biases_are_seen(clean: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(4)
    chance = 0.1 + 0.4 * clean["is_last"] + 0.4 * (clean["jtbd"] == "romance")
    label = (rng.random(N) < chance).astype(float)
    score = np.where(clean["jtbd"] == "romance", 0.6, 0.2) + clean["words"] / 400
    found = measured(**clean | {"label": label, "score": score})
    assert found["ending"]["label_last"] - found["ending"]["label_earlier"] > 0.3
    assert found["verbosity"]["score"] > 0.2 > abs(found["verbosity"]["label"])
    assert found["jtbd"]["auc_of_jtbd_alone"] > 0.65
    assert found["jtbd"]["auc_within"] == pytest.approx(0.5, abs=0.04)  # all the score knew was the job to be done
    assert found["jtbd"]["rates"]["romance"]["rate"] > found["jtbd"]["rates"]["advice"]["rate"] + 0.3


def test_rates_count_every_row(clean: dict[str, np.ndarray]) -> None:
    found = rates(clean["label"], clean["jtbd"])
    assert sum(group["n"] for group in found.values()) == N


def test_missing_labels_are_left_out_and_nothing_is_invented(clean: dict[str, np.ndarray]) -> None:
    label = clean["label"].copy()
    label[10:] = np.nan
    found = measured(**clean | {"label": label, "earlier": np.full(N, np.nan)})
    assert (found["n"], found["context"]["label"], found["jtbd"]["auc_within"]) == (10, None, None)
