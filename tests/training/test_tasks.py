"""What is trained, on a tiny Llama: each task learns, and its loss is what a plain transformers forward gives."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.training import dpo, preference, rows, sft, signal
from flywheel_tasks.training.step import World
from flywheel_tasks.training.task import Step, Task
from tests.training import bags, chats, pair

LORA = Lora(rank=4, alpha=8)
CPU = Step(0, 1, torch.device("cpu"))
FP32: dict[str, Any] = {"lora": LORA, "dtype": torch.float32}


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> Template:
    return Template(load_tokenizer(tiny_model))


def pairs(count: int = 24) -> pa.Table:
    """Chosen answers speak of the sea, rejected ones of money."""
    rng = np.random.default_rng(0)
    words = [["tide", "wave", "gull", "salt", "harbour"], ["coin", "price", "bank", "loan", "rent"]]
    made = []
    for i in range(count):
        history = chats.turns(*(f"Word {w}." for w in rng.integers(0, 99, 2 * int(rng.integers(0, 3)) + 1)))
        said = [" ".join(rng.choice(side, int(rng.integers(1, 9)))) for side in words]
        made.append(chats.preference(f"p{i}", history, *said))
    return chats.preferences(made)


def examples(count: int = 24) -> pa.Table:
    made = []
    for i in range(count):
        talk = [{"role": "user", "content": f"Say {i % 5}."}, {"role": "assistant", "content": "number " * (i % 5 + 1)}]
        made.append(chats.example(f"e{i}", talk, source=("safety", "capability")[i % 2]))
    return chats.examples(made)


def labelled(count: int = 24) -> pa.Table:
    table = pairs(count).to_pylist()
    return pa.Table.from_pylist(
        [
            {"row_id": f"s{i}", "user": "u", "character_id": "c1", "turns": one["turns"],
             "response": one["chosen" if i % 2 else "rejected"], "continued": bool(i % 2),
             "love": None if i % 3 else bool(i % 2)}
            for i, one in enumerate(table)
        ]
    )  # fmt: skip


def encoded(kind: str, template: Template) -> pa.Table:
    limits = {"max_tokens": 1024}
    return {
        "pointwise": lambda: preference.encode(pairs(), chats.CARDS, template, kind="pointwise", **limits),
        "pairwise": lambda: preference.encode(pairs(), chats.CARDS, template, kind="pairwise", **limits),
        "signals": lambda: signal.encode(labelled(), ("continued", "love"), chats.CARDS, template, **limits),
        "sft": lambda: sft.encode(examples(), chats.CARDS, template, **limits),
        "dpo": lambda: dpo.encode(pairs(), chats.CARDS, template, **limits),
    }[kind]().table


def task(kind: str, base: Path, **loading: Any) -> Task:
    return {
        "pointwise": partial(preference.task, base, kind="pointwise"),
        "pairwise": partial(preference.task, base, kind="pairwise"),
        "signals": partial(signal.task, base, names=("continued", "love")),
        "sft": partial(sft.task, base, sources=("safety", "capability")),
        "dpo": partial(dpo.task, base, beta=0.5),
    }[kind](**loading)


KINDS = ["pointwise", "pairwise", "signals", "sft", "dpo"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_publishes_a_model(kind: str, tiny_model: Path, template: Template, tmp_path: Path) -> None:
    epochs = 24 if kind == "pairwise" else 6  # which of two comes first is drawn anew at every step: harder to learn
    lines = bags.run(
        tmp_path,
        what=task(kind, tiny_model, **FP32),
        rows_table=encoded(kind, template),
        epochs=epochs,
        learning_rate=0.02,
    )
    first, last = lines[0]["metrics"], lines[-1]["metrics"]
    assert last["loss"] < 0.7 * first["loss"]
    if kind in ("pointwise", "pairwise", "dpo"):
        epoch = [line["metrics"]["accuracy"] for line in lines[-3:]]  # a batch is eight rows: one is an eighth of it
        assert np.mean(epoch) > 0.85
    if kind == "sft":
        assert {"loss/safety", "loss/capability"} <= last.keys()
    if kind == "dpo":
        assert first["k3_on_pairs"] == first["margin"] == 0
        assert last["k3_on_pairs"] > 0
    assert all(line["metrics"]["computed_share"] <= 1 for line in lines), "a packed batch has no padding"
    assert (tmp_path / "run" / "models").is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_one_times_eight_is_batch_eight_times_one(
    kind: str, tiny_model: Path, template: Template, tmp_path: Path
) -> None:
    table = encoded(kind, template)
    one, eight = (
        bags.run(tmp_path / str(budget), what=task(kind, tiny_model, **FP32), rows_table=table, token_budget=budget)
        for budget in (1, 100_000)
    )
    assert np.allclose(bags.losses_of(one), bags.losses_of(eight), rtol=2e-4, atol=1e-6)


def _plain_logprobs(base: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


def test_sft_loss_is_the_mean_over_trained_tokens_of_a_plain_forward(tiny_model: Path, template: Template) -> None:
    table = encoded("sft", template).slice(0, 5)
    what = task("sft", tiny_model, **FP32)
    loss = what.loss(what.build(CPU.device), table, CPU)
    expected = 0.0
    for one in table.to_pylist():
        (ids,), (trained,) = one["ids"], one["trained"]
        expected -= float(_plain_logprobs(tiny_model, ids)[torch.tensor(trained[1:])].sum())
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    total, weight = loss.sums["loss/safety"]
    other, more = loss.sums["loss/capability"]
    assert total + other == pytest.approx(expected, rel=1e-5)
    assert weight + more == sum(table.column("count").to_pylist())


@pytest.mark.parametrize("normalised", [False, True])
def test_dpo_loss_is_that_of_plain_sums_against_a_stated_reference(
    tiny_model: Path, template: Template, normalised: bool
) -> None:
    table = encoded("dpo", template).slice(0, 3)
    what = dpo.task(tiny_model, beta=0.5, smoothing=0.1, length_normalised=normalised, **FP32)
    module = what.build(CPU.device)
    rng = np.random.default_rng(0)
    before = [(-rng.exponential(5, sum(map(sum, t)))).tolist() for t in table.column("trained").to_pylist()]
    table = table.append_column("prepared", pa.array(before, pa.list_(pa.float32())))
    expected = 0.0
    for one in table.to_pylist():
        margin, start = 0.0, 0
        for sign, ids, trained in zip((1, -1), one["ids"], one["trained"], strict=True):
            n = sum(trained)
            now = float(_plain_logprobs(tiny_model, ids)[torch.tensor(trained[1:])].sum())
            then = sum(one["prepared"][start : start + n])
            start += n
            margin += sign * (now - then) / (n if normalised else 1)
        expected += 0.9 * np.logaddexp(0, -0.5 * margin) + 0.1 * np.logaddexp(0, 0.5 * margin)
    assert what.loss(module, table, CPU).total.item() == pytest.approx(expected, rel=1e-4)


def test_the_reference_is_the_model_before_training_and_is_computed_once(
    tiny_model: Path, template: Template, tmp_path: Path
) -> None:
    table = encoded("dpo", template)
    what = task("dpo", tiny_model, **FP32)
    settings: dict[str, Any] = {"what": what, "rows_table": table, "save_every": 2, "epochs": 2, "learning_rate": 0.02}
    straight = bags.run(tmp_path / "straight", **settings)
    assert straight[0]["metrics"]["loss"] == pytest.approx(math.log(2))
    stored = next((tmp_path / "straight" / "run" / "prepared").iterdir())
    before = stored.read_bytes()
    link = bags.Here(tmp_path / "straight")
    bags.run_loop(bags.job(tmp_path / "straight", **(settings | {"epochs": 3})), World(), link)
    assert stored.read_bytes() == before
    assert len(link.lines) == 9


def test_labels_decide_how_signals_are_weighed(tiny_model: Path, template: Template) -> None:
    table = encoded("signals", template)
    what = task("signals", tiny_model, **FP32)
    loss = what.loss(what.build(CPU.device), table, CPU)
    assert loss.sums["loss/continued"][1] == 24
    assert loss.sums["loss/love"][1] == 8
    assert sum(table.column("count").to_pylist()) == 32


def test_a_published_scorer_scores_as_the_trained_one(tiny_model: Path, template: Template, tmp_path: Path) -> None:
    from flywheel_tasks.models.heads import load_scorer
    from flywheel_tasks.models.packed import pack
    from flywheel_tasks.training import state

    table = encoded("pointwise", template)
    bags.run(tmp_path, what=task("pointwise", tiny_model, **FP32), rows_table=table, epochs=6, learning_rate=0.02)
    uri = f"file://{tmp_path}/run"
    state.fetch(uri, state.published(uri)[-1], tmp_path / "model")
    scorer = load_scorer(tmp_path / "model", dtype=torch.float32, trainable=False)
    with torch.no_grad():
        chosen, rejected = scorer(pack(rows.sequences(table)[0]))[:, 0].view(-1, 2).unbind(1)
    assert (chosen > rejected).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["lora-float32-sft", "full-float32-pointwise", "lora-float32-dpo"])
def test_layers_that_are_computed_again_keep_less_and_give_the_same_gradient(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    kept: dict[bool, int] = {}
    for again in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_weighed, sizes), lambda tensor: tensor):
            told = pair.settings(tiny_model, f"copies-{kind}" + "-again" * again)
            bags.run(tmp_path / str(again), **told | {"steps": 1, "token_budget": 10_000})
        kept[again] = sum(sizes)
    assert bags.apart(bags.gradient(tmp_path / "False"), bags.gradient(tmp_path / "True")) < 1e-6
    assert kept[True] < 0.6 * kept[False]


def _weighed(sizes: list[int], tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.nn.Parameter):
        sizes.append(tensor.nbytes)
    return tensor
