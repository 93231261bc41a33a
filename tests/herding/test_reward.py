"""The reward of RL (Sec. 2.4.3, Table 7): one scale from beginning to end, components apart, and never a signal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flywheel_tasks.core import config as core_config
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.herding import reward
from flywheel_tasks.herding.reward import PENALTIES, RewardConfig, Scale
from flywheel_tasks.herding.sft import languages
from flywheel_tasks.models.chat import Card, Template, load_tokenizer
from flywheel_tasks.models.checkpoint import save_scorer
from flywheel_tasks.models.heads import load_scorer
from flywheel_tasks.models.packed import pack
from flywheel_tasks.pipeline import STAGES
from tests.herding.rl_tables import completions, turns
from tests.tiny_llama import CHAT_TEMPLATE, SPECIAL
from tests.wide import ROWS, wide

LIMIT = 100
UNIT = Scale(0.0, 1.0)
LOOP = "I want to go home with you now. " * 12
scores = st.floats(-20, 20).filter(lambda x: abs(x) > 1e-3 or x == 0)


class _Section(StageConfig):
    reward: RewardConfig = RewardConfig()


CONFIGS = {"rl": _Section} | {stage.name: stage.config for stage in STAGES}


def of(*rows: dict[str, Any], raw: Any = None, config: RewardConfig | None = None) -> reward.Rewards:
    table = completions(rows)
    values = np.zeros(len(rows)) if raw is None else np.asarray(raw, float)
    return reward.reward(table, values, config or RewardConfig(), UNIT, limit=LIMIT)


# -- no user signal, in any way


@pytest.mark.parametrize(
    "key", ["continue", "p_continue", "thumb_up", "thumbs", "love", "feedback", "signals", "signal_weight", "continued"]
)
def test_a_config_that_routes_a_signal_into_the_reward_is_refused_with_the_section(key: str) -> None:
    with pytest.raises(ConfigError, match=r"can't be a reward.*Sec\. 3\.5\.5"):
        core_config.load(CONFIGS, "test", overrides=[f"rl.reward.{key}=0.5"])
    with pytest.raises(ValueError, match=r"Sec\. 3\.5\.5"):
        RewardConfig.model_validate({"p(thumb up)": 1.0})


def test_a_config_that_names_a_signal_checkpoint_as_the_reward_model_is_refused() -> None:
    path = "s3://bucket/store/artifacts/signal-rm/" + "0" * 32 + "/model"
    with pytest.raises(ConfigError, match=r"rl\.reward\.model.*Sec\. 3\.5\.5"):
        core_config.load(CONFIGS, "test", overrides=[f"rl.reward.model.path={path}"])


def test_a_misspelt_weight_is_no_signal_and_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'rl\.reward\.repetition'"):
        core_config.load(CONFIGS, "test", overrides=["rl.reward.repetitoin=1"])


def saved(folder: Path, base: Path, kind: Any, names: tuple[str, ...] = (), max_tokens: int | None = None) -> Path:
    model = load_scorer(base, kind=kind, names=names, dtype=torch.float32, trainable=False, max_tokens=max_tokens)
    torch.nn.init.normal_(model.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    save_scorer(model, load_tokenizer(base), folder)
    return folder


def test_a_folder_with_a_signal_head_is_refused_with_the_section(tiny_model: Path, tmp_path: Path) -> None:
    several = saved(tmp_path / "signals", tiny_model, "signals", ("continue", "thumb_up"))
    with pytest.raises(InputError, match=r"user-signal model \(continue, thumb_up\).*Sec\. 3\.5\.5"):
        reward.preference_scorer(several)
    posing = saved(tmp_path / "posing", tiny_model, "pointwise", ("p_continue",))
    with pytest.raises(InputError, match=r"user-signal model.*Sec\. 3\.5\.5"):
        reward.preference_scorer(posing)


def test_any_other_model_than_a_pointwise_one_is_refused_as_what_it_is(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no scoring head"):
        reward.preference_scorer(tiny_model)
    pair = saved(tmp_path / "pair", tiny_model, "pairwise")
    with pytest.raises(InputError, match="is a pairwise model: this needs a checkpoint of preference-pointwise"):
        reward.preference_scorer(pair)
    assert reward.pairwise_scorer(pair).model.kind == "pairwise"
    (pair / "head.json").write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        reward.pairwise_scorer(pair)


# -- a reward model with another tokenizer than the policy's


def bytes_tokenizer(folder: Path, extra: int = 0, template: str | None = CHAT_TEMPLATE) -> None:
    """Put a tokenizer into `folder` that knows bytes and control tokens only, other ids than the tiny model's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocabulary = {
        token: number for number, token in enumerate([*SPECIAL, *alphabet, *(f"<{i}>" for i in range(extra))])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.fixture
