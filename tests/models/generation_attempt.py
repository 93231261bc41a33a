"""An attempt at a generation stage, to be killed: one line of JSON for each chunk.

python -m tests.models.generation_attempt MODEL STORE
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from flywheel_tasks.core.partial import Partial
from flywheel_tasks.core.storage import Storage
from flywheel_tasks.models.engine_config import Sampling
from flywheel_tasks.models.generate import cards, complete, encoder, prompt_room, template_of
from flywheel_tasks.simulation.characters import character_table, demo_characters
from tests.models.engines import started
from tests.models.test_generate import prompt_rows


def main(model: str, store: str) -> None:
    draw = Sampling(k=2, max_tokens=100, seed=3)
    partial = Partial(Storage(store), "rejection-sample", "0" * 32)
    with started(Path(model)) as engine:
        encode = encoder(template_of(engine), cards(character_table(demo_characters())), prompt_room(engine, draw))
        for chunk in complete(
            engine, template_of(engine), prompt_rows(200), encode, draw, "base", partial=partial, chunk=10
        ):
            texts = hashlib.sha256("\n".join(chunk.table.column("text").to_pylist()).encode()).hexdigest()
            print(json.dumps({"name": chunk.name, "texts": texts, "resumed": chunk.resumed}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
