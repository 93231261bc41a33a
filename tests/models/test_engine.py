"""What the engine promises to every stage that samples from a policy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from flywheel_tasks.core.errors import FlywheelError, InputError
from flywheel_tasks.models.engine import Engine, Request, open_engine
from flywheel_tasks.models.engine_config import Sampling
from tests.models.engines import SMALL, logits, prompt, requests

DRAW = Sampling(k=3, max_tokens=12, seed=7)


def test_k_responses_for_each_prompt_in_the_order_of_the_prompts(engine: Engine) -> None:
    asked = requests(10)
    drawn = engine.generate(asked, DRAW)
    assert [(c.id, c.sample) for c in drawn] == [(r.id, sample) for r in asked for sample in range(3)]
    assert len({tuple(c.tokens) for c in drawn}) == 30
    for completion in drawn:
        assert len(completion.tokens) == len(completion.logprobs) <= 12
        stopped = completion.tokens[-1] in engine.stop
        assert completion.finish == ("stop" if stopped else "length")
        assert not set(completion.tokens[:-1]) & set(engine.stop)


def test_the_samples_of_a_prompt_share_its_prefix(engine: Engine) -> None:
    before = engine.stats().get("cached_tokens", 0)
    engine.generate([Request("long and new", prompt(1234, 100))], DRAW)
    assert engine.stats()["cached_tokens"] - before >= 96


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.0, 1.0)])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    engine: Engine, tiny_model: Path, temperature: float, top_p: float
) -> None:
    asked = requests(8)
    drawn = engine.generate(asked, Sampling(max_tokens=12, temperature=temperature, top_p=top_p, seed=1))
    apart = []
    for request, completion in zip(asked, drawn, strict=True):
        table = logits(tiny_model, request.tokens, completion.tokens) / (temperature or 1)
        ordered, ranks = table.softmax(-1).sort(descending=True)
        kept = torch.zeros(table.shape, dtype=torch.bool).scatter(1, ranks, ordered.cumsum(-1) - ordered < top_p)
        table = table.masked_fill(~kept, -torch.inf).log_softmax(-1)
        apart += [
            float(table[i, t]) - p for i, (t, p) in enumerate(zip(completion.tokens, completion.logprobs, strict=True))
        ]
    assert np.abs(apart).mean() < 0.07
    assert np.quantile(np.abs(apart), 0.95) < 0.2


def test_greedy_takes_the_likeliest_token(engine: Engine, tiny_model: Path) -> None:
    for request, completion in zip(asked := requests(4), engine.generate(asked, Sampling(temperature=0)), strict=True):
        table = logits(tiny_model, request.tokens, completion.tokens)
        chosen = table.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert (table.max(-1).values - chosen).max() < 0.1


def test_sampled_tokens_follow_the_policy(engine: Engine, tiny_model: Path) -> None:
    """The first token over 1,000 draws against the reference's probabilities, in ten bins (chi-square, 1 in 10,000)."""
    from scipy.stats import chisquare

    drawn = engine.generate([Request("many", prompt(3))], Sampling(k=1000, max_tokens=1, seed=2))
    expected = logits(tiny_model, prompt(3), [0]).softmax(-1)[0].numpy().astype(float)
    bins = np.argsort(np.argsort(-expected)) % 10
    counts = np.bincount(bins[[c.tokens[0] for c in drawn]], minlength=10)
    shares = np.bincount(bins, weights=expected, minlength=10)
    assert chisquare(counts, shares / shares.sum() * 1000).pvalue > 1e-4


def test_a_response_depends_on_seed_prompt_and_number_alone(engine: Engine) -> None:
    asked = requests(12)
    whole = {(c.id, c.sample): c.tokens for c in engine.generate(asked, DRAW)}
    backwards = {(c.id, c.sample): c.tokens for c in engine.generate(asked[::-1], DRAW)}
    parts = [c for start in range(0, 12, 5) for c in engine.generate(asked[start : start + 5], DRAW)]
    alone = engine.generate(asked[:1], DRAW.model_copy(update={"k": 1}))
    assert backwards == whole
    assert {(c.id, c.sample): c.tokens for c in parts} == whole
    assert alone[0].tokens == whole["p0", 0]
    other_seed = engine.generate(asked, DRAW.seeded(8))
    assert all(c.tokens != whole[c.id, c.sample] for c in other_seed)
    renamed = engine.generate([Request("another id", asked[0].tokens)], DRAW)
    assert all(c.tokens != whole["p0", c.sample] for c in renamed)


