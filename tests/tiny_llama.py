"""A tiny random Llama that transformers and vLLM load: seeded weights, a tokenizer trained here, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3's, without its system preamble."""
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
VOCABULARY = 512


def build_tiny_llama(folder: str | Path, *, seed: int = 0, layers: int = 2, tied: bool = False) -> Path:
    """Write config, safetensors weights and tokenizer to `folder`: 2 layers, 2 heads of 32 (a size vLLM serves on CPU),
    grouped-query attention, about 160,000 parameters. As in Llama 3 there is no pad token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos, eot = (SPECIAL.index(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=500000.0,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=[eos, eot],
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # The default spread of 0.02 makes all next tokens equally likely; a wider one gives tests something to compare.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = [eos, eot]
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE: every text survives encode and decode, in any script."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from flywheel_tasks.simulation.characters import demo_characters
    from flywheel_tasks.simulation.language import phrases

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [c.greeting + " " + c.description for c in demo_characters()]
    corpus += [p for kind in phrases("en")["reply"].values() for p in kind]
    tokenizer.train_from_iterator(corpus, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the corpus gave {tokenizer.get_vocab_size()} tokens: {VOCABULARY} are needed")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
