"""Phase I as a stage (Sec. 2.2.1, 2.6): nothing lost, nothing unread passes, nothing identifiable kept or told."""

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks.core import schemas
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.curation import safety
from flywheel_tasks.curation.filter import STAGE, FilterConfig
from flywheel_tasks.curation.language import LanguageConfig
from flywheel_tasks.curation.privacy import PrivacyConfig
from flywheel_tasks.curation.prompts import PromptConfig
from flywheel_tasks.curation.safety import SafetyConfig
from flywheel_tasks.curation.scrubbing import Rules, clean
from tests.curation import curation_runs

CONFIG = FilterConfig(privacy=PrivacyConfig(presidio=()))
START = datetime.datetime(2026, 11, 16, 12, tzinfo=datetime.UTC)
CALM = ("what did you cook for dinner yesterday?", "I made a soup with carrots, it was lovely.")
EMAIL = "jo\u200bhn.private@gma\u200bil.com"


def talk(number: int, *texts: str, **fields: Any) -> dict[str, Any]:
    """A conversation whose turns alternate, beginning with the user."""
    turns = [
        {
            "role": ("user", "assistant")[n % 2],
            "content": text,
            "at": START + datetime.timedelta(minutes=n),
            "image": None,
            "signals": {
                "continued": True,
                "love": False,
                "thumb_up": n == 1,
                "thumb_down": False,
                "feedback": None,
                "regenerated": False,
            }
            if n % 2
            else None,
        }
        for n, text in enumerate(texts)
    ]
    plain = {
        "conversation_id": f"c{number}",
        "user": f"{number:032x}",
        "character_id": "char-1",
        "source": "production",
        "locale": "en_US",
        "language": None,
        "model_version": "V1",
        "split": "train",
        "turns": turns,
    }
    return plain | fields


def run(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    config: FilterConfig = CONFIG,
    forgotten: frozenset[str] = frozenset(),
    parts: int = 1,
) -> Artifact:
    store = Store(f"file://{tmp_path}")

    def fill(out: Output) -> None:
        for part in range(parts):
            with out.table("conversations") as writer:
                writer.write(pa.Table.from_pylist(rows[part::parts], schema=schemas.CONVERSATION))
        out.account("event", rows_in=len(rows), rows_out=len(rows))

    upstream = curation_runs.commit(store, "ingest", {"conversations": "conversation"}, fill, "1" * 32)
    inputs = Inputs({"conversations": (upstream, "conversations")}, {}, forgotten)
    return curation_runs.commit(store, "filter", STAGE.outputs, lambda out: STAGE.run(inputs, config, out), "2" * 32)


def reasons(artifact: Artifact) -> dict[str, str]:
    if "quarantine" not in artifact.manifest.outputs:
        return {}
    return {row["row_id"]: row["reason"] for row in artifact.table("quarantine").read().to_pylist()}


def accepted(artifact: Artifact) -> list[str]:
    return artifact.table("conversations").read()["conversation_id"].to_pylist()


def stored_bytes(folder: Path, artifact: Artifact) -> str:
    """Everything the stage wrote, tables decoded."""
    tables = [
        str(artifact.table(name).read().to_pylist())
        for name, o in artifact.manifest.outputs.items()
        if o.contract != "json"
    ]
    return "\n".join(
        [*tables, json.dumps(artifact.json("report"), ensure_ascii=False), artifact.manifest.model_dump_json()]
    )


def test_every_conversation_comes_out_once(tmp_path: Path) -> None:
    rows = [
        talk(0, *CALM),
        talk(1, f"write me at {EMAIL} please", CALM[1]),
        talk(2, "my card is 4111 1111 1111 1111", "thanks"),
        talk(3, "I hate women, they are all disgusting animals", "no"),
        talk(4, CALM[0], "I hate women, they are all disgusting animals"),
        talk(5, "bye", turns=[]),
        talk(6, "hello there, my friend"),
    ]
    artifact = run(tmp_path, rows)
    assert accepted(artifact) == ["c0", "c1", "c6"]
    assert reasons(artifact) == {
        "c2": "privacy_card",
        "c3": "unsafe_prompt",
        "c4": "unsafe_response",
        "c5": "no_user_turn",
    }
    assert artifact.manifest.rows is not None
    assert (artifact.manifest.rows.rows_in, artifact.manifest.rows.rows_out, artifact.manifest.rows.rows_rejected) == (
        7,
        3,
        4,
    )
    assert artifact.table("prompts").read()["prompt_id"].to_pylist() == ["c0.0", "c1.0", "c6.0"]


