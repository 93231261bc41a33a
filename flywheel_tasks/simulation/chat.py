"""Users chat with a policy; what happened is known exactly, down to the chance that each reply would be answered.

All conversations advance together, one reply each per round, so that a language model can answer in large batches. Each
conversation has its own random stream: its course depends on the seed and on the replies, not on its neighbours.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flywheel_tasks.simulation import language, users
from flywheel_tasks.simulation.characters import Character
from flywheel_tasks.simulation.language import Context, Policy
from flywheel_tasks.simulation.plants import Planted, plant_identifier, unsafe_message
from flywheel_tasks.simulation.users import LOCALES, SimulatedUser, Turn

WITHIN = dt.timedelta(minutes=10)
"""Table 2: a conversation is continued when the user writes again within 10 minutes."""


@dataclass
class TrueTurn:
    """One message as it was sent, with everything that followed from it."""

    message_id: str
    role: str
    content: str
    at: dt.datetime
    love: bool = False
    thumb_up: bool = False
    thumb_down: bool = False
    feedback: str | None = None
    regenerated: bool = False
    continued: bool = False
    p_continue: float | None = None
    signals_at: dict[str, dt.datetime] = field(default_factory=dict)


@dataclass
class TrueConversation:
    conversation_id: str
    user: SimulatedUser
    character: Character
    language: str
    intent: str
    source: str
    model_version: str
    turns: list[TrueTurn] = field(default_factory=list)
    planted: list[Planted] = field(default_factory=list)
    near_duplicate_of: str | None = None
    unsafe: str | None = None


@dataclass(frozen=True)
class Mix:
    """How often the special cases occur: the things that curation is there to find."""

    internal: float = 0.1
    identifiers: float = 0.02
    near_duplicates: float = 0.05
    unsafe: float = 0.01
    returning: float = 0.15
    most_turns: int = 40
    """Messages of a user in one conversation at most. Policies answer in rounds: the longest one sets their number."""
    regular: bool = False
    """People come at even intervals. Chance visits would hide a lift from a hundred users."""


def chat(
    people: list[SimulatedUser],
    characters: tuple[Character, ...],
    policies: Mapping[str, Policy],
    *,
    start: dt.date,
    days: int,
    seed: int,
    mix: Mix | None = None,
    version_of: Mapping[str, str] | None = None,
) -> list[TrueConversation]:
    """Every conversation of `days` days, in order of start; each is held with one of the policies: its user's
    (`version_of`, by user id), or one drawn for it."""
    mix = mix or Mix()
    states = _begin(people, characters, tuple(policies), start, days, seed, mix, version_of or {})
    active = states
    while active:
        for version in policies:
            turn = [s for s in active if s.truth.model_version == version]
            for state, reply in zip(turn, policies[version]([s.context() for s in turn]) if turn else [], strict=True):
                state.answered(reply)
        active = [s for s in active if s.open]
    return [s.truth for s in states]


class _State:
    """One conversation under way."""

    def __init__(self, truth: TrueConversation, seed: int, index: int, clock: dt.datetime, mix: Mix) -> None:
        self.truth, self.mix, self.clock, self.open = truth, mix, clock, True
        self.rng = np.random.default_rng([seed, 3, index])
        self.seed = int(self.rng.integers(2**31))
        self.history: list[Turn] = []
        self.saying_goodbye = self.pleased = False

    def say(self, content: str) -> None:
        if self.rng.random() < self.mix.identifiers:
            content, planted = plant_identifier(self.rng, content, self._next_id())
            self.truth.planted.append(planted)
        self._add("user", content)

    def context(self) -> Context:
        self.seed += 1
        t = self.truth
        return Context(t.conversation_id, t.character, t.language, tuple(self.history), self.seed)

    def answered(self, reply: str) -> None:
        t, rng = self.truth, self.rng
        history = list(self.history)
        self.clock += dt.timedelta(seconds=float(rng.uniform(0.8, 6.0)))
        turn = self._add("assistant", reply)
        p = 0.0 if self.saying_goodbye else users.continue_probability(t.user, t.character, history, reply)
        turn.p_continue = p
        stays = bool(rng.random() < p) and sum(x.role == "user" for x in t.turns) < self.mix.most_turns
        chances = users.signal_probabilities(
            t.user, t.character, history, reply, intent=t.intent, leaving=not stays, pleased_before=self.pleased
        )
        if rng.random() < chances.regenerate and not self.saying_goodbye and not t.turns[-2].regenerated:
            turn.regenerated = True
            self._react(turn, "regenerate")
            self.history.pop()
            return
        turn.love, turn.thumb_up = (bool(rng.random() < x) for x in chances[:2])
        turn.thumb_down = not (turn.love or turn.thumb_up) and bool(rng.random() < chances.thumb_down)
        for name in ("love", "thumb_up", "thumb_down"):
            if getattr(turn, name):
                self._react(turn, name)
        if rng.random() < chances.feedback:
            turn.feedback = language.written_feedback(rng, t.language)
            self._react(turn, "feedback")
        self.pleased = turn.love or turn.thumb_up
        self._go_on(turn, stays)

    def _go_on(self, turn: TrueTurn, stays: bool) -> None:
        rng, t = self.rng, self.truth
        if stays:
            pause = dt.timedelta(seconds=float(min(rng.lognormal(3.6, 0.8), 560.0)))
            turn.continued = True
        elif not self.saying_goodbye and rng.random() < self.mix.returning:
            pause = dt.timedelta(minutes=float(rng.uniform(15, 600)))
        else:
            self.open = False
            return
        self.clock = max(self.clock, turn.at) + pause
        turn.continued = self.clock - turn.at <= WITHIN
        self.saying_goodbye = bool(rng.random() < 0.08)
        if self.saying_goodbye:
            self.say(language.goodbye(rng, t.character, t.language))
        else:
            self.say(language.follow_up(rng, t.character, t.language, turn.content))

    def _react(self, turn: TrueTurn, signal: str) -> None:
        turn.signals_at[signal] = self.clock = self.clock + dt.timedelta(seconds=float(self.rng.uniform(1, 9)))

    def _add(self, role: str, content: str) -> TrueTurn:
        turn = TrueTurn(self._next_id(), role, content, self.clock)
        self.truth.turns.append(turn)
        self.history.append(Turn(role, content))  # type: ignore[arg-type]
        return turn

    def _next_id(self) -> str:
        return f"{self.truth.conversation_id}-m{len(self.truth.turns):03d}"


def _begin(
    people: list[SimulatedUser],
    characters: tuple[Character, ...],
    versions: tuple[str, ...],
    start: dt.date,
    days: int,
    seed: int,
    mix: Mix,
    version_of: Mapping[str, str],
) -> list[_State]:
    """Draw who talks to whom and when, and let each user open. Popularity falls as 1/rank: one character dominates."""
    rng = np.random.default_rng([seed, 2])
    popularity = 1.0 / np.arange(1, len(characters) + 1)
    popularity = rng.permutation(popularity / popularity.sum())
    held = [visit for u in people for visit in _visits(rng, u, days, mix.regular)]
    hours = np.clip(rng.normal(17.0, 4.5, len(held)), 0.0, 23.0)
    starts = sorted(range(len(held)), key=lambda i: (held[i][1], hours[i], i))
    midnight = dt.datetime.combine(start, dt.time(), dt.UTC)
    states: list[_State] = []
    said: dict[str, list[tuple[str, str]]] = {}
    for index, i in enumerate(starts):
        user, day = held[i]
        options, shares = zip(*LOCALES[user.locale], strict=True)
        character = characters[int(rng.choice(len(characters), p=popularity))]
        spoken, intent = str(rng.choice(options, p=shares)), str(rng.choice(character.intents))
        source = "internal" if rng.random() < mix.internal else "production"
        drawn = versions[int(rng.integers(len(versions)))]
        truth = TrueConversation(
            conversation_id=f"c{start:%y%m%d}-{index:07d}", user=user, character=character,
            language=spoken, intent=intent, source=source, model_version=version_of.get(user.user_id, drawn),
        )  # fmt: skip
        state = _State(truth, seed, index, midnight + dt.timedelta(days=day, hours=float(hours[i])), mix)
        earlier = said.setdefault(truth.language, [])
        if rng.random() < mix.unsafe:
            truth.unsafe, text = unsafe_message(rng)
        elif earlier and rng.random() < mix.near_duplicates:
            truth.near_duplicate_of, text = earlier[int(rng.integers(len(earlier)))]
            text = _disguise(rng, text)
        else:
            text = language.opening(state.rng, character, truth.language, truth.intent)
            earlier.append((f"{truth.conversation_id}-m000", text))
        state.say(text)
        states.append(state)
    return states


def _visits(rng: np.random.Generator, user: SimulatedUser, days: int, regular: bool) -> list[tuple[SimulatedUser, int]]:
    """A user with the day of each of their conversations."""
    rate = user.conversations_per_day
    if regular:
        due = np.floor(rate * np.arange(days + 1) + rng.random())
        counts = np.diff(due).astype(int).tolist()
    else:
        counts = [int(rng.poisson(rate)) for _ in range(days)]
    return [(user, day) for day, count in enumerate(counts) for _ in range(count)]


def _disguise(rng: np.random.Generator, text: str) -> str:
    """The same words in another dress, as many people type the same thing."""
    dresses = (text.upper(), text.rstrip("?!.") + "??", text.capitalize() + " 🙏", f"um {text}", text.replace(",", ""))
    return language.pick(rng, dresses)