def foreign(tiny_model: Path, tmp_path: Path) -> Path:
    """A reward model on the same trunk, whose tokenizer segments and numbers every text in another way."""
    folder = saved(tmp_path / "foreign", tiny_model, "pointwise", max_tokens=900)
    bytes_tokenizer(folder)
    return folder


def test_a_reward_model_reads_texts_under_its_own_tokenizer_and_template(tiny_model: Path, foreign: Path) -> None:
    policy, scorer = Template(load_tokenizer(tiny_model)), reward.preference_scorer(foreign)
    card = Card("Ada", "a poet", ("kind",))
    said = ["Yes, I do! 😀", "नमस्ते, आप कैसे हैं?", "<|eot_id|> is what I typed"]
    table = completions([{"text": text, "asked": "Do you write?", "character_id": "ada"} for text in said])
    raw = reward.preference(scorer, table, {"ada": card})
    for text, value in zip(said, raw, strict=True):
        ids = scorer.template.chat(turns("Do you write?"), card=card, response=text).ids
        assert text in scorer.template.tokenizer.decode(ids)
        assert ids.tolist() != policy.chat(turns("Do you write?"), card=card, response=text).ids.tolist()
        with torch.no_grad():
            assert scorer.model(pack([ids])).item() == pytest.approx(value, abs=2e-3)
    assert len(set(raw.round(4))) == len(said)


def test_a_response_that_failed_or_does_not_fit_the_reward_model_has_no_reward(
    tiny_model: Path, tmp_path: Path
) -> None:
    scorer = reward.preference_scorer(saved(tmp_path / "rm", tiny_model, "pointwise", max_tokens=64))
    table = completions([{"text": "Yes."}, {"text": "", "finish": "error"}, {"text": "word " * 300}])
    raw = reward.preference(scorer, table, {})
    assert np.isnan(raw).tolist() == [False, True, True]
    rewards = reward.reward(table, raw, RewardConfig(), UNIT, limit=LIMIT)
    assert all(
        np.isnan(values).tolist() == [False, True, True] for values in (rewards.total, *rewards.components.values())
    )


def test_a_tokenizer_that_its_weights_do_not_know_is_refused(foreign: Path) -> None:
    bytes_tokenizer(foreign, extra=400)
    with pytest.raises(InputError, match=r"tokenizer has 661 tokens, its weights know 512.*do not belong together"):
        reward.preference_scorer(foreign)


def test_a_reward_model_without_a_chat_template_is_refused(foreign: Path) -> None:
    bytes_tokenizer(foreign, template=None)
    with pytest.raises(InputError, match="has no chat template"):
        reward.preference_scorer(foreign)


# -- the scale


@given(st.data(), st.floats(0.1, 10), st.floats(-50, 50))
@settings(max_examples=30)
def test_the_units_of_a_reward_model_do_not_matter(data: st.DataObject, factor: float, shift: float) -> None:
    """Another model that says the same in other units gives the same rewards, penalties against preference included."""
    raw = np.array(data.draw(st.lists(scores, min_size=6, max_size=6).filter(lambda s: np.ptp(np.array(s)[:3]) > 0.1)))
    table = completions([{"prompt_id": f"p{i // 3}", "tokens": 60 + 8 * i} for i in range(6)])
    totals = []
    for values in (raw, factor * raw + shift):
        scale = reward.scale_of(table["prompt_id"], values)
        totals.append(reward.reward(table, values, RewardConfig(), scale, limit=LIMIT).total)
    np.testing.assert_allclose(totals[0], totals[1], atol=1e-6)


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4), st.integers(0, 99))
def test_what_shifts_all_responses_to_a_prompt_does_not_widen_the_scale(shifts: list[float], seed: int) -> None:
    ids = pa.array(np.repeat([f"p{i}" for i in range(4)], 5).tolist())
    raw = np.random.default_rng(seed).normal(size=20)
    moved = raw + np.repeat(shifts, 5)
    assert reward.scale_of(ids, moved).spread == pytest.approx(reward.scale_of(ids, raw).spread, rel=1e-9)


