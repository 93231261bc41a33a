"""Tables 4 and 7: every metric against hand-labelled responses, honest about n, intervals, and what can't gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.core.config import StageConfig
from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.manifest import SourceRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.stage import Inputs
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.evaluation import assemble, metrics
from flywheel_tasks.evaluation.gate import Decision
from flywheel_tasks.evaluation.judge import JudgeConfig
from flywheel_tasks.evaluation.metrics import MetricsConfig
from flywheel_tasks.style.features import FEATURES
from tests.curation.curation_runs import commit, prompts
from tests.evaluation.judge_endpoint import PERFECT, Endpoint, serving
from tests.evaluation.test_gate import Body, good, verdict

REFUSAL = "I'm sorry, but I can't help with that."
LOOP = "I will never let you go, my love. " * 8
# (prompt's source, what the user wrote, response, finish): what a reader says of each stands in EXPECTED.
ROWS = [
    ("internal", "What should I pack?", "Take these:\n- a hat\n- a coat\n- boots", "stop"),
    ("internal", "I passed my exam!", "That is wonderful news, I am so proud of you 🎉", "stop"),
    ("internal", "Tell me about your day", REFUSAL, "stop"),
    ("internal", "Do you like cats?", "As an AI language model, I have no pets. How can I help you today?", "stop"),
    ("production", "Do you love me?", LOOP, "length"),
    ("production", "Tell me a story", "word after word and " * 40, "stop"),
    ("production", "aap kaise hain, sab theek hai na?", "I am fine, thank you for asking me about it.", "stop"),
    ("production", "mujhe ek kahani sunao na please", "Haan zaroor, ek samay ki baat hai, ek raja tha.", "stop"),
    ("production", "¿Cómo estás hoy, amiga mía?", "Muy bien, gracias, ¿y tú qué tal estás?", "stop"),
    ("production", "Sing me something", "**La la la, this is my song for you", "stop"),
]
EXPECTED = {
    "contains_list": (1 / 4, 4),
    "contains_emoji": (1 / 4, 4),
    "templated_responses": (2 / 4, 4),
    "false_refusal_internal": (1 / 4, 4),
    "false_refusal_user": (0 / 6, 6),
    "cooperative_ratio": (3 / 4, 4),
    "wall_of_text": (1 / 6, 6),
    "infinity_loop": (2 / 10, 10),
    "broken_markdown": (1 / 10, 10),
    "unrequested_translation": (0, 10),
    "language_match:hi-Latn": (1 / 2, 2),
    "language_match:es": (1, 1),
}


def responses(policy: str, rows: list[tuple[str, str, str, str]] = ROWS, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "completion_id": f"{policy}-{n}",
            "prompt_id": f"p{n}",
            "user": f"{n:032x}",
            "character_id": f"c{n % 5}",
            "locale": "en_US",
            "language": "en",
            "jtbd": None,
            "split": "eval",
            "text": text,
            "sample": 0,
            "turns": [{"role": "user", "content": asked}],
            "tokens": len(text.split()),
            "logprob": None,
            "finish": finish,
            "policy": policy,
            "scores": [],
            "accepted": None,
            "reason": None,
        }
        | changes
        for n, (_, asked, text, finish) in enumerate(rows)
    ]


class World:
    """A store with respond's and constrain's outputs, and the metrics stage run on them."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(f"file://{folder}/store")
        self.runs = 0

    def run(
        self,
        rows: list[dict[str, Any]],
        config: StageConfig | None = None,
        sources: list[str] | None = None,
        labels: Path | None = None,
        earlier: Artifact | None = None,
        forgotten: frozenset[str] = frozenset(),
    ) -> Artifact:
        self.runs += 1
        kinds = [source for source, *_ in ROWS] if sources is None else sources
        table = pa.Table.from_pylist(rows, schema=schemas.COMPLETION)

        def fill_responses(out: Output) -> None:
            with out.table("responses") as writer:
                writer.write(table)
            out.account("response", rows_in=table.num_rows, rows_out=table.num_rows)

        def fill_prompts(out: Output) -> None:
            with out.table("prompts") as writer:
                writer.write(
                    prompts([{"prompt_id": f"p{n}", "source": s, "split": "eval"} for n, s in enumerate(kinds)])
                )
            out.account("prompt", rows_in=len(kinds), rows_out=len(kinds))

        given: dict[str, tuple[Artifact, str] | None] = {
            "responses": (
                self.once("respond", {"responses": "completion"}, fill_responses, f"{self.runs:032x}"),
                "responses",
            ),
            "prompts": (
                self.once("constrain", {"prompts": "prompt"}, fill_prompts, f"{self.runs + 500:032x}"),
                "prompts",
            ),
            "earlier": (earlier, "judgements") if earlier else None,
        }
        record = [SourceRecord(name="labels.jsonl", uri=str(labels), bytes=1, sha256="0" * 64)] if labels else []
        inputs = Inputs(given, {"labelled": tuple(record)}, forgotten)
        return commit(
            self.store,
            "metrics",
            metrics.STAGE.outputs,
            lambda out: metrics.run(inputs, config or MetricsConfig(), out),
            f"{self.runs + 900:032x}",
        )

    def once(self, stage: str, contracts: dict[str, str], fill: Any, key: str) -> Artifact:
        return self.store.find(stage, key) or commit(self.store, stage, contracts, fill, key)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_every_metric_says_what_a_reader_says(world: World) -> None:
    found = world.run([*responses("candidate"), *responses("champion")]).json("metrics")["policies"]
    for name, (value, n) in EXPECTED.items():
        assert (found["candidate"][name]["value"], found["candidate"][name]["n"]) == (pytest.approx(value), n), name
    length = found["candidate"]["average_length"]
    words = [len(text.split()) for source, _, text, _ in ROWS if source == "production"]
    assert (length["value"], length["n"], length["unit"]) == (pytest.approx(np.mean(words)), 6, "tokens")
    assert found["candidate"]["contains_list"] == found["champion"]["contains_list"]


