"""What the trainer held of fixed sentences when it wrote a checkpoint, and whether an engine that serves it agrees.

The numbers come from the module that was trained, adapters and all, before it was merged, rounded and written: a wrong
merge, a lost tensor, a tied head that was not tied, or an engine that loads any of it wrongly moves them by far more
than bfloat16 does. They travel with the checkpoint, so whoever serves it can ask again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.models.chat import Template
from flywheel_tasks.models.engine import Engine, Request
from flywheel_tasks.models.load import Policy
from flywheel_tasks.models.packed import pack
from flywheel_tasks.models.probe import Drift, ProbeConfig, drift

FILE = "trainer_logprobs.json"
SENTENCES = (
    ("hi! how was your day?", "It was lovely, thank you. I baked bread and it even rose this time."),
    ("tell me a story about the sea", "Once, an old lighthouse keeper wrote a letter to the moon every single night."),
    ("what's 7 times 8", "Seven times eight is fifty-six."),
    ("hola, ¿qué tal?", "¡Muy bien! ¿Y tú? Hoy hace un sol precioso."),
    ("kya haal hai", "Sab badhiya, tum sunao, aaj kya plan hai?"),
    ("i feel a bit down today", "I'm sorry to hear that. Do you want to talk about what happened?"),
    ("write a haiku about rain", "Rain on the tin roof\nfingers drumming out a song\nthe garden listens."),
    ("ok bye!", "Bye! Talk soon."),
)


def record(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """Write what the trainer's own module says beside the checkpoint made from it."""
    template = Template(tokenizer)
    chats = [template.chat([{"role": "user", "content": asked}], response=said) for asked, said in SENTENCES]
    device = next(policy.parameters()).device
    was_training = policy.training
    policy.eval()
    with torch.no_grad():
        packed = pack([chat.ids for chat in chats], device=device)
        found = policy(packed, torch.from_numpy(np.concatenate([chat.trained for chat in chats])).to(device))
    policy.train(was_training)
    ends = np.cumsum([int(chat.trained.sum()) for chat in chats])[:-1]
    rows = np.split(found.logprob.float().cpu().numpy().astype(float), ends)
    body = {
        "tokens": [chat.ids.tolist() for chat in chats],
        "trained": [np.flatnonzero(chat.trained).tolist() for chat in chats],
        "logprobs": [row.tolist() for row in rows],
    }
    (folder / FILE).write_text(json.dumps(body, allow_nan=False))


def check(engine: Engine, folder: Path, config: ProbeConfig | None = None) -> Drift:
    """How far every replica of an engine is from the trainer of the checkpoint that it serves; past the bounds, or
    without the trainer's numbers, an error."""
    config = config or ProbeConfig()
    try:
        said = json.loads((folder / FILE).read_text())
    except FileNotFoundError as error:
        raise FlywheelError(f"{folder.name}: no {FILE}: its trainer left nothing to hold an engine against") from error
    requests = [Request(f"sentence-{i}", tokens) for i, tokens in enumerate(said["tokens"])]
    scored = [row for replica in range(engine.replicas) for row in engine.score(requests, replica)]
    marks = said["trained"] * engine.replicas
    picked = [[row[at - 1] for at in mine] for row, mine in zip(scored, marks, strict=True)]
    found = drift(picked, said["logprobs"] * engine.replicas)
    if found.most > config.most or found.mean > config.mean:
        raise FlywheelError(
            f"the exported model does not give its trainer's logprobs when it is served: they differ by up to "
            f"{found.most:.3g} (bound {config.most:g}), {found.mean:.3g} in the mean (bound {config.mean:g}): do not "
            "release it; look at the merge of adapters, tied weights and the engine's version"
        )
    return found