def test_what_was_removed_is_nowhere_in_what_the_stage_wrote(tmp_path: Path) -> None:
    hidden = (
        "jo.hidden@example.org",
        "4111 1111 1111 1111",
        "GB82WEST12345698765432",
        "disgusting animals",
        "sk-secret-token-9",
    )
    rows = [
        talk(0, f"mail {hidden[0]} ok", CALM[1]),
        talk(1, f"card {hidden[1]}", "ok"),
        talk(2, f"iban {hidden[2]}", "ok"),
        talk(3, f"I hate women, they are all {hidden[3]}", "no"),
        talk(4, *CALM, locale=f"{hidden[0]}"),
    ]
    rows[0]["turns"][1]["signals"]["feedback"] = f"tell {hidden[0]}"
    rows[0]["turns"][1]["image"] = f"https://cdn.example/i.png?token={hidden[4]}"
    rows[4]["turns"][1]["image"] = "https://cdn.example/i.png"
    rows[4]["locale"] = "en_US"
    artifact = run(tmp_path, rows)
    written = stored_bytes(tmp_path, artifact)
    assert not [secret for secret in hidden if secret in written]
    turn = artifact.table("conversations").read().to_pylist()[0]["turns"][1]
    assert turn["signals"]["feedback"] == "tell [EMAIL]"
    assert turn["signals"]["thumb_up"] is True
    assert turn["image"] is None
    assert artifact.table("conversations").read().to_pylist()[1]["turns"][1]["image"] == "https://cdn.example/i.png"


def test_the_report_counts_and_names_nobody(tmp_path: Path) -> None:
    rows = [
        talk(0, *CALM),
        talk(1, f"you can write to me at {EMAIL} tomorrow", "ok", locale="pt_BR", source="internal"),
        talk(2, "card 4111111111111111", "ok", locale="hi_IN"),
    ]
    report = run(tmp_path, rows).json("report")
    assert report["conversations"] == {"in": 3, "out": 2, "rejected": 1}
    assert report["by_reason"] == {"privacy_card": 1}
    assert report["by_locale"] == {"en_US": {"accepted": 1}, "pt_BR": {"accepted": 1}, "hi_IN": {"privacy_card": 1}}
    assert report["by_source"] == {"internal": {"accepted": 1}, "production": {"accepted": 1, "privacy_card": 1}}
    assert report["identifiers_masked"] == {"EMAIL": 1}
    text = json.dumps(report)
    assert not [r for r in rows for secret in (r["user"], r["conversation_id"]) if f'"{secret}' in text]


def _explode(turns: safety.Turns) -> np.ndarray:
    raise RuntimeError("CUDA out of memory: tell nobody about hello@example.org")


def _nothing(turns: safety.Turns) -> np.ndarray:
    return np.full(len(turns.content), np.nan)


def _hang(turns: safety.Turns) -> np.ndarray:
    time.sleep(20)
    return np.zeros(len(turns.content))


@pytest.mark.parametrize("classifier", [_explode, _nothing, _hang])
def test_a_classifier_that_fails_passes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: Callable[[safety.Turns], np.ndarray]
) -> None:
    monkeypatch.setattr(safety, "classifier_and_threshold", lambda config: (classifier, 0.5))
    config = CONFIG.model_copy(update={"safety": SafetyConfig(timeout_s=0.3), "most_unjudged": 1.0})
    artifact = run(tmp_path, [talk(n, *CALM) for n in range(4)], config)
    assert accepted(artifact) == []
    assert set(reasons(artifact).values()) == {"classifier_error"}
    assert artifact.table("prompts").rows == 0


def test_an_outage_of_the_guard_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety, "classifier_and_threshold", lambda config: (_nothing, 0.5))
    with pytest.raises(FlywheelError, match="4 of 4 conversations could not be judged"):
        run(tmp_path, [talk(n, *CALM) for n in range(4)])


def test_policy_decides_between_mask_and_drop(tmp_path: Path) -> None:
    config = FilterConfig(privacy=PrivacyConfig(presidio=(), policy={"EMAIL": "drop", "CARD": "mask"}))
    artifact = run(tmp_path, [talk(0, "mail a@b.org now", "ok"), talk(1, "card 4111111111111111 now", "ok")], config)
    assert reasons(artifact) == {"c0": "privacy_email"}
    assert artifact.table("prompts").read()["turns"].to_pylist()[0][0]["content"] == "card [CARD] now"