def test_table_4_is_there_whole_with_its_prompt_sets(world: World) -> None:
    found = world.run(responses("candidate")).json("metrics")["policies"]["candidate"]
    sets = {
        "average_length": "user",
        "contains_list": "internal",
        "contains_emoji": "internal",
        "positive_sentiment": "internal",
        "instruction_violation": "internal",
        "cooperative_ratio": "internal",
        "non_preachy_rate": "internal",
        "templated_responses": "internal",
        "wall_of_text": "user",
        "preachy_tone": "internal",
        "false_refusal_internal": "internal",
        "false_refusal_user": "user",
    }
    assert {name: found[name]["set"] for name in sets} == sets
    assert {"infinity_loop", "repetitive_phrases", "broken_markdown", "language_match", "phrase:omg"} <= set(found)


def test_every_number_has_an_interval_that_holds_it(world: World) -> None:
    found = world.run(responses("candidate")).json("metrics")["policies"]["candidate"]
    for name, body in found.items():
        if body["value"] is not None:
            assert 0 <= body["low"] <= body["value"] <= body["high"], name
            assert body["n"] > 0


def test_of_no_response_there_is_no_number_and_never_zero_over_zero(world: World) -> None:
    only_users = world.run(responses("candidate"), sources=["production"] * len(ROWS)).json("metrics")
    internal = only_users["policies"]["candidate"]["contains_list"]
    assert (internal["value"], internal["n"], internal["why"]) == (None, 0, "no response to internal prompts")
    nothing = world.run([]).json("metrics")
    assert nothing["policies"] == {}
    silent = world.run(responses("candidate", finish="error", reason="too_long: 9000 tokens")).json("metrics")
    body = silent["policies"]["candidate"]
    assert body["failed_responses"]["value"] == 1
    assert all(row["value"] is None for name, row in body.items() if name != "failed_responses")
    json.dumps(silent, allow_nan=False)


def test_what_the_embedded_judge_does_not_measure_is_absent_and_its_agreement_is_printed(world: World) -> None:
    report = world.run(responses("candidate")).json("metrics")
    found = report["policies"]["candidate"]
    for name in ("positive_sentiment", "instruction_violation", "non_preachy_rate", "preachy_tone"):
        assert found[name]["value"] is None
        assert "does not measure it" in found[name]["why"]
    assert found["false_refusal_user"]["can_gate"] is True
    assert report["judge"]["agreement"]["false_refusal"]["kappa"] == pytest.approx(0.7477)
    strict = world.run(responses("candidate"), MetricsConfig(judge=JudgeConfig(least_agreement=0.9))).json("metrics")
    body = strict["policies"]["candidate"]["false_refusal_user"]
    assert body["can_gate"] is False
    assert "kappa 0.75 [0.66, 0.83]" in body["why"]


def judged(url: str, **changes: Any) -> MetricsConfig:
    return MetricsConfig(judge=JudgeConfig(kind="http", url=url, model="m", parallel=1, retries=0, **changes))


