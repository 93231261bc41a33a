"""The kernels against transformers and peft: the same log-probabilities and the same gradients, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flywheel_tasks.core.errors import InputError
from flywheel_tasks.models.attention import check_plain
from flywheel_tasks.models.load import Policy, load_policy
from flywheel_tasks.models.lora import Lora
from flywheel_tasks.models.packed import pack, trunk
from tests.models.small import flat_targets, token_rows

ROWS = token_rows(5, [30, 7, 52, 18], shared=24)
LORA = Lora(rank=4, alpha=8)


def spread(model: Any) -> Any:
    """Adapters that do something: peft starts B at zero."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def plain(folder: Path, lora: Lora | None, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers and peft run by themselves."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if lora is None:
        return model
    torch.manual_seed(0)
    return spread(get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear")))


def plain_step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    values = []
    for row in ROWS:
        ids = torch.from_numpy(row)[None]
        whole = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        values.append(whole.gather(1, ids[0, 1:, None])[:, 0])
    return finish(torch.cat(values), model)


def packed_step(policy: Policy, *, share: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return finish(policy(pack(ROWS, share=share), flat_targets(ROWS)).logprob, policy.model)


def finish(values: torch.Tensor, model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    weights = torch.linspace(-1, 1, len(values))
    (values * weights).mean().backward()
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def agree(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = max(float(gradient.norm()), 1e-3)
        assert (ours[1][name] - gradient).norm() <= tolerance * scale, name


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed_again"])
def test_log_probabilities_and_gradients_are_transformers_own(
    tiny_model: Path, lora: Lora | None, share: bool, again: bool
) -> None:
    policy = load_policy(tiny_model, lora=lora, dtype=torch.float32)
    if again:
        policy.checkpoint_layers()
    spread(policy.model)
    agree(packed_step(policy, share=share), plain_step(plain(tiny_model, lora)))


def test_an_adapter_on_some_linears_only(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = Lora(rank=2, targets=("q_proj", "v_proj", "up_proj"))
    policy = load_policy(tiny_model, lora=lora, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    agree(packed_step(Policy(spread(policy.model))), plain_step(spread(theirs)))


@pytest.mark.parametrize("architecture", ["Qwen2", "Mistral", "Qwen3"])
def test_relatives_of_llama_with_biases_or_norms_of_their_own(tmp_path: Path, architecture: str) -> None:
    """Qwen2 has biases and runs on the kernels; Qwen3 normalises queries and runs as transformers wrote it."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        sliding_window=None,
        pad_token_id=None,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, dtype=torch.float32)
    swapped = "forward" in vars(policy.blocks[0])
    assert swapped == (architecture != "Qwen3")
    agree(packed_step(policy), plain_step(plain(tmp_path, None)))


def test_bfloat16_is_as_close_to_the_truth_as_transformers(tiny_model: Path) -> None:
    truth = plain_step(plain(tiny_model, LORA))
    theirs = plain_step(plain(tiny_model, LORA, torch.bfloat16))
    policy = load_policy(tiny_model, lora=LORA)
    spread(policy.model)
    ours = packed_step(policy)
    assert (ours[0] - truth[0]).norm() <= 1.25 * (theirs[0] - truth[0]).norm()
    errors = [sum(float((s[1][n].float() - g).norm()) for n, g in truth[1].items()) for s in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_a_bfloat16_policy_shows_what_its_first_updates_learned(tmp_path: Path, architecture: str) -> None:
    """On the kernels, with biases, and as transformers wrote it. Added to numbers that are rounded already, half of so
    small a change would vanish."""
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=300, num_key_value_heads=2, head_dim=32, initializer_range=0.1, **sizes
    )
    getattr(transformers, f"{architecture}ForCausalLM")(config).bfloat16().save_pretrained(tmp_path)
    rows = [row % 300 for row in token_rows(3, [400] * 5)]
    changes = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = load_policy(tmp_path, lora=Lora(rank=4), dtype=dtype)
        packed, targets = pack(rows), flat_targets(rows)
        with torch.no_grad():
            start = policy(packed, targets).logprob.double()
            draw = torch.Generator().manual_seed(7)
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 1e-4)
            changes.append(policy(packed, targets).logprob.double() - start)
    shown, learned = changes
    assert float(shown @ learned / (learned @ learned)) == pytest.approx(1, abs=0.15)


def test_the_masters_of_an_adapter_stay_fp32_beside_a_bfloat16_model(tiny_model: Path) -> None:
    policy = load_policy(tiny_model, lora=LORA)
    packed_step(policy)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_dropout_takes_the_slow_path_in_training_only(tiny_model: Path) -> None:
    policy = load_policy(tiny_model, lora=Lora(rank=4, dropout=0.5), dtype=torch.float32)
    spread(policy.model)
    packed, targets = pack(ROWS), flat_targets(ROWS)
    first, second = (policy(packed, targets).logprob for _ in range(2))
    assert not torch.equal(first, second)
    policy.eval()
    first, second = (policy(packed, targets).logprob for _ in range(2))
    assert torch.equal(first, second)


def test_the_reference_is_the_model_without_its_adapters(tiny_model: Path) -> None:
    policy = load_policy(tiny_model, lora=LORA, dtype=torch.float32)
    packed, targets = pack(ROWS), flat_targets(ROWS)
    start = policy(packed, targets).logprob
    spread(policy.model)
    moved = policy(packed, targets).logprob
    with policy.reference():
        assert torch.equal(policy(packed, targets).logprob, start)
    assert torch.equal(policy(packed, targets).logprob, moved)
    assert not torch.equal(moved, start)


def test_layers_keep_less_for_the_backward_pass_than_transformers(tiny_model: Path) -> None:
    def kept(run: Any, model: Any) -> int:
        parameters = {p.data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            out = run()
        del out
        return sum(seen.values())

    policy, model = load_policy(tiny_model, lora=LORA), plain(tiny_model, LORA, torch.bfloat16)
    packed = pack([ROWS[2]])
    ids = torch.from_numpy(ROWS[2])[None]
    ours = kept(
        lambda: trunk(policy.model)(packed.ids[None], position_ids=packed.positions[None], packed=packed), policy
    )
    theirs = kept(lambda: trunk(model)(ids), model)
    assert ours < theirs / 2


def windowed(folder: Path, window: int) -> Path:
    """A tiny Mistral whose tokens see the last `window` alone."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=256, num_key_value_heads=2, sliding_window=window, **sizes)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_window_that_holds_every_row_is_what_transformers_computes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = windowed(tmp_path, 40)
    row = token_rows(1, [40])[0] % 256
    found = load_policy(folder, dtype=torch.float32)(pack([row]), flat_targets([row])).logprob
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = torch.from_numpy(row)[None]
    whole = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    torch.testing.assert_close(found, whole.gather(1, ids[0, 1:, None])[:, 0], atol=1e-4, rtol=1e-4)


def test_a_row_longer_than_the_models_window_is_refused_not_read_otherwise(tmp_path: Path) -> None:
    policy = load_policy(windowed(tmp_path, 16), dtype=torch.float32)
    row = token_rows(1, [17])[0] % 256
    with pytest.raises(InputError, match="the last 16 tokens only, and a row has 17: set max_tokens to 16"):
        policy(pack([row]), flat_targets([row]))


@pytest.mark.parametrize("option", ["softcap", "s_aux"])
def test_attention_that_is_more_than_softmax_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"needs '{option}'"):
        check_plain(torch.nn.Identity(), pack([[5, 6]]), {option: 30.0})
