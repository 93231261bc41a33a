"""Rollouts by a real engine and a real preference model, and the weights that the learner hands over."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.counting import counting, vowels
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.herding.reward import Scale
from flywheel_tasks.herding.rl_hooks import Batches, Sync
from flywheel_tasks.herding.rl_remote import Here
from flywheel_tasks.herding.rollouts import Rollouts
from flywheel_tasks.models import generate
from flywheel_tasks.models.arrival import Checksum
from flywheel_tasks.models.chat import Template, load_tokenizer
from flywheel_tasks.models.checkpoint import save_policy
from flywheel_tasks.models.load import Policy, load_policy
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.probe import ProbeConfig
from flywheel_tasks.simulation.characters import demo_characters
from flywheel_tasks.training import rl
from flywheel_tasks.training.task import After
from tests.herding import rl_world
from tests.models import engines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROBE = ProbeConfig(tokens=4, most=0.5, mean=0.1)


@pytest.fixture(scope="module")
def judges(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pointwise = counting(tiny_model, tmp_path_factory.mktemp("counting"), vowels)
    return {"pointwise": pointwise, "pairwise": rl_world.judge(tiny_model, tmp_path_factory.mktemp("p"), "pairwise")}


@pytest.fixture(scope="module")
def world(tiny_model: Path, judges: dict[str, Path]) -> Iterator[Rollouts]:
    from flywheel_tasks.simulation.characters import character_table

    table = character_table(demo_characters())
    with rl_world.unpinned(), Rollouts(rl_world.setup(tiny_model, judges, table)) as made:
        yield made


@pytest.fixture
def rollouts(world: Rollouts) -> Rollouts:
    world.load(rl_world.week(24), Scale(0.0, 1.0))
    return world


def test_a_batch_is_what_the_engine_drew_and_what_it_held_likely(rollouts: Rollouts, tiny_model: Path) -> None:
    table, cursor = rollouts.batch(0, 0)
    assert (table.num_rows, cursor) == (4, 4)
    assert table.schema == rl.ROWS
    for row in table.to_pylist():
        assert len(row["ids"]) == 4
        for ids, marks, gen in zip(row["ids"], row["trained"], row["gen"], strict=True):
            response = sum(marks)
            assert marks == [False] * (len(ids) - response) + [True] * response
            [held] = engines.logprobs(tiny_model, [ids[:-response]], [ids[-response:]])
            assert np.abs(np.subtract(held, gen)).mean() < 0.1
    told = rollouts.told(0)
    assert told["groups"] == 4
    assert told["reward/total"] == pytest.approx(np.mean(table.column("reward").to_pylist()))
    assert set(told) >= {"seconds/generate", "seconds/score", "reward/preference", "response/tokens", "groups/equal"}


def test_the_cursor_gives_the_same_batch_again_and_another_one_the_next(rollouts: Rollouts) -> None:
    first, after = rollouts.batch(0, 0)
    again, _ = rollouts.batch(0, 0)
    following, _ = rollouts.batch(1, after)
    same = [a == b for a, b in zip(first.column("ids").to_pylist(), again.column("ids").to_pylist(), strict=True)]
    assert np.mean(same) >= 0.75  # bfloat16: a response in a hundred turns another way
    assert first.column("row_id").to_pylist() == again.column("row_id").to_pylist()
    assert not set(first.column("row_id").to_pylist()) & set(following.column("row_id").to_pylist())


def test_the_reward_is_known(rollouts: Rollouts, tiny_model: Path, characters: pa.Table) -> None:
    """The mean over all tokens of the share of vowels in each, read through the real checkpoint and scorer."""
    template, cards = Template(load_tokenizer(tiny_model)), generate.cards(characters)
    drawn = rollouts.respond(rl_world.week(24), 4, "any")
    expected = []
    for row in drawn.completions.to_pylist():
        chat = template.chat(row["turns"], card=cards[row["character_id"]], response=row["text"])
        control = template.tokenizer.all_special_ids
        expected.append(np.mean([0 if i in control else vowels(template.tokenizer.decode([i])) for i in chat.ids]))
    assert np.corrcoef(drawn.raw, expected)[0, 1] > 0.98


def test_groups_without_variance_are_counted_and_other_prompts_drawn_until_none_is_left(
    tiny_model: Path, characters: pa.Table, judges: dict[str, Path], tmp_path: Path
) -> None:
    """Only responses with a rare letter earn anything: most groups are equal. With no such letter, all are."""
    rare = counting(tiny_model, tmp_path / "rare", lambda text: float("z" in text.lower()))
    never = counting(tiny_model, tmp_path / "never", lambda text: 0.0)
    for model, nothing in ((rare, False), (never, True)):
        told = rl_world.setup(tiny_model, judges | {"pointwise": model}, characters)
        with rl_world.unpinned(), Rollouts(told) as made:
            made.load(rl_world.week(24), Scale(0.0, 1.0))
            if nothing:
                with pytest.raises(FlywheelError, match=r"equal for each of 24 prompts .* nothing is left to learn"):
                    made.batch(3, 0)
                continue
            table, cursor = made.batch(0, 0)
            counted = made.told(0)
            assert counted["groups/equal"] > 0
            assert table.num_rows == counted["groups"] - counted["groups/equal"] > 0
            assert cursor >= counted["groups"]


def changed(module: Policy) -> Policy:
    """Adapters that turn the policy into another one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return module


