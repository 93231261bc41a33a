"""A conversation as tokens: character card, history, response (the model input x of Sec. 2.3.1), and what is trained.

A chat template is run once for each sequence of roles, with placeholders for the texts. The control tokens come from
the template alone; what people typed is tokenised by a tokenizer that knows no control tokens, so a user who writes
'<|eot_id|>' or '<think>' has written plain text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flywheel_tasks.core.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_FIXED_DATE = "26 Jul 2024"
"""Llama 3's template prints today's date unless told one, and the same row must give the same tokens on any day."""
_REMEMBERED = 8192


NO_CHARACTER = "none"
"""The character id of talk in which nobody is played."""


class TooLong(InputError):
    """The parts that may never be cut do not fit: the caller rejects the row."""


class UnknownCharacter(InputError):
    """A row of a character without a card: the caller rejects it."""


def refusal(error: InputError) -> str:
    """The reason under which a row that has no tokens is rejected."""
    known = {TooLong: "too_long", UnknownCharacter: "unknown_character"}
    return known.get(type(error), "template_refuses")


@dataclass(frozen=True)
class Card:
    """What makes a character, as a row of schema `character` states it."""

    name: str
    description: str = ""
    traits: tuple[str, ...] = ()
    instructions: str = ""
    greeting: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Card:
        return cls(
            name=str(row["name"]),
            description=str(row.get("description") or ""),
            traits=tuple(map(str, row.get("traits") or ())),
            instructions=str(row.get("instructions") or ""),
            greeting=str(row.get("greeting") or ""),
        )

    @property
    def system(self) -> str:
        """The system message."""
        return str(_card_template().render(card=self)).strip()


def card_of(cards: Mapping[str, Card], character_id: str | None) -> Card | None:
    """The card under which a row is read; None where nobody is played. The rule is one for training, scoring and
    generation: a character whose card is not there is refused, because without it another text would be read."""
    if not character_id or character_id == NO_CHARACTER:
        return None
    if character_id not in cards:
        raise UnknownCharacter(f"character '{character_id[:80]}' has no card: ingest its card (ingest.characters)")
    return cards[character_id]


@dataclass(frozen=True)
class Chat:
    """One row of tokens. `trained` marks targets: an assistant's words and the token that ends its turn (`eot`)."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    eot: NDArray[np.bool_]
    dropped_turns: int = 0


@dataclass(frozen=True)
class _Message:
    role: str
    text: str
    trained: bool


@dataclass(frozen=True)
class _Piece:
    """A part of a rendered template: a control token, literal text, or the place of message number `message`."""

    token: int = -1
    literal: str = ""
    message: int = -1


