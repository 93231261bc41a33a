"""A judge behind an OpenAI-compatible endpoint: many requests at once, tries that end, and one deadline for all."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flywheel_tasks.evaluation.judge import Answer, JudgeConfig, response_format
from flywheel_tasks.evaluation.rubric import Message

_GIVE_UP = 20
"""So many requests without one answer mean that the endpoint is down: the others are not tried."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0


@dataclass
class _Health:
    answered: int = 0
    failed: int = 0
    reason: str = ""

    @property
    def down(self) -> bool:
        return not self.answered and self.failed >= _GIVE_UP


@dataclass
class _Line:
    """What the asking thread hands over; `None` ends it."""

    answers: queue.SimpleQueue[Answer | None] = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)


def ask(requests: Sequence[list[Message]], config: JudgeConfig) -> Iterator[Answer]:
    """One answer for every request, in the order in which they come; what fails says why."""
    if not requests:
        return
    line = _Line()
    thread = threading.Thread(target=_run, args=(requests, config, line), daemon=True, name="judge")
    thread.start()
    left = set(range(len(requests)))
    try:
        while (answer := line.answers.get()) is not None:
            left.discard(answer.request)
            yield answer
    finally:
        line.stop.set()
    yield from (Answer(index, None, "unanswered") for index in sorted(left))


def _run(requests: Sequence[list[Message]], config: JudgeConfig, line: _Line) -> None:
    try:
        asyncio.run(_all(requests, config, line))
    finally:
        line.answers.put(None)


async def _all(requests: Sequence[list[Message]], config: JudgeConfig, line: _Line) -> None:
    from openai import AsyncOpenAI

    key = os.environ.get(config.key_variable) or "none"
    end = time.monotonic() + config.deadline_s
    waiting = iter(enumerate(requests))
    health = _Health()
    # The client's own retries are off: they know no deadline.
    async with AsyncOpenAI(base_url=config.url, api_key=key, max_retries=0, timeout=config.request_timeout_s) as client:

        async def work() -> None:
            for index, messages in waiting:
                if line.stop.is_set():
                    return
                line.answers.put(await _one(client, index, messages, config, end, health))

        await asyncio.gather(*(work() for _ in range(min(config.parallel, len(requests)))))


async def _one(
    client: Any, index: int, messages: list[Message], config: JudgeConfig, end: float, health: _Health
) -> Answer:
    wait = _FIRST_WAIT_S
    for attempt in range(config.retries + 1):
        left = end - time.monotonic()
        if left <= 0:
            return Answer(index, None, "deadline")
        if health.down:
            return Answer(index, None, f"endpoint_down_{health.reason}")
        answer, reason, again = await _try(client, messages, config, left)
        if reason is None:
            health.answered += 1
            return Answer(index, answer, None)
        health.failed, health.reason = health.failed + 1, reason
        if not again or attempt == config.retries:
            return Answer(index, None, reason)
        await asyncio.sleep(min(wait, max(end - time.monotonic(), 0)))
        wait = min(2 * wait, _LONGEST_WAIT_S)
    return Answer(index, None, "unanswered")


async def _try(
    client: Any, messages: list[Message], config: JudgeConfig, left: float
) -> tuple[str | None, str | None, bool]:
    """The answer, or why there is none and whether another try may help."""
    from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

    request = client.chat.completions.create(
        model=config.model, messages=messages, temperature=0, max_tokens=config.max_tokens,
        response_format=response_format(),
    )  # fmt: skip
    try:
        # A server that sends a byte now and then would never run into the client's own timeout.
        reply = await asyncio.wait_for(request, min(left, config.request_timeout_s))
        choice = reply.choices[0]
        if choice.finish_reason == "length":
            return None, "cut_off", False
        return choice.message.content or "", None, False
    except (APITimeoutError, TimeoutError):
        return None, "timeout", True
    except APIConnectionError:
        return None, "unreachable", True
    except APIStatusError as error:
        return None, f"http_{error.status_code}", error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    except (OpenAIError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return None, "not_the_protocol", False