def test_a_prompt_that_cannot_be_generated_from_is_an_error_row_beside_the_others(engine: Engine) -> None:
    good = requests(3)
    bad = [
        Request("empty", []),
        Request("long", prompt(0, engine.context)),
        Request("foreign", [engine.vocabulary]),
        Request("negative", [-1]),
    ]
    drawn = engine.generate([bad[0], good[0], bad[1], good[1], bad[2], bad[3], good[2]], DRAW)
    assert len(drawn) == 21
    reasons = {c.id: str(c.reason) for c in drawn if c.finish == "error"}
    assert {name: reason.split(":")[0] for name, reason in reasons.items()} == {
        "empty": "empty_prompt", "long": "too_long", "foreign": "bad_token", "negative": "bad_token",
    }  # fmt: skip
    clean = {(c.id, c.sample): c.tokens for c in engine.generate(good, DRAW)}
    assert {(c.id, c.sample): c.tokens for c in drawn if c.finish != "error"} == clean


def test_seeds_work_with_more_prompt_than_a_step_reads(engine: Engine) -> None:
    """vLLM's own CPU engine dies of this: it can't rewind the seeded generator of a prompt that is read in parts."""
    before = engine.stats()["deaths"]
    drawn = engine.generate(requests(24, length=400), DRAW)
    assert {c.finish for c in drawn} <= {"stop", "length"}
    assert engine.stats()["deaths"] == before


def test_a_response_ends_with_the_context(engine: Engine) -> None:
    [completion] = engine.generate([Request("edge", prompt(5, engine.context - 3))], Sampling(max_tokens=50, seed=3))
    assert len(completion.tokens) <= 3


def test_a_policy_that_loops_is_stopped_by_the_token_limit(engine: Engine) -> None:
    drawn = engine.generate(requests(6), Sampling(temperature=0, max_tokens=300))
    looping = [c for c in drawn if c.finish == "length"]
    assert looping, "a random greedy policy loops"
    assert {len(c.tokens) for c in looping} == {300}


def test_every_end_of_the_model_and_of_its_chat_template_stops(engine: Engine, tiny_model: Path) -> None:
    listed = json.loads((tiny_model / "generation_config.json").read_text())["eos_token_id"]
    assert set(engine.stop) == set(listed)
    assert len(engine.stop) == 2


def test_a_reader_who_leaves_early_leaves_a_clean_engine(engine: Engine) -> None:
    expected = engine.generate(requests(3), DRAW)
    stream = engine.stream(requests(40), DRAW)
    next(stream)
    with pytest.raises(FlywheelError, match="a round of generation is running"):
        engine.generate(requests(1), DRAW)
    stream.close()
    assert engine.generate(requests(3), DRAW) == expected


def test_prompts_of_one_round_need_their_own_ids(engine: Engine) -> None:
    with pytest.raises(InputError, match="two prompts of one round have the id 'p0'"):
        engine.generate([*requests(2), requests(1)[0]], DRAW)
    assert len(engine.generate(requests(2), DRAW)) == 6


def test_what_fails_while_prompts_are_made_reaches_the_reader(engine: Engine) -> None:
    def broken():
        yield from requests(60)
        raise InputError("row 17 is damaged")

    with pytest.raises(InputError, match="row 17"):
        list(engine.stream(broken(), DRAW))
    assert len(engine.generate(requests(2), DRAW)) == 6


def test_no_prompts_no_responses(engine: Engine) -> None:
    assert engine.generate([], DRAW) == []


def test_nothing_listens_beyond_this_machine(engine: Engine) -> None:
    listening = [
        connection.laddr.ip
        for pid in engine.pids
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FlywheelError) as caught, open_engine(tmp_path, SMALL):
        pass
    assert str(tmp_path) in str(caught.value)


def test_greedy_sampling_of_several_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature 0 gives the same response 4 times"):
        Sampling(k=4, temperature=0)
