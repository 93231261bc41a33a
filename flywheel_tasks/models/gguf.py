"""A GGUF file as a plain model folder: dequantised safetensors, the tokenizer and its chat template.

GGUF names its pre-tokenizer instead of describing it, and transformers' reader takes the plain byte-level one whatever
the name says. The table below says what each name stands for, so that digits and contractions are cut as in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flywheel_tasks.core.errors import InputError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizers() -> dict[str, Any]:
    from tokenizers import Regex, pre_tokenizers

    def split_then_bytes(*first: Any, regex: bool) -> Any:
        return pre_tokenizers.Sequence(
            [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=regex)]
        )

    return {
        "gpt-2": split_then_bytes(regex=True),
        "smollm": split_then_bytes(pre_tokenizers.Digits(individual_digits=True), regex=True),
        "llama-bpe": split_then_bytes(pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"), regex=False),
    }


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model of a Llama-family GGUF file to `folder`, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    fields = _fields(path, ("general.architecture", "tokenizer.ggml.pre"))
    known = _pre_tokenizers()
    if fields["tokenizer.ggml.pre"] not in known:
        raise InputError(
            f"{path.name}: its pre-tokenizer '{fields['tokenizer.ggml.pre']}' is not known here (known: "
            f"{', '.join(known)}): convert the model to safetensors with its own tokenizer and give that folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    tokenizer.backend_tokenizer.pre_tokenizer = known[fields["tokenizer.ggml.pre"]]
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fields(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {name: str(fields[name].contents()) if name in fields else "" for name in names}
