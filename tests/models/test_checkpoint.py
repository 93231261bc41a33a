"""A checkpoint is read by others: transformers and peft get from the folder what training had in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.checkpoint import merged_weights, save_policy
from flywheel_tasks.models.heads import load_scorer
from flywheel_tasks.models.load import Policy, load_policy
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.packed import hidden_states, pack
from tests.models.small import flat_targets, template, token_rows
from tests.tiny_llama import build_tiny_llama

ROWS = token_rows(2, [20, 33])


RANK4 = Lora(rank=4)


def trained(folder: Path, lora: Lora | None = RANK4, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy whose trained weights have moved."""
    policy = load_policy(folder, lora=lora, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in policy.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype) * 0.05)
    return policy


def values(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy(pack(ROWS), flat_targets(ROWS)).logprob


def transformers_values(model: Any) -> torch.Tensor:
    out = []
    with torch.no_grad():
        for row in ROWS:
            ids = torch.from_numpy(row)[None]
            whole = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
            out.append(whole.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("lora", [Lora(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_merged_model(tmp_path: Path, lora: Lora | None, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = build_tiny_llama(tmp_path / "base", tied=tied)
    policy = trained(base, lora)
    save_policy(policy, template(base).tokenizer, tmp_path / "saved")
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(transformers_values(model), values(policy), atol=1e-4, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == template(base).tokenizer.chat_template
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"] == [1, 4]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_merging_is_peft_s_own_and_leaves_the_policy_alone(tiny_model: Path) -> None:
    policy = trained(tiny_model)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    ours = {name: tensor.clone() for name, tensor in merged_weights(policy)}
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    theirs = policy.model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)


QUERY = "model.layers.0.self_attn.q_proj.weight"


def exact_query(policy: Policy) -> torch.Tensor:
    module = policy.blocks[0].self_attn.q_proj
    return (module.base_layer.weight.float() + module.get_delta_weight("default").float()).detach()


def test_bfloat16_weights_are_rounded_once_to_a_neighbour(tiny_model: Path) -> None:
    policy = trained(tiny_model, dtype=torch.bfloat16)
    weights = dict(merged_weights(policy))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    exact, found = exact_query(policy), weights[QUERY].float()
    step = (exact.view(torch.int32) & ~0x7FFFFF).view(torch.float32).abs() / 128  # between two of bfloat16's numbers
    assert bool(((found - exact).abs() < step).all())
    up = found.abs() > exact.abs()
    assert 0.4 < float(up.float().mean()) < 0.6


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model with enough weights for chance to even out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("broad")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("learned", [1e-6, 1e-5, 1e-4])
def test_what_is_served_is_what_was_learned_even_of_a_single_update(broad: Path, learned: float) -> None:
    """Changes from a few thousandths of bfloat16's step on: to the nearest, 2 % of the first would be served."""
    policy = load_policy(broad, lora=Lora(rank=4), dtype=torch.bfloat16)
    before = {name: tensor.float() for name, tensor in merged_weights(policy)}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=learned, generator=torch.Generator().manual_seed(1))
    served = change = torch.zeros(())
    for name, tensor in merged_weights(policy):
        layer, _, leaf = name.removeprefix("model.layers.").partition(".")
        if leaf.endswith("proj.weight"):
            module = policy.blocks[int(layer)].get_submodule(leaf.removesuffix(".weight"))
            delta = module.get_delta_weight("default").float()
            served, change = served + ((tensor.float() - before[name]) * delta).sum(), change + delta.square().sum()
    assert float(served / change) == pytest.approx(1, abs=0.1 if learned < 1e-5 else 0.03)


def test_weights_are_rounded_the_same_way_every_time_and_unchanged_ones_not_at_all(tiny_model: Path) -> None:
    policy = trained(tiny_model, dtype=torch.bfloat16)
    one, other = dict(merged_weights(policy)), dict(merged_weights(policy))
    assert all(torch.equal(one[name], other[name]) for name in one)
    fresh = load_policy(tiny_model, lora=RANK4, dtype=torch.bfloat16)
    base = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(tensor, base[name].bfloat16()) for name, tensor in merged_weights(fresh))


def test_full_precision_is_merged_exactly(tiny_model: Path) -> None:
    policy = trained(tiny_model)
    assert torch.equal(dict(merged_weights(policy))[QUERY], exact_query(policy))


def test_a_model_with_weights_missing_is_refused_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_model, dtype=torch.float32)
    save_policy(policy, template(tiny_model).tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if "layers.1.mlp" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"lacks model.layers.1.mlp.down_proj.weight and 2 more"):
        load_policy(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_policy(tmp_path)


def small(architecture: str, folder: Path, **options: Any) -> Path:
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{architecture}Config")(**{**sizes, **options})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "options", "why"),
    [
        ("Granite", {"logits_scaling": 8.0}, "has logits_scaling=8.0"),
        ("Cohere", {"logit_scale": 0.0625}, "has logit_scale=0.0625"),
        ("Gemma3Text", {"final_logit_softcapping": 5.0, "head_dim": 8}, "has final_logit_softcapping=5.0"),
        ("Phi", {}, "has a bias in its output embedding"),
        ("GPT2", {}, "GPT2Model has no 'layers'"),
    ],
)
def test_a_model_whose_logprobs_would_be_others_is_refused(
    architecture: str, options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{why}.*: take another model"):
        load_policy(small(architecture, tmp_path, **options))


def test_a_model_whose_logits_are_plain_is_taken(tmp_path: Path) -> None:
    load_policy(small("Granite", tmp_path, logits_scaling=1.0))


def test_a_model_that_names_its_last_norm_otherwise_can_score(tmp_path: Path) -> None:
    """Phi's head has a bias, which no scorer reads."""
    from transformers import AutoModel

    row = np.arange(12)
    scorer = load_scorer(small("Phi", tmp_path), kind="pointwise", dtype=torch.float32, trainable=False)
    plain = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = hidden_states(scorer.model, pack([row]))
    torch.testing.assert_close(found, plain(torch.from_numpy(row)[None]).last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_lora_on_linears_that_are_not_there_names_those_that_are(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"c_attn: .*it has .*q_proj"):
        load_policy(tiny_model, lora=Lora(targets=("c_attn",)))


def trained_state(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def test_adapters_start_alike_in_every_worker(tiny_model: Path) -> None:
    torch.manual_seed(1)
    first = trained_state(load_policy(tiny_model, lora=Lora(rank=4), seed=3))
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second = trained_state(load_policy(tiny_model, lora=Lora(rank=4), seed=3))
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_on_the_head_is_refused_since_it_would_not_be_trained() -> None:
    with pytest.raises(ValueError, match=r"lora\.targets lm_head"):
        Lora(targets=("q_proj", "lm_head"))