def test_a_link_does_not_hide_what_the_policy_drops(tmp_path: Path) -> None:
    link = "look at https://shop.example/pay?card=4111111111111111 please"
    assert reasons(run(tmp_path / "drop", [talk(0, link, "ok")])) == {"c0": "privacy_card"}
    config = FilterConfig(privacy=PrivacyConfig(presidio=(), policy={}))
    masked = run(tmp_path / "mask", [talk(0, link, "ok")], config)
    assert masked.table("prompts").read()["turns"].to_pylist()[0][0]["content"] == "look at [URL] please"
    assert masked.json("report")["identifiers_masked"] == {"URL": 1}


@pytest.mark.parametrize(
    ("image", "kept"),
    [
        ("https://cdn.example/i.png", True),
        ("https://cdn.example/a%20b.png", True),
        ("https://cdn.example/a.png?email=jane.doe@gmail.com&phone=+14155550123", False),
        ("https://cdn.example/a.png?email=jane.doe%40gmail.com", False),
        ("https://cdn.example/a.png?phone=%2B14155550123", False),
        ("https://cdn.example/4111111111111111/a.png", False),
    ],
)
def test_an_image_link_that_tells_of_a_person_is_removed(tmp_path: Path, image: str, kept: bool) -> None:
    row = talk(0, *CALM)
    row["turns"][1]["image"] = image
    turn = run(tmp_path, [row]).table("conversations").read().to_pylist()[0]["turns"][1]
    assert turn["image"] == (image if kept else None)
    assert turn["content"] == CALM[1]


def test_forgotten_users_are_rejected(tmp_path: Path) -> None:
    artifact = run(tmp_path, [talk(0, *CALM), talk(1, *CALM)], forgotten=frozenset({f"{1:032x}"}))
    assert accepted(artifact) == ["c0"]
    assert reasons(artifact) == {"c1": "forgotten"}


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (("😀😀😀", "🎉"), "und"),
        (("mujhe aaj bahut acha lag raha hai yaar", "kya hua batao"), "hi-Latn"),
        (("नमस्ते yaar, how are you आज", "I am fine"), "hi"),
        (("x" * 3, "ok"), "und"),
        (("\u200b\u200b hola amigo, qué tal", "bien"), "es"),
    ],
)
def test_odd_turns_have_a_clear_result(tmp_path: Path, texts: tuple[str, ...], language: str) -> None:
    artifact = run(tmp_path, [talk(0, *texts, locale="qq_QQ")])
    assert artifact.table("conversations").read()["language"].to_pylist() == [language]
    assert artifact.table("prompts").read()["locale"].to_pylist() == ["qq_QQ"]


def test_empty_traffic_gives_empty_tables(tmp_path: Path) -> None:
    artifact = run(tmp_path, [])
    assert artifact.table("conversations").rows == artifact.table("prompts").rows == 0
    assert artifact.json("report")["conversations"] == {"in": 0, "out": 0, "rejected": 0}


def test_a_megabyte_message_passes_in_bounded_time(tmp_path: Path) -> None:
    text = "the soup was lovely and then we watched a film about trains. " * 17_500 + EMAIL
    start = time.process_time()
    artifact = run(tmp_path, [talk(0, text, "ok"), talk(1, *CALM)])
    assert time.process_time() - start < 20
    found = artifact.table("prompts").read()["turns"].to_pylist()
    assert found[0][0]["content"].endswith("[EMAIL]")
    assert len(found) == 2


def test_the_newest_version_with_traffic_is_near_policy(tmp_path: Path) -> None:
    old = START - datetime.timedelta(days=3)
    rows = [talk(n, *CALM, model_version="V8") for n in range(4)]
    for row in rows:
        for turn in row["turns"]:
            turn["at"] = old
    rows += [talk(n, *CALM, model_version="V9") for n in range(4, 6)] + [talk(6, *CALM, model_version="V10-candidate")]
    artifact = run(tmp_path, rows)
    prompts = artifact.table("prompts").read().to_pylist()
    assert {p["model_version"] for p in prompts if p["near_policy"]} == {"V9"}
    assert artifact.json("report")["near_policy_version"] == "V9"


