"""What the contenders of the RL benchmark share: prompts, cards, reward model, and the settings of a step."""

from __future__ import annotations

from pathlib import Path

PROMPTS, K, MAX_TOKENS, RANK = 8, 4, 48, 16
"""Prompts of a step, responses to each, most tokens of a response, rank of the adapters."""
MICRO = 8
"""Responses of one of TRL's passes (four are accumulated): all 32 at once took more than 15 GiB."""
LEARNING_RATE, CLIP, BETA = 1e-5, 0.2, 0.04
SEED = 1
WARM_UP = 1
"""Steps that are not counted."""
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
PARTS = ("generate", "score", "learn", "sync")


def write_reward_model(folder: Path) -> str:
    """A scalar head with seeded weights on the policy's own trunk: what it prefers does not matter here, what it costs
    does."""
    from benchmarks.generation_prompts import MODEL
    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer
    from flywheel_tasks.models.heads import load_scorer
    from flywheel_tasks.models.resolve import local_folder

    base = local_folder(MODEL)
    save_scorer(load_scorer(base, kind="pointwise", seed=1, trainable=False), load_tokenizer(base), folder)
    return str(folder)
