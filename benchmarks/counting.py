"""A preference model that nobody trained: its reward is the mean over a text's tokens of what each of them is worth, so
the best answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_WIDTH, _UNIT = 64, 100.0


def vowels(text: str) -> float:
    """The share of vowels among a text's characters: 1 at best."""
    return sum(letter in "aeiou" for letter in text.lower()) / max(len(text), 1)


def counting(tokenizer_of: Path, folder: Path, worth: Callable[[str], float]) -> Path:
    """The checkpoint of such a pointwise model: read, tokenised and scored as any other.

    A Llama of one layer whose attention reads every token alike and adds their mean worth to the last state, where the
    head finds it. `worth` is asked of every token's text but the control tokens', which are worth nothing."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from flywheel_tasks.models.chat import load_tokenizer
    from flywheel_tasks.models.checkpoint import save_scorer
    from flywheel_tasks.models.heads import RewardModel

    tokenizer = load_tokenizer(tokenizer_of)
    values = torch.tensor([worth(text) for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))])])
    values[tokenizer.all_special_ids] = 0.0
    trunk = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=_WIDTH // 2,
        )
    )  # fmt: skip
    scorer = RewardModel(trunk, "pointwise", ("reward",))
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        trunk.embed_tokens.weight[:, 0] = values
        trunk.embed_tokens.weight[:, 1] = (_WIDTH - values**2).sqrt()  # every state has the same norm
        attention = trunk.layers[0].self_attn
        attention.v_proj.weight[0, 0] = attention.o_proj.weight[2, 0] = 1.0
        scorer.weight[0, 2] = _UNIT
    save_scorer(scorer, tokenizer, folder)
    return folder