class Deaf(Here):
    """Reads new weights and forgets them."""

    def begin(self, name: str, *arguments: Any) -> Any:
        if name != "serve":
            return super().begin(name, *arguments)
        read = Checksum()
        deque(read.over(load_file(arguments[0]).items()), maxlen=0)
        return lambda: [read.value()]


def test_a_stale_engine_is_caught_by_the_probe_and_a_fresh_one_is_not(rollouts: Rollouts, tiny_model: Path) -> None:
    torch.manual_seed(0)
    module = load_policy(tiny_model, lora=Lora(rank=4))
    prompts = rollouts.probe_prompts(4)
    assert len(prompts) == 4
    assert all(len(prompt) > 32 for prompt in prompts)
    stale, fresh = (Sync(kind(rollouts), prompts, PROBE, 1) for kind in (Deaf, Here))
    stale.start(module)  # fresh adapters change nothing: both sides still agree
    changed(module)
    with pytest.raises(FlywheelError, match="the engine does not run the trainer's weights"):
        stale.start(module)
    fresh.start(module)
    fresh.start(load_policy(tiny_model, lora=Lora(rank=4)))


def test_every_rollout_is_told_of_once_when_its_last_update_is_done(rollouts: Rollouts, tiny_model: Path) -> None:
    """Four updates on each of three, the next one made meanwhile."""
    far, updates, rewards = Here(rollouts), 4, list[float]()
    module, sync = load_policy(tiny_model, lora=Lora(rank=4)), Sync(far, rollouts.probe_prompts(2), PROBE, updates)
    sync.start(module)
    source = Batches(far, 3 * updates, updates, ahead=True)
    for step in range(3 * updates):
        table = source.batch(step)
        assert table is not None
        told = sync.after_step(After(step, module, {"step_s": 0.0}, 0))
        assert isinstance(told, dict)
        assert ("reward/total" in told) == ("seconds/sync" in told) == (step % updates == updates - 1)
        if "reward/total" in told and not told["groups/equal"]:
            assert told["reward/total"] == pytest.approx(np.mean(table.column("reward").to_pylist()))
            rewards.append(told["reward/total"])
    assert len(set(rewards)) > 1


def test_weights_on_another_machine_are_named_as_what_they_are(rollouts: Rollouts) -> None:
    with pytest.raises(FlywheelError, match=r"not on the engines' machine.*one node"):
        rollouts.serve("/proc/4194305/fd/9")


def test_a_resumed_run_hands_its_own_weights_over_before_its_first_batch(
    rollouts: Rollouts, tiny_model: Path, tmp_path: Path
) -> None:
    """The engine may still serve what a dead learner had given it."""
    torch.manual_seed(0)
    module, sync = load_policy(tiny_model, lora=Lora(rank=4)), None
    sync = Sync(Here(rollouts), rollouts.probe_prompts(2), PROBE, 1)
    sync.start(module)
    changed(module)
    sync.restore({})
    source = Batches(Here(rollouts), 8, 1, ahead=False)
    source.restore({"cursor": 8})
    table = source.batch(2)
    assert table is not None
    save_policy(module, load_tokenizer(tiny_model), tmp_path / "now")
    row = table.to_pylist()[0]
    ids, n = row["ids"][0], sum(row["trained"][0])
    held, before = (engines.logprobs(f, [ids[:-n]], [ids[-n:]])[0] for f in (tmp_path / "now", tiny_model))
    assert np.abs(np.subtract(held, row["gen"][0])).mean() < 0.1 < np.abs(np.subtract(before, row["gen"][0])).mean()
    assert source.state() == {"cursor": 12}
    sync.start(load_policy(tiny_model, lora=Lora(rank=4)))
