"""A language model as a policy of the simulation: users chat with what the generation engine serves."""

from __future__ import annotations

from collections.abc import Sequence

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.chat import Card, Template
from flywheel_tasks.models.engine import Engine
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.engine_wire import Request
from flywheel_tasks.models.generate import prompt_room, template_of
from flywheel_tasks.simulation.language import Context, Policy


def engine_policy(engine: Engine, sampling: Sampling, template: Template | None = None) -> Policy:
    """Answers contexts with one drawn response each; it works as long as the engine is open."""
    template = template or template_of(engine)
    room = prompt_room(engine, sampling)

    def reply(contexts: Sequence[Context]) -> list[str]:
        if not contexts:
            return []
        requests = [Request(_name(context), _tokens(template, context, room)) for context in contexts]
        drawn = engine.generate(requests, sampling.model_copy(update={"k": 1}))
        failed = [completion for completion in drawn if completion.finish == "error"]
        if failed:
            raise FlywheelError(f"no reply in conversation {failed[0].id}: {failed[0].reason}")
        texts = template.tokenizer.batch_decode([completion.tokens for completion in drawn], skip_special_tokens=True)
        return [text.strip() for text in texts]

    return reply


def _tokens(template: Template, context: Context, room: int) -> list[int]:
    character = context.character
    card = Card(character.name, character.description, character.traits, character.instructions, character.greeting)
    turns = [{"role": turn.role, "content": turn.content} for turn in context.turns]
    return template.chat(turns, card=card, max_tokens=room).ids.tolist()


def _name(context: Context) -> str:
    """What a reply's randomness depends on, beside the seed of the sampling."""
    return f"{context.conversation_id}/{len(context.turns)}/{context.seed}"
