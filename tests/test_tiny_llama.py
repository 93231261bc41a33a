from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.tiny_llama import VOCABULARY, build_tiny_llama


def test_it_loads_generates_and_round_trips_any_script(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for text in ("hello there", "नमस्ते, कैसे हो?", "¿qué tal? 😂", "\x00\ttab"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == VOCABULARY == model.config.vocab_size
    assert tokenizer.pad_token_id is None
    chat = [{"role": "system", "content": "Be Mira."}, {"role": "user", "content": "hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]).count("<|eot_id|>") == 2
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape[1] > ids.shape[1]
    logits = model(ids).logits[0, -1]
    assert torch.isfinite(logits).all()
    assert torch.softmax(logits.float(), -1).max() > 3 / VOCABULARY, "next tokens must not all be equally likely"


def test_same_seed_same_bytes_and_no_pickle(tmp_path: Path, tiny_model: Path) -> None:
    start = time.perf_counter()
    again = build_tiny_llama(tmp_path / "again")
    took = time.perf_counter() - start
    names = sorted(p.name for p in tiny_model.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    for name in names:
        assert (tiny_model / name).read_bytes() == (again / name).read_bytes(), name
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    other = build_tiny_llama(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()
    assert took < 10


@pytest.mark.slow
def test_vllm_serves_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    vllm = pytest.importorskip("vllm")
    engine = vllm.LLM(str(tiny_model), dtype="float32", max_model_len=256, enforce_eager=True)
    greedy = vllm.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    out = engine.chat([{"role": "user", "content": "hi"}], greedy)

    import torch
    from transformers import AutoModelForCausalLM

    prompt, said = list(out[0].prompt_token_ids), list(out[0].outputs[0].token_ids)
    assert len(said) == 6
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([prompt + said])).logits[0]
    for place, token in enumerate(said, len(prompt) - 1):
        assert logits[place, token] >= logits[place].max() - 1e-3, f"token {place} is not the most likely one"