def test_the_scale_is_the_pooled_standard_deviation_within_prompts() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(rng.normal(0, 5, (400, 1)), 0.7, (400, 8))
    ids = pa.chunked_array([pa.array(np.repeat(np.arange(400).astype(str), 8).tolist())])
    scale = reward.scale_of(ids, raw.ravel())
    assert scale.spread == pytest.approx(np.sqrt(raw.var(axis=1, ddof=1).mean()), rel=1e-12)
    assert scale.spread == pytest.approx(0.7, rel=0.05)
    assert Scale(*json.loads(json.dumps(scale))) == scale


def test_a_policy_that_gets_better_does_not_move_the_scale() -> None:
    """A fixed scale: two more points of the model are two more points, whatever the batch that they came in."""
    row = {"text": "Fine, thanks."}
    early = of(row, row, raw=[0.0, 1.0])
    late = of(row, row, raw=[2.0, 2.1])
    assert late.total[0] - early.total[0] == pytest.approx(2.0)
    assert late.total[1] - late.total[0] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ids", "raw", "why"),
    [
        (["a", "b", "c"], [1.0, 2.0, 3.0], "raise k"),
        (["a", "a", "b", "b"], [1.0, 1.0, 2.0, 2.0], "score the same"),
        (["a", "a"], [1.0, np.nan], "raise k"),
        ([], [], "raise k"),
    ],
    ids=["k=1", "constant", "one-scored", "none"],
)
def test_a_reward_model_that_tells_nothing_apart_stops_the_run(ids: list[str], raw: list[float], why: str) -> None:
    with pytest.raises(InputError, match=why):
        reward.scale_of(pa.array(ids, pa.string()), np.array(raw))


# -- the components


@given(
    st.lists(
        st.tuples(
            scores,
            st.integers(1, LIMIT),
            st.sampled_from(["stop", "length", "error"]),
            st.sampled_from(["Fine, thanks.", LOOP, "**bold", "", "- a\n- b", "धन्यवाद, मैं ठीक हूँ।"]),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=30)
def test_a_reward_is_the_preference_less_penalties_between_none_and_one(
    rows: list[tuple[float, int, str, str]],
) -> None:
    said = [{"tokens": tokens, "finish": finish, "text": text} for _, tokens, finish, text in rows]
    raw = [score for score, *_ in rows]
    found, config = of(*said, raw=raw), RewardConfig()
    failed = np.array([row["finish"] == "error" for row in said])
    assert (np.isnan(found.total) == failed).all()
    left = ~failed
    for name in PENALTIES:
        assert ((found.components[name][left] >= 0) & (found.components[name][left] <= 1)).all()
    weighed = sum(getattr(config, name) * found.components[name] for name in PENALTIES)
    np.testing.assert_allclose(found.total[left], (found.components["preference"] - weighed)[left], atol=1e-12)
    for number, row in enumerate(said):
        alone = of(dict(row), raw=[raw[number]])
        np.testing.assert_array_equal(alone.total, found.total[number : number + 1])


@given(st.integers(1, LIMIT), st.integers(1, LIMIT))
@settings(max_examples=30)
def test_a_longer_response_is_never_cheaper_and_one_that_does_not_end_costs_most(a: int, b: int) -> None:
    short, long = of({"tokens": min(a, b)}, {"tokens": max(a, b)}).components["long"]
    unfinished = of({"tokens": a, "finish": "length"}).components["long"][0]
    assert 0 <= short <= long <= unfinished == 1
    assert of({"tokens": 75}).components["long"][0] == 0


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("repetition", "I went home, then I came back, and now I am tired of all the walking. And you?", LOOP),
        ("format", "That is **great**, tell me more.", "That is **great, tell me more."),
        ("format", "Yes.", ""),
        ("language", "धन्यवाद, मैं बहुत अच्छा हूँ, और आप?", "धन्यवाद, मैं ठीक हूँ। (Thank you, I am fine.)"),
    ],
)
def test_each_failure_of_table_7_costs_what_its_weight_says(name: str, good: str, bad: str) -> None:
    asked = "नमस्ते, आप कैसे हैं?"
    found = of({"text": good, "asked": asked}, {"text": bad, "asked": asked})
    assert found.components[name][0] < 0.2
    assert found.components[name][1] == 1
    assert found.total[0] - found.total[1] > 0.8 * getattr(RewardConfig(), name)


