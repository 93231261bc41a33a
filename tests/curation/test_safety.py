"""Sec. 2.6, fail-closed: what a classifier can't judge does not pass; the embedded default on halves it never saw."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import ValidationError

from flywheel_tasks.curation import guard, labelled, ngrams
from flywheel_tasks.curation.safety import SafetyConfig, Turns, classifier_and_threshold, judge

ROWS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=12)


def turns(*conversations: list[tuple[str, str]]) -> Turns:
    flat = [turn for conversation in conversations for turn in conversation]
    first = np.repeat(np.cumsum([0, *map(len, conversations)])[:-1], [len(c) for c in conversations])
    return Turns(pa.array([c for _, c in flat], pa.string()), pa.array([r for r, _ in flat], pa.string()), first)


def said(*texts: str) -> Turns:
    return turns(*[[("user", text)] for text in texts])


def test_a_turn_that_breaks_the_classifier_is_not_judged_and_its_neighbours_are() -> None:
    def classifier(batch: Turns) -> np.ndarray:
        if "boom" in batch.content.to_pylist():
            raise RuntimeError("out of memory")
        return np.full(len(batch.content), 0.25)

    scores = judge(classifier, said("a", "b", "boom", "c", "d"), 4096, 10)
    assert np.isnan(scores).tolist() == [False, False, True, False, False]


def test_a_classifier_that_hangs_is_given_up_in_time() -> None:
    def classifier(batch: Turns) -> np.ndarray:
        time.sleep(30)
        return np.zeros(len(batch.content))

    start = time.monotonic()
    assert np.isnan(judge(classifier, said("a", "b"), 4096, 0.2)).all()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "answer", [lambda n: np.full(n, np.nan), lambda n: np.full(n, 7.0), lambda n: np.zeros(n + 1), lambda n: "safe"]
)
def test_an_answer_that_is_no_probability_is_no_verdict(answer: Callable[[int], object]) -> None:
    scores = judge(lambda batch: answer(len(batch.content)), said("a", "b"), 4096, 10)  # type: ignore
    assert np.isnan(scores).all()


@given(st.lists(st.integers(1, 7), max_size=30), st.integers(1, 9))
def test_batches_never_cut_a_conversation(sizes: list[int], batch: int) -> None:
    seen: list[int] = []

    def classifier(part: Turns) -> np.ndarray:
        seen.extend(np.unique(part.first, return_counts=True)[1].tolist())
        return np.zeros(len(part.content))

    judged = judge(classifier, turns(*[[("user", "x")] * size for size in sizes]), batch, 10)
    assert seen == sizes
    assert len(judged) == sum(sizes)


@given(ROWS, ROWS)
def test_the_score_of_a_text_does_not_depend_on_its_neighbours(before: list[str], after: list[str]) -> None:
    model = ngrams.load("safety")
    alone = ngrams.probabilities(model, pa.array(["You are all disgusting animals"]))
    among = ngrams.probabilities(model, pa.array([*before, "You are all disgusting animals", *after], pa.string()))
    assert among[len(before)] == pytest.approx(alone[0], abs=1e-6)


@given(ROWS)
def test_scores_equal_the_weights_summed_over_the_features(texts: list[str]) -> None:
    model = ngrams.load("hindi")
    array = pa.array(texts, pa.string())
    found = ngrams.features(array, len(model.weights).bit_length() - 1, model.orders, model.words)
    total = np.bincount(found.rows, model.weights[found.columns], minlength=len(texts))
    logit = model.bias + total / np.sqrt(np.maximum(np.bincount(found.rows, minlength=len(texts)), 1))
    np.testing.assert_allclose(ngrams.probabilities(model, array), 1 / (1 + np.exp(-logit)), atol=1e-5)


def test_one_bad_passage_in_a_long_message_is_seen() -> None:
    classifier, threshold = classifier_and_threshold(SafetyConfig())
    calm = "we talked about the garden, the weather and what to cook for dinner. " * 40
    bad = "I hate women, they are all disgusting animals and should be killed. They are vermin, they are scum. "
    scores = classifier(said(calm, calm + bad + calm))
    assert scores[0] < threshold <= scores[1]


@pytest.mark.parametrize("text", ["", "😀😀😀", "ok", "hi", "👩‍👩‍👧", "lol", "?"])
def test_turns_that_say_nothing_are_safe(text: str) -> None:
    classifier, threshold = classifier_and_threshold(SafetyConfig())
    assert classifier(said(text))[0] < threshold


@pytest.mark.parametrize(
    ("source", "least"), [("surge_toxicity", 0.85), ("hatecheck", 0.8), ("openai_moderation", 0.55)]
)
def test_embedded_default_on_the_half_never_trained_on(data_dir: Path, source: str, least: float) -> None:
    from flywheel_tasks.curation.fit import measure

    items = [i for i in labelled.safety(data_dir) if i.source == source and labelled.half_of(i) == "test"]
    numbers = measure(ngrams.load("safety"), items)[source]
    assert numbers["average_precision"] >= least
    assert numbers["recall"] >= 0.7


@pytest.mark.parametrize("source", ["topical_chat", "xpersona_en", "xpersona_fr", "hinglish_top", "lingua_es"])
def test_ordinary_text_passes(data_dir: Path, source: str) -> None:
    """At most 3 % of turns on the half never trained on, in whatever language."""
    items = [i for i in labelled.safety(data_dir) if i.source == source and labelled.half_of(i) == "test"]
    classifier, threshold = classifier_and_threshold(SafetyConfig())
    assert (classifier(said(*[i.text for i in items])) >= threshold).mean() <= 0.03


def test_fitting_again_gives_a_classifier_that_reads_back_as_it_was_measured(tmp_path: Path) -> None:
    from flywheel_tasks.curation.fit import Task, fit, measure

    rows = [
        labelled.Labelled("own", f"you {w} thing {n}", w in "awful nasty", str(n))
        for n in range(60)
        for w in ("awful", "lovely", "nasty", "kind")
    ]
    model, _ = fit(Task(lambda _: rows, 10, (2, 3), True, 0.01), rows)
    stored = ngrams.save(model, tmp_path / "own.safetensors")
    assert measure(stored, rows)["own"]["accuracy"] == 1.0
    assert ngrams.load(str(tmp_path / "own.safetensors")).threshold == stored.threshold


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("safe", 0.0),
        (" safe\n", 0.0),
        ("unsafe\nS1", 1.0),
        ("\n\nunsafe\nS2,S12", 1.0),
        ("unsafe\nS12", 0.0),
        ("unsafe", 1.0),
    ],
)
def test_guard_verdicts(answer: str, score: float) -> None:
    assert guard.verdict(answer, allowed=("s12",)) == score


@pytest.mark.parametrize("answer", ["", "I think it is safe", "safe unsafe", "unsafe because", "SAFE-ish", "safely"])
def test_any_other_answer_of_the_guard_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="neither"):
        guard.verdict(answer)


def test_the_guard_sees_bounded_context_of_its_own_conversation() -> None:
    talk = turns([("user", "a"), ("assistant", "b"), ("user", "c")], [("user", "d")])
    assert [[m["content"] for m in ms] for ms in guard.messages(talk, 2)] == [["a"], ["a", "b"], ["c"], ["d"]]


_STRICT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)


def rendered(messages: list[dict[str, str]]) -> str:
    """The messages through a chat template that, like Llama Guard's, refuses roles that do not alternate."""

    def refuse(why: str) -> None:
        raise TemplateError(why)

    environment = ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = refuse
    return environment.from_string(_STRICT).render(messages=messages)


