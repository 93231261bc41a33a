"""The two alternatives of every planned pair (Sec. 2.2.2): sampled from the pool of policies, or rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from flywheel_tasks.annotation import rewriting, tool_calls
from flywheel_tasks.annotation.pairing import Made, Plan
from flywheel_tasks.core.config import ModelConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.chat import Card
from flywheel_tasks.models.engine import Engine, open_engine
from flywheel_tasks.models.engine_config import EngineConfig, Sampling
from flywheel_tasks.models.generate import Encode, Partial, complete, encoder, prompt_room, template_of


def policy_names(pool: Sequence[ModelConfig]) -> list[str]:
    """How the policies of a pool are called in pairs: the end of their path, without this machine's folders."""
    names: list[str] = []
    for place, model in enumerate(pool):
        names.append(model.name if model.name not in names else f"{model.name}#{place}")
    return names


def respond(
    planned: Plan,
    pool: Sequence[ModelConfig],
    rewriter: ModelConfig,
    cards: Mapping[str, Card],
    sampling: Sampling,
    rewrite_sampling: Sampling,
    engine_config: EngineConfig,
    *,
    keep_unfinished: bool,
    partial: Partial | None,
) -> tuple[list[Made], list[Made]]:
    """First and second responses along the plan. One engine at a time; the rewriter's comes last and is kept if it is
    a policy's too."""
    names = policy_names(pool)
    rows = len(planned.mode)
    first: list[Made | None] = [None] * rows
    second: list[Made | None] = [None] * rows
    rewritten = np.array([kind is not None for kind in planned.kind], bool)
    order = sorted(range(len(pool)), key=lambda place: pool[place].path == rewriter.path)
    rewriter_in_pool = any(model.path == rewriter.path for model in pool)

    def sample(place: int, engine: Engine) -> None:
        template = template_of(engine)
        encode = encoder(template, cards, prompt_room(engine, sampling))
        twice = (planned.first == place) & ~rewritten & (planned.second == place)
        once = ((planned.first == place) | (~rewritten & (planned.second == place))) & ~twice
        for where, k in ((once, 1), (twice, 2)):
            at = np.flatnonzero(where)
            drawn = _drawn(
                engine, template, planned.prompts.take(pa.array(at)), encode, sampling.model_copy(update={"k": k}),
                names[place], partial, f"pool-{place}-{k}", keep_unfinished,
            )  # fmt: skip
            for row in at.tolist():
                made = drawn[planned.prompts["prompt_id"][row].as_py()]
                if planned.first[row] == place:
                    first[row] = made[0]
                if not rewritten[row] and planned.second[row] == place:
                    second[row] = made[-1]

    def rewrite(engine: Engine) -> None:
        at = [row for row in np.flatnonzero(rewritten).tolist() if not _made(first[row]).reason]
        prompts = planned.prompts.take(pa.array(at, pa.int64()))
        originals = {planned.prompts["prompt_id"][row].as_py(): (_made(first[row]), planned.kind[row]) for row in at}
        template = template_of(engine)
        room = prompt_room(engine, rewrite_sampling)

        def encode(row: Mapping[str, Any]) -> Sequence[int]:
            original, kind = originals[row["prompt_id"]]
            asked = rewriting.prompt(kind, cards[row["character_id"]], row["turns"], original.text)
            return template.chat([{"role": "user", "content": asked}], max_tokens=room).ids.tolist()

        drawn = _drawn(
            engine, template, prompts, encode, rewrite_sampling, "rewriter", partial, "rewrites", keep_unfinished=False
        )
        for row in np.flatnonzero(rewritten).tolist():
            original = _made(first[row])
            policy = f"{original.policy}+{rewriting.label(planned.kind[row])}"
            if original.reason:
                second[row] = Made("", policy, original.reason)
                continue
            answer = drawn[planned.prompts["prompt_id"][row].as_py()][0]
            parsed = rewriting.parse(answer.text)
            reason = f"rewrite_{answer.reason}" if answer.reason else parsed.reason
            second[row] = Made(parsed.reply or "", policy, reason, original.call)

    for place in order:
        rewrites = bool(rewritten.any()) and pool[place].path == rewriter.path
        if not rewrites and not ((planned.first == place) | (~rewritten & (planned.second == place))).any():
            continue
        with open_engine(pool[place], engine_config) as engine:
            sample(place, engine)
            if rewrites:
                rewrite(engine)
    if rewritten.any() and not rewriter_in_pool:
        with open_engine(rewriter, engine_config) as engine:
            rewrite(engine)
    return [_made(made) for made in first], [_made(made) for made in second]


def _drawn(
    engine: Engine,
    template: Any,
    prompts: pa.Table,
    encode: Encode,
    sampling: Sampling,
    policy: str,
    partial: Partial | None,
    name: str,
    keep_unfinished: bool,
) -> dict[str, list[Made]]:
    """The k responses of every prompt, tool calls apart."""
    found: dict[str, list[Made]] = {}
    for chunk in complete(engine, template, prompts, encode, sampling, policy, partial=partial, name=name):
        for row in chunk.table.select(["prompt_id", "text", "finish", "reason"]).to_pylist():
            found.setdefault(row["prompt_id"], []).append(made_of(row, policy, keep_unfinished))
    return found


def made_of(row: Mapping[str, Any], policy: str, keep_unfinished: bool) -> Made:
    """A completion (text, finish, reason) as a response of a pair, its tool call apart."""
    said = tool_calls.split(row["text"])
    unfinished = "unfinished" if row["finish"] == "length" and not keep_unfinished else None
    failed = _short(row["reason"]) if row["finish"] == "error" else None
    return Made(said.text, policy, failed or unfinished or said.reason, said.call)


def _short(reason: str | None) -> str:
    """A reason that can be counted: what went wrong, without its particulars."""
    what = (reason or "failed").removeprefix("InputError: ").split(":", 1)[0].strip()
    return f"generation_{what.replace(' ', '_')[:40].lower()}"


def _made(made: Made | None) -> Made:
    if made is None:
        raise InputError("a response of the plan was not made: this is a defect of the pairs stage")
    return made