def test_an_english_answer_to_a_hindi_user_is_the_wrong_language_in_either_script() -> None:
    told = languages(LanguageConfig())
    english = "I am doing very well today, thank you for asking me, my friend."
    rows = [
        {"asked": "नमस्ते, आज आप कैसे हैं मेरे दोस्त?", "text": english},
        {"asked": "namaste yaar, aaj tum kaise ho, kya kar rahe ho?", "text": english},
        {"asked": "Hello my friend, how are you doing today?", "text": english},
        {"asked": "नमस्ते, आज आप कैसे हैं मेरे दोस्त?", "text": "मैं आज बहुत अच्छा हूँ, पूछने के लिए धन्यवाद मेरे दोस्त।"},
        {"asked": "ok", "text": english, "language": "hi"},
        {"asked": "ok", "text": english},
    ]
    found = reward.reward(completions(rows), np.zeros(6), RewardConfig(), UNIT, limit=LIMIT, language=told)
    assert found.components["language"].tolist() == [1, 1, 0, 0, 1, 0]


def test_a_failure_seldom_wins_its_group_because_the_model_likes_it() -> None:
    """Were the best of eight by the model a loop: what it costs puts it below the middle of the others in most groups,
    where one standard deviation would leave most of them above."""
    raw = np.sort(np.random.default_rng(0).normal(size=(2000, 8)), axis=1)
    ahead = raw[:, -1] - np.median(raw[:, :-1], axis=1)
    assert (ahead < RewardConfig().repetition).mean() > 0.7
    assert (ahead < 1).mean() < 0.25


def test_the_mean_of_every_component_is_logged() -> None:
    table = completions([{"text": "Yes."}, {"text": LOOP, "finish": "length"}, {"finish": "error"}])
    raw = np.array([1.0, 3.0, np.nan])
    found = reward.reward(table, raw, RewardConfig(), UNIT, limit=LIMIT)
    assert reward.means(found) == pytest.approx(
        {"reward/total": 0.0, "reward/preference": 2.0, "reward/long": 0.5, "reward/repetition": 0.5,
         "reward/language": 0.0, "reward/format": 0.0}
    )  # fmt: skip


def test_responses_in_pieces_are_rewarded_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told = languages(LanguageConfig())
    asked = ["How do you say good night?", "नमस्ते, आज आप कैसे हैं मेरे दोस्त?", "ok"]
    said = ["I am doing very well today, thank you.", LOOP, "", "Gute Nacht (good night) mein lieber Freund"]
    rows = [{"asked": asked[n % 3], "text": said[n % 4], "language": ["en", "hi", None][n % 3]} for n in range(24)]
    table, raw = completions(rows), np.linspace(-1, 1, 24)
    pieces = pa.concat_tables([table.slice(0, 1), table.slice(1, 11), table.slice(12, 0), table.slice(12)])
    whole = reward.reward(table, raw, RewardConfig(), UNIT, limit=LIMIT, language=told)
    monkeypatch.setattr(reward, "_ROWS", 5)
    found = reward.reward(pieces, raw, RewardConfig(), UNIT, limit=LIMIT, language=told)
    assert all(len(set(whole.components[name])) > 1 for name in ("repetition", "language", "format"))
    assert found.total.tolist() == whole.total.tolist()
    assert {k: v.tolist() for k, v in found.components.items()} == {k: v.tolist() for k, v in whole.components.items()}
    assert not len(reward.reward(table.slice(0, 0), raw[:0], RewardConfig(), UNIT, limit=LIMIT, language=told).total)


@pytest.mark.slow
def test_responses_to_more_text_than_arrow_can_join_are_rewarded() -> None:
    table = wide(completions([{"text": LOOP if n % 2 else "Yes."} for n in range(ROWS)]), "turns")
    found = reward.reward(table, np.zeros(ROWS), RewardConfig(), UNIT, limit=LIMIT)
    assert found.components["repetition"].tolist() == [float(n % 2) for n in range(ROWS)]


def test_scores_of_other_responses_are_refused() -> None:
    with pytest.raises(InputError, match="1 responses, but 2 scores"):
        of({"text": "Yes."}, raw=[1.0, 2.0])


def test_a_copied_folder_of_a_preference_model_rewards_like_the_original(tiny_model: Path, tmp_path: Path) -> None:
    original = saved(tmp_path / "rm", tiny_model, "pointwise")
    copy = shutil.copytree(original, tmp_path / "copy")
    table = completions([{"text": "Yes."}, {"text": "No, why?"}])
    a, b = (reward.preference(reward.preference_scorer(folder), table, {}) for folder in (original, copy))
    np.testing.assert_array_equal(a, b)