@given(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=9), st.integers(1, 6))
def test_a_template_that_wants_strict_turns_takes_every_window(roles: list[str], context: int) -> None:
    talk = turns([(role, f"t{n}.") for n, role in enumerate(roles)])
    for at, messages in enumerate(guard.messages(talk, context)):
        text = rendered(messages)
        assert messages[-1]["role"] == roles[at]
        assert text.rstrip().endswith(f"t{at}.")
        assert sum(f"t{n}." in text for n in range(len(roles))) <= context


class _Guard(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint: unsafe where the judged turn says so, and broken in the ways endpoints break."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        if "slow" in text:
            time.sleep(3)
        if "late" in text:
            time.sleep(0.3)
        ok = (
            self.path == "/v1/chat/completions"
            and self.headers["Authorization"] == "Bearer key-of-the-test"
            and body["temperature"] == 0
        )
        try:
            rendered(body["messages"])
        except TemplateError:
            ok = False
        answer = "unsafe\nS1" if "bomb" in text else "as an AI model I" if "odd" in text else "safe"
        reply = (
            b"not json" if "garbage" in text else json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        )
        if "slow" in text:
            return
        self.send_response(500 if "crash" in text or not ok else 200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Guard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FLYWHEEL_GUARD_KEY", "key-of-the-test")
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_guard_behind_an_endpoint_fails_closed(endpoint: str) -> None:
    config = SafetyConfig(classifier="guard-http", guard_url=endpoint, guard_model="guard", request_timeout_s=1)
    classifier, threshold = classifier_and_threshold(config)
    assert threshold == 0.5
    scores = judge(classifier, said("hello", "how to build a bomb", "odd", "garbage", "crash", "slow"), 4096, 30)
    np.testing.assert_array_equal(scores, [0.0, 1.0, np.nan, np.nan, np.nan, np.nan])


def guarded(endpoint: str, **settings: object) -> SafetyConfig:
    return SafetyConfig.model_validate(
        {"classifier": "guard-http", "guard_url": endpoint, "guard_model": "guard", **settings}
    )


def test_a_guard_judges_long_talks_greetings_and_answers_given_twice(endpoint: str) -> None:
    config = guarded(endpoint)
    long = [("user", "hello"), ("assistant", "hi")] * 4
    talk = turns(long, [("assistant", "welcome"), ("user", "hello")], [*long[:2], ("assistant", "how to build a bomb")])
    scores = judge(classifier_and_threshold(config)[0], talk, config.turns_per_call(), config.timeout_s)
    np.testing.assert_array_equal(scores, [*[0.0] * 12, 1.0])


def test_a_slow_guard_is_asked_no_more_than_it_can_answer_in_time(endpoint: str) -> None:
    config = guarded(endpoint, guard_parallel=2, request_timeout_s=0.5, timeout_s=1.2)
    assert config.turns_per_call() == 4
    talk = said(*[f"late {n}" for n in range(12)])
    scores = judge(classifier_and_threshold(config)[0], talk, config.turns_per_call(), config.timeout_s)
    assert (scores == 0).all()
    assert SafetyConfig().turns_per_call() == SafetyConfig().batch_turns


def test_a_batch_that_is_given_up_does_not_delay_the_next(endpoint: str) -> None:
    config = guarded(endpoint, guard_parallel=2, request_timeout_s=1, timeout_s=1.3)
    classifier, _ = classifier_and_threshold(config)
    late = judge(classifier, said(*[f"late {n}" for n in range(40)]), 40, config.timeout_s)
    assert late[0] == 0, "an answer that came in time counts"
    assert np.isnan(late[-1])
    start = time.monotonic()
    assert judge(classifier, said("hello"), 40, config.timeout_s).tolist() == [0.0]
    assert time.monotonic() - start < 1


def test_a_guard_that_is_down_passes_nothing() -> None:
    config = SafetyConfig(classifier="guard-http", guard_url="http://127.0.0.1:9/v1", guard_model="guard")
    assert np.isnan(judge(classifier_and_threshold(config)[0], said("hello", "hi"), 4096, 30)).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"classifier": "guard-http"},
        {"classifier": "guard-http", "guard_url": "file:///etc/passwd", "guard_model": "m"},
        {"classifier": "guard-vllm"},
        {"classifier": "none"},
        {"threshold": 0},
    ],
)
def test_a_setting_that_could_pass_everything_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SafetyConfig(**settings)  # type: ignore


@pytest.mark.slow
def test_a_guard_in_this_process_that_talks_nonsense_passes_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real engine on a model of random weights: it answers, but never `safe`, so nothing is judged."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    config = SafetyConfig(classifier="guard-vllm", guard_model=str(tiny_model))
    scores = classifier_and_threshold(config)[0](turns([("user", "hello"), ("assistant", "hi")]))
    assert np.isnan(scores).all()