class Template:
    """A tokenizer's chat template, safe against what the messages say."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"tokenizer {tokenizer.name_or_path} has no chat template: add a chat_template.jinja to its folder"
            )
        self.tokenizer = tokenizer
        self._control = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        longest_first = sorted(self._control, key=lambda token: -len(token))
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self._plain = _without_control_tokens(tokenizer)
        self._skeleton = lru_cache(maxsize=_REMEMBERED)(self._render)
        self._tokens = lru_cache(maxsize=_REMEMBERED)(self._encode)
        self.eot_id = self._end_of_turn()
        """The control token after an assistant's words."""
        self.stop_ids = (self.eot_id,) if tokenizer.eos_token_id in (None, self.eot_id) else (
            self.eot_id, int(tokenizer.eos_token_id))  # fmt: skip
        """What ends a generated response."""

    def chat(
        self,
        turns: Iterable[Mapping[str, Any]],
        *,
        card: Card | None = None,
        response: str | None = None,
        max_tokens: int | None = None,
    ) -> Chat:
        """The tokens of card, history and response. Without a response the row ends where the assistant would begin,
        unless its last turn is the assistant's already (a training example)."""
        messages = [*_messages(turns, card)]
        if response is not None:
            return self._fit([*messages, _Message("assistant", response.strip(), True)], 1, max_tokens, ask=False)
        ask = not messages or messages[-1].role != "assistant"
        return self._fit(messages, 0 if ask else 1, max_tokens, ask)

    def pair(
        self,
        turns: Iterable[Mapping[str, Any]],
        y0: str,
        y1: str,
        *,
        card: Card | None = None,
        max_tokens: int | None = None,
    ) -> Chat:
        """Both responses in one row, as two assistant turns after the history (the input of eq. 2)."""
        both = [_Message("assistant", y.strip(), False) for y in (y0, y1)]
        return self._fit([*_messages(turns, card), *both], 2, max_tokens, ask=False)

    def _fit(self, messages: list[_Message], kept: int, max_tokens: int | None, ask: bool) -> Chat:
        """Cut the history from the left, by whole turns and so that a user speaks first, until the row fits."""
        first = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
        system, rest = messages[:first], messages[first:]
        history = len(rest) - kept
        cuts = [0, *(i for i in range(1, history) if rest[i].role == "user")]

        def assemble(cut: int) -> Chat:
            return self._assemble([*system, *rest[cut:]], ask, cut)

        whole = assemble(0)
        if max_tokens is None or len(whole.ids) <= max_tokens:
            return whole
        place = bisect_left(cuts, True, lo=1, key=lambda cut: len(assemble(cut).ids) <= max_tokens)
        if place == len(cuts):
            least = len(assemble(cuts[-1]).ids)
            raise TooLong(
                f"card, last turn and response take {least} tokens of {max_tokens}: shorten them or raise max_tokens"
            )
        return assemble(cuts[place])

    def _assemble(self, messages: Sequence[_Message], ask: bool, dropped: int) -> Chat:
        ids: list[int] = []
        trained: list[bool] = []
        ends: list[bool] = []
        run, own = "", -1
        """`run` is plain text since the last boundary; `own` is how much of its beginning an assistant wrote."""
        learns = pending = False
        """`pending`: a trained turn's words are over and the token that ends it has not come yet."""

        def flush() -> None:
            nonlocal run, own
            tokens, starts = self._tokens(run) if run else ((), ())
            ids.extend(tokens)
            trained.extend(learns and start < own for start in starts)
            ends.extend([False] * len(tokens))
            run, own = "", -1

        for piece in self._skeleton(tuple(message.role for message in messages), ask):
            if piece.message >= 0:
                message = messages[piece.message]
                if message.role == "assistant":
                    # When the model speaks, its words begin a token of their own after the header.
                    flush()
                    learns = pending = message.trained
                    own = len(message.text)
                run += message.text
            elif piece.token >= 0:
                closes = pending and not run[max(own, 0) :].strip()
                flush()
                ids.append(piece.token)
                trained.append(closes)
                ends.append(closes)
                learns = pending = False
            else:
                run += piece.literal
        flush()
        return Chat(np.array(ids, np.int32), np.array(trained, np.bool_), np.array(ends, np.bool_), dropped)

    def _render(self, roles: tuple[str, ...], ask: bool) -> tuple[_Piece, ...]:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": f"{_OPEN}{i}{_CLOSE}"} for i, role in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, date_string=_FIXED_DATE
            )
        except (TemplateError, ValueError) as error:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the roles {' '.join(roles)}: {error}"
            ) from error
        pieces: list[_Piece] = []
        for number, part in enumerate(_PLACEHOLDER.split(text)):
            pieces += [_Piece(message=int(part))] if number % 2 else self._literal(part)
        found = [piece.message for piece in pieces if piece.message >= 0]
        if found != list(range(len(roles))):
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path} does not print each of {' '.join(roles)} once and "
                "in order: use another chat_template.jinja"
            )
        if not ask:
            # ChatML prints a line feed after the last turn: a row ends with the token that ends it.
            while pieces and pieces[-1].literal.isspace():
                pieces.pop()
        return tuple(pieces)

    def _literal(self, text: str) -> list[_Piece]:
        parts = self._split.split(text) if self._split else [text]
        return [
            _Piece(token=self._control[part]) if part in self._control else _Piece(literal=part)
            for part in parts
            if part
        ]

    def _encode(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids and where in `text` each begins."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        return tuple(encoding.ids), tuple(start for start, _ in encoding.offsets)

    def _end_of_turn(self) -> int:
        probe = self._assemble([_Message("user", "a", False), _Message("assistant", "a", True)], ask=False, dropped=0)
        if probe.eot.sum() != 1:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path} ends no assistant turn with a control token: "
                "a model trained on it would never stop; use another chat_template.jinja"
            )
        return int(probe.ids[probe.eot][0])


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise InputError(f"model {folder}: its tokenizer cannot be read: {reason}: give a complete folder") from error


def _messages(turns: Iterable[Mapping[str, Any]], card: Card | None) -> Iterable[_Message]:
    if card is not None:
        yield _Message("system", card.system, False)
    for number, turn in enumerate(turns):
        role = turn["role"]
        if role not in ROLES:
            raise InputError(f"turn {number}: role '{str(role)[:40]}' is unknown: legal roles are {', '.join(ROLES)}")
        if role == "system" and card is not None:
            raise InputError(f"turn {number}: a system message beside a character card: leave one of them out")
        yield _Message(role, str(turn["content"]).strip(), role == "assistant" and bool(turn.get("trained")))


def _without_control_tokens(tokenizer: Any) -> Any:
    """The same segmentation without any added token, whether it is declared special or not."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(
        json.dumps(spec | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
    )


@lru_cache(maxsize=1)
def _card_template() -> Any:
    from jinja2 import Environment, StrictUndefined

    # The card becomes plain text for a model, not markup: escaping would change what is read.
    environment = Environment(undefined=StrictUndefined, autoescape=False)  # noqa: S701
    return environment.from_string(resources.files("flywheel_tasks.models").joinpath("card.j2").read_text())
