"""Rollouts of online RL (Sec. 2.4.3): the process beside the learners that generates and scores what they learn from.

It holds the engine, which serves the policy as the learner last handed it over, and both preference models. One call
makes one step's batch: several prompts' worth of k responses that share the prefix cache, each with the engine's own
log-probabilities (π_gen) and its reward. The learner reaches it as a Ray actor (rl_remote.py).
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding import guardrail, reward
from flywheel_tasks.herding.reward import Floats, RewardConfig, Scale
from flywheel_tasks.herding.sft import languages
from flywheel_tasks.models import generate
from flywheel_tasks.models.chat import Card
from flywheel_tasks.models.engine import Completion, Request, open_engine
from flywheel_tasks.models.engine_config import EngineConfig, Sampling, SamplingConfig
from flywheel_tasks.models.engine_worker import BLOCK_TOKENS
from flywheel_tasks.models.score import Scorer
from flywheel_tasks.training import rl

POLICY = "policy"
_LOOKED_AT = 64
_KEPT = 4
"""Rollouts whose metrics are remembered: with overlap one more than the learner has asked for."""
OTHER_MACHINE = (
    "the learner's weights are not on the engines' machine: without GPUs of their own on both sides rl hands them over "
    "through shared memory, so the learners and the rollouts must be on one node"
)


@dataclass(frozen=True)
class Setup:
    """What the process is started with."""

    policy: ModelConfig
    reward_model: str
    pairwise_model: str
    cards: Mapping[str, Card]
    engine: EngineConfig
    sampling: SamplingConfig
    room: int
    """Most tokens of a prompt with its response."""
    reward: RewardConfig
    loss: rl.LossConfig
    language: LanguageConfig
    batch: int
    """Prompts of a step."""
    seed: int


@dataclass(frozen=True)
class Drawn:
    """Responses to some prompts: rows of schema `completion`, their raw scores, and the tokens behind both."""

    completions: pa.Table
    raw: Floats
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Completion]


@dataclass
class Order:
    """In which order prompts come: a shuffle of its own for every pass over them, the same for the same seed."""

    prompts: int
    seed: int
    _shuffled: dict[int, np.ndarray] = field(default_factory=dict)

    def take(self, cursor: int, count: int) -> tuple[list[int], int]:
        """`count` different prompts from there on, and where the next ones begin."""
        taken: dict[int, None] = {}
        while len(taken) < min(count, self.prompts):
            taken.setdefault(self._at(cursor), None)
            cursor += 1
        return list(taken), cursor

    def _at(self, cursor: int) -> int:
        lap, place = divmod(cursor, self.prompts)
        if lap not in self._shuffled:
            self._shuffled = {lap: np.random.default_rng((self.seed, lap)).permutation(self.prompts)}
        return int(self._shuffled[lap][place])


class Rollouts:
    """Opens its engine at once and its models when they are first needed, on a GPU before the engine: that takes its
    share of what is free then. Close it, or use it in a `with` block."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._stack = ExitStack()
        if torch.cuda.is_available():
            _ = self._pointwise, self._pairwise
        self._engine = self._stack.enter_context(open_engine(setup.policy, setup.engine))
        self._prompts = pa.table({})
        self._scale = Scale(0.0, 1.0)
        self._order = Order(0, setup.seed)
        self._told: dict[int, dict[str, float]] = {}

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    # -- what the stage asks before it trains

    def ready(self) -> list[int]:
        """The engines' processes, once they serve the policy."""
        return self._engine.pids

    def load(self, prompts: pa.Table, scale: Scale) -> None:
        """The prompts to learn from, and the scale of their rewards."""
        self._prompts, self._scale = prompts, scale
        self._order = Order(prompts.num_rows, self._setup.seed)

    def respond(self, prompts: pa.Table, k: int, name: str) -> Drawn:
        """k responses to every prompt by the policy that the engine serves now, scored. `name` is whose draw it is:
        the same prompts under another name are drawn anew."""
        return self._draw(prompts, self._setup.sampling.model_copy(update={"k": k}), name)

    def probe_prompts(self, count: int) -> list[list[int]]:
        """A few prompts of the run as tokens, as short as they may be: what is compared after every step need not be
        dear. Longer than a block of the prefix cache they should be, since only those show a cache that was kept."""
        refused: dict[str, str] = {}
        found = [generate.encoded(self._encode, row, refused) for row in self._prompts.slice(0, _LOOKED_AT).to_pylist()]
        return sorted(filter(None, found), key=lambda ids: (len(ids) <= BLOCK_TOKENS, len(ids)))[:count]

    @staticmethod
    def digest(path: str) -> str | None:
        """What this machine holds under that path; None where it holds nothing."""
        try:
            return hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            return None

    # -- what the learner asks

    def batch(self, step: int, cursor: int) -> tuple[pa.Table, int]:
        """The training rows of one rollout, and where the next one's prompts begin.

        A group whose rewards are all equal has no advantage and is left out, counted. If no group of a batch has one,
        other prompts are drawn; that none of all prompts has one is an error."""
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter()
        parts: list[tuple[Drawn, reward.Rewards]] = []
        seconds: Counter[str] = Counter()
        first = cursor
        while not rows:
            if cursor - first >= self._prompts.num_rows:
                raise FlywheelError(
                    f"step {step}: the rewards of the {self._setup.sampling.k} responses are equal for each of "
                    f"{counts['equal']} prompts ({counts['failed']} more have none): nothing is left to learn; raise "
                    "rl.sampling.temperature or k, or train a reward model that tells responses apart"
                )
            places, cursor = self._order.take(cursor, self._setup.batch)
            drawn = self._draw(self._prompts.take(places), self._setup.sampling, f"{POLICY}-{cursor}", seconds)
            rewards = self._rewards(drawn)
            parts.append((drawn, rewards))
            rows += self._groups(drawn, rewards.total, cursor, counts)
        self._told.pop(step, None)  # done again after a resume, it is the newest
        self._told[step] = self._metrics(parts, counts, seconds)
        for old in list(self._told)[:-_KEPT]:
            del self._told[old]
        return pa.Table.from_pylist(rows, rl.ROWS), cursor

    def told(self, step: int) -> dict[str, float]:
        """What is to be logged of a step's rollout."""
        return self._told.get(step, {})

    def serve(self, path: str) -> list[str]:
        """Serve the weights in this file from now on; the prefix cache is emptied. Returns the checksum of what each
        worker of the engines loaded."""
        if not Path(path).exists():
            raise FlywheelError(OTHER_MACHINE)
        return self._engine.update(path)

    def gpus(self) -> list[str]:
        """The GPUs that the engines run on."""
        return self._engine.gpus

    def transfer(self, method: str, info: dict[str, Any] | None = None) -> list[str]:
        """One call of vLLM's weight transfer, to every engine; after the last one, what each worker loaded."""
        return self._engine.transfer(method, info)

    def draw(self, requests: Sequence[Request], sampling: Sampling, replica: int | None = None) -> list[Completion]:
        """Plain generation, for the probe."""
        return self._engine.generate(requests, sampling, replica=replica)

    def replicas(self) -> int:
        return self._engine.replicas

    def compare(self, current: pa.Table, start: pa.Table) -> Floats:
        """P(the current policy's response is preferred over the first one's), by the pairwise model in both orders."""
        pairs = guardrail.pairwise_rows(current, start, self._setup.cards)
        return np.asarray(self._pairwise.pairwise(pairs), np.float64)

    # -- inside

    @cached_property
    def _template(self) -> Any:
        return generate.template_of(self._engine)

    @cached_property
    def _encode(self) -> generate.Encode:
        sampling = self._setup.sampling
        room = min(self._setup.room - sampling.max_tokens, generate.prompt_room(self._engine, sampling))
        return generate.encoder(self._template, self._setup.cards, room)

    @cached_property
    def _pointwise(self) -> Scorer:
        return reward.preference_scorer(self._setup.reward_model)

    @cached_property
    def _pairwise(self) -> Scorer:
        return reward.pairwise_scorer(self._setup.pairwise_model)

    @cached_property
    def _language(self) -> Any:
        return languages(self._setup.language)

    def _draw(
        self, prompts: pa.Table, sampling: SamplingConfig, name: str, seconds: Counter[str] | None = None
    ) -> Drawn:
        seconds = Counter() if seconds is None else seconds
        began = time.monotonic()
        encoded: dict[str, list[int]] = {}
        refused: dict[str, str] = {}
        for row in prompts.to_pylist():
            encoded[row["prompt_id"]] = generate.encoded(self._encode, row, refused)
        seeded = sampling.seeded(generate.policy_seed(sampling.seeded(self._setup.seed), name))
        found = self._engine.generate([Request(name, ids) for name, ids in encoded.items()], seeded)
        drawn: dict[str, list[Completion]] = {}
        for completion in found:
            drawn.setdefault(completion.id, []).append(completion)
        table = generate.tabulate(prompts, drawn, refused, self._template, seeded, name)
        generated = time.monotonic()
        raw = reward.preference(self._pointwise, table, self._setup.cards)
        seconds.update({"generate": generated - began, "score": time.monotonic() - generated})  # type: ignore[dict-item]
        return Drawn(table, raw, list(encoded.values()), found)

    def _rewards(self, drawn: Drawn) -> reward.Rewards:
        setup = self._setup
        return reward.reward(
            drawn.completions, drawn.raw, setup.reward, self._scale, limit=setup.sampling.max_tokens,
            language=self._language,
        )  # fmt: skip

    def _groups(self, drawn: Drawn, total: Floats, cursor: int, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        k, stop = self._setup.sampling.k, frozenset(self._engine.stop)
        for place, prompt in enumerate(drawn.prompts):
            mine = slice(place * k, (place + 1) * k)
            rewards, responses = total[mine], drawn.responses[mine]
            counts["groups"] += 1
            if not np.isfinite(rewards).all():
                counts["failed"] += 1
            elif np.ptp(rewards) <= 0:
                counts["equal"] += 1
            else:
                yield rl.group(
                    f"{responses[0].id}#{cursor}", prompt, [c.tokens for c in responses],
                    [c.logprobs for c in responses], rewards, self._setup.loss, stop,
                )  # fmt: skip

    def _metrics(
        self, parts: Sequence[tuple[Drawn, reward.Rewards]], counts: Counter[str], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        table = pa.concat_tables([drawn.completions for drawn, _ in parts])
        total = np.concatenate([rewards.total for _, rewards in parts])
        columns = {
            name: np.concatenate([rewards.components[name] for _, rewards in parts]) for name in reward.COMPONENTS
        }
        groups = total.reshape(-1, self._setup.sampling.k)
        known = groups[np.isfinite(groups).all(1)]
        answered = table.filter(pc.not_equal(table["finish"], "error"))
        found = reward.means(reward.Rewards(total, columns))
        if known.size:
            found["reward/spread"] = float(known.std(1).mean())
            found["reward/best"] = float(known.max(1).mean())
        if answered.num_rows:
            cut = pc.equal(answered["finish"], "length").cast(pa.float64())
            found["response/tokens"] = float(pc.mean(answered["tokens"]).as_py())
            found["response/unfinished"] = float(pc.mean(cut).as_py())
        found |= {f"groups/{name}": float(counts[name]) for name in ("equal", "failed")}
        return found | {"groups": float(counts["groups"])} | {f"seconds/{name}": s for name, s in seconds.items()}