def test_a_straggler_of_the_next_day_does_not_choose_the_version_in_production(tmp_path: Path) -> None:
    rows = [talk(n, *CALM, model_version="V9") for n in range(12)] + [talk(12, *CALM, model_version="V1-ancient")]
    for turn in rows[12]["turns"]:
        turn["at"] = START + datetime.timedelta(days=1)
    report = run(tmp_path, rows).json("report")
    assert report["near_policy_version"] == "V9"
    assert report["prompts"]["near_policy"] == 12


def test_who_looks_for_no_names_is_told_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = run(tmp_path, [talk(n, *CALM) for n in range(4)], CONFIG.model_copy(update={"block_rows": 1}))
    (warning,) = report.json("report")["warnings"]
    assert "names of people" in warning
    assert [record.message for record in caplog.records if "token_model" in record.message] == [f"filter: {warning}"]


@pytest.mark.slow
def test_blocks_on_ray_workers_give_what_one_process_gives(tmp_path: Path) -> None:
    rows = [
        talk(n, f"you can write to me at {EMAIL} tomorrow" if n % 3 else CALM[0], "ok", locale=f"l{'ab'[n % 2]}")
        for n in range(24)
    ]
    one = run(tmp_path / "one", rows)
    many = run(tmp_path / "many", rows, CONFIG.model_copy(update={"block_rows": 5}), parts=2)
    assert sorted(accepted(many)) == sorted(accepted(one))
    assert many.json("report") == one.json("report")
    ordered = [sorted(a.table("prompts").read().to_pylist(), key=lambda p: p["prompt_id"]) for a in (one, many)]
    assert ordered[0] == ordered[1]


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(
        [
            *CALM,
            "mail a@b.org",
            "4111111111111111",
            "I hate women, they are disgusting animals",
            "😀",
            "call +1 415 555 2671",
        ]
    ),
)


@given(st.lists(st.lists(TEXTS, max_size=5), min_size=1, max_size=8))
def test_rows_add_up_and_the_order_of_rows_does_not_matter(talks: list[list[str]]) -> None:
    rules = Rules(CONFIG.privacy, CONFIG.safety, LanguageConfig(), PromptConfig(), "V1")
    rows = [talk(n, *texts) for n, texts in enumerate(talks)]
    table = pa.Table.from_pylist(rows, schema=schemas.CONVERSATION)
    whole = clean(table, "part", 0, rules)
    assert whole.conversations.num_rows + whole.rejected.num_rows == len(rows)
    schemas.conform(whole.conversations, schemas.CONVERSATION, "test")
    schemas.conform(whole.prompts, schemas.PROMPT, "test")
    turned = clean(table.take(list(range(len(rows)))[::-1]), "part", 0, rules)
    assert turned.conversations.to_pylist() == whole.conversations.to_pylist()[::-1]
    assert sorted(turned.rejected["row_id"].to_pylist()) == sorted(whole.rejected["row_id"].to_pylist())


@given(st.lists(st.lists(TEXTS, max_size=4), min_size=2, max_size=8), st.integers(1, 7))
def test_cutting_the_traffic_into_batches_changes_nothing(talks: list[list[str]], at: int) -> None:
    rules = Rules(CONFIG.privacy, CONFIG.safety, LanguageConfig(), PromptConfig(), "V1")
    table = pa.Table.from_pylist([talk(n, *texts) for n, texts in enumerate(talks)], schema=schemas.CONVERSATION)
    whole, parts = (
        clean(table, "part", 0, rules),
        [clean(table.slice(0, at), "part", 0, rules), clean(table.slice(at), "part", at, rules)],
    )
    for name in ("conversations", "prompts", "rejected"):
        joined = [row for part in parts for row in getattr(part, name).to_pylist()]
        assert joined == getattr(whole, name).to_pylist()


def test_every_turn_and_conversation_has_its_language(tmp_path: Path) -> None:
    english = talk(0, "what did you cook for dinner yesterday?", "I made a soup with carrots and a little garlic.")
    answered_in_english = talk(
        1, "kal raat khane mein kya banaya tha tumne", "I made a soup with carrots, it was lovely."
    )
    kept = run(tmp_path, [english, answered_in_english]).table("conversations").read().to_pylist()
    told = {row["conversation_id"]: [turn["language"] for turn in row["turns"]] for row in kept}
    assert told == {"c0": ["en", "en"], "c1": ["hi-Latn", "en"]}
    assert {row["conversation_id"]: row["language"] for row in kept} == {"c0": "en", "c1": "hi-Latn"}