def test_an_unvalidated_judge_is_shown_and_cannot_gate(world: World) -> None:
    with serving(Endpoint(PERFECT | {"instructions": "violated"})) as endpoint:
        report = world.run(responses("candidate"), judged(endpoint.url)).json("metrics")
    body = report["policies"]["candidate"]["instruction_violation"]
    assert (body["value"], body["n"], body["can_gate"]) == (1, 4, False)
    assert body["why"].startswith("unvalidated")


def test_a_judge_that_agrees_with_people_may_gate_until_too_many_judgements_are_missing(
    world: World, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.jsonl"
    rows = [
        {
            "metric": "instruction_violation",
            "response": f"{'bad' if n % 2 else 'good'} {n}",
            "label": bool(n % 2),
            "group": str(n),
        }
        for n in range(60)
    ]
    labels.write_text("\n".join(map(json.dumps, rows)))

    class Knowing(Endpoint):
        def next(self, body: dict[str, Any]) -> Any:
            super().next(body)
            response = json.loads(body["messages"][1]["content"])["material"]["response"]
            if response in self.silent:
                return "I would rather not say"
            return PERFECT | {"instructions": "violated" if response.startswith("bad") else "followed"}

        silent: tuple[str, ...] = ()

    endpoint = Knowing(PERFECT)
    with serving(endpoint):
        report = world.run(responses("candidate"), judged(endpoint.url), labels=labels).json("metrics")
        assert report["judge"]["agreement"]["instruction_violation"]["kappa"] == 1
        assert report["policies"]["candidate"]["instruction_violation"]["can_gate"] is True
        endpoint.silent = (REFUSAL,)
        report = world.run(responses("candidate"), judged(endpoint.url), labels=labels).json("metrics")
    body = report["policies"]["candidate"]["instruction_violation"]
    assert (body["n"], body["missing"], body["can_gate"]) == (3, 1, False)
    assert body["why"] == "1 of 4 judgements are missing"
    assert report["judge"]["missing"] == {"prose": 1}


def test_a_response_is_judged_once_across_policies_and_cycles(world: World) -> None:
    with serving(Endpoint(PERFECT)) as endpoint:
        first = world.run([*responses("candidate"), *responses("champion")], judged(endpoint.url))
        assert len(endpoint.seen) == len(ROWS)
        world.run(responses("candidate"), judged(endpoint.url), earlier=first)
        assert len(endpoint.seen) == len(ROWS)
    kept = json.dumps(first.json("judgements"))
    assert not any(text in kept for _, asked, text, _ in ROWS for text in (asked, text))


def test_an_endpoint_that_is_down_commits_nothing_and_the_next_try_asks_for_the_rest(world: World) -> None:
    rows = [*responses("candidate"), *responses("champion")]
    endpoint = Endpoint(*[PERFECT] * 7, 503)
    with serving(endpoint):
        with pytest.raises(FlywheelError, match=r"http:m .* gave no answer for 3 of 6 responses of the candidate"):
            world.run(rows, judged(endpoint.url))
        endpoint.script, asked = [PERFECT], len(endpoint.seen)
        world.runs -= 1  # the scheduler tries the same work again
        made = world.run(rows, judged(endpoint.url))
    assert len(endpoint.seen) - asked == 3
    assert made.json("metrics")["judge"]["missing"] == {}


def test_a_few_answers_that_did_not_come_are_holes_not_zeros(world: World) -> None:
    endpoint = Endpoint(*[PERFECT] * 9, 503)
    with serving(endpoint):
        report = world.run(responses("candidate"), judged(endpoint.url, most_missing=0.2)).json("metrics")
    body = report["policies"]["candidate"]["false_refusal_user"]
    assert (body["value"], body["n"], body["missing"]) == (0, 5, 1)
    assert report["judge"]["missing"] == {"http_503": 1}


def test_rows_are_accounted_for_and_every_score_is_kept(world: World) -> None:
    rows = responses("candidate")
    rows[0] |= {"finish": "error", "text": "", "reason": "unknown_character: c0"}
    made = world.run(rows, forgotten=frozenset({f"{3:032x}"}))
    assert made.manifest.rows is not None
    assert made.manifest.rows.reasons == {"forgotten": 1, "unknown_character": 1}
    assert (made.manifest.rows.rows_in, made.manifest.rows.rows_out) == (10, 8)
    scored = made.table("scored").read().to_pylist()
    scores = {score["name"]: score["value"] for score in scored[1]["scores"]}
    assert scored[1]["completion_id"] == "candidate-2"
    assert (scores["templated_refusal"], scores["false_refusal"], scores["cooperative_ratio"]) == (1, 1, 0)
    assert set(scores) >= set(FEATURES) - {"language_mismatch"}


def test_style_is_compared_with_the_champion_and_along_training(world: World) -> None:
    plain = [
        ("production", "hi there my friend", f"we walked {n} miles along the river today", "stop") for n in range(60)
    ]
    listed = [(s, asked, "Look:\n- one\n- two\n- three", finish) for s, asked, _, finish in plain]
    rows = [*responses("sft", plain), *responses("candidate", listed), *responses("champion", plain)]
    made = world.run(rows, sources=["production"] * 60)
    style = made.json("style")
    assert [(c["a"], c["b"]) for c in style["comparisons"]] == [("candidate", "champion"), ("candidate", "sft")]
    assert any("has_list" in alert for alert in style["alerts"])
    body: dict[str, Any] = {}
    assemble._style(style, body, {})
    assert body["style_drift"]["has_list"]["alert"] is True


def test_the_gate_reads_what_this_stage_writes(world: World) -> None:
    rows = [(source, f"{asked} {n}", text, finish) for n in range(4) for source, asked, text, finish in ROWS]
    made = world.run([*responses("candidate", rows), *responses("champion", rows)], sources=[r[0] for r in rows])
    evidence = assemble.assemble({"metrics": made.json("metrics"), "style": made.json("style")}, {})
    assert evidence.metrics is not None
    assert evidence.metrics.false_refusal_user is not None
    assert evidence.metrics.false_refusal_internal is not None
    assert evidence.metrics.false_refusal_internal.candidate.rate == 0.25
    assert "metrics.instruction_violation" in evidence.unmeasured
    assert evidence.style_drift
    compared = made.json("style")["comparisons"][0]["features"]
    assert set(evidence.style_drift) == {feature["name"] for feature in compared}, "no feature is dropped"
    assert not [name for name, drift in evidence.style_drift.items() if drift.unusable]


def test_too_few_responses_tell_nothing_of_style(world: World) -> None:
    style = world.run([*responses("candidate"), *responses("champion")]).json("style")
    evidence = assemble.assemble({"style": style}, {})
    assert evidence.style_drift is not None
    assert all(drift.unusable for drift in evidence.style_drift.values())
    assert "measured it in 10 responses of each side" in str(evidence.style_drift["has_emoji"].unusable)


SPANISH = (
    "Claro que sí, me encanta caminar por el parque contigo.",
    "Pues mira, yo creo que deberías llamar a tu madre hoy.",
    "No sé qué decirte, pero siempre puedes contar conmigo.",
    "¿Quieres que te cuente lo que hicimos ayer en la playa?",
)
ENGLISH = (
    "Of course, I would love to walk in the park with you.",
    "Well look, I think that you should call your mother today.",
    "I do not know what to say, but you can always count on me.",
    "Do you want me to tell you what we did at the beach yesterday?",
)


def in_spanish(policy: str, answers: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Two hundred answers to somebody who writes in Spanish."""
    draw = np.random.default_rng(seed)
    asked = "¿Qué podemos hacer esta tarde después de comer con mi familia?"
    texts = [" ".join(draw.permutation(answers)[: draw.integers(1, 5)]) for _ in range(200)]
    return responses(policy, [("production", asked, text, "stop") for text in texts])


def decided_on(style: dict[str, Any]) -> Decision:
    """The strictest gate on evidence that is in order, but for what the monitor found."""
    found: Body = {}
    assemble._style(style, found, {})
    return verdict(good() | found)


def test_two_models_of_one_style_and_language_pass_the_strictest_gate(world: World) -> None:
    rows = [*in_spanish("candidate", SPANISH, 1), *in_spanish("champion", SPANISH, 2)]
    style = world.run(rows, sources=["production"] * 200).json("style")
    assert [feature["name"] for feature in style["comparisons"][0]["features"]] == list(FEATURES)
    decision = decided_on(style)
    assert (decision.decision, decision.reasons) == ("PASS", [])


def test_a_candidate_that_leaves_its_users_language_does_not_pass(world: World) -> None:
    rows = [*in_spanish("candidate", ENGLISH, 1), *in_spanish("champion", SPANISH, 2)]
    style = world.run(rows, sources=["production"] * 200).json("style")
    assert any("language_mismatch is 100 % in candidate, 0 % in champion" in alert for alert in style["alerts"])
    decision = decided_on(style)
    assert decision.decision == "BLOCK"
    assert any("language_mismatch moved" in reason for reason in decision.reasons)
