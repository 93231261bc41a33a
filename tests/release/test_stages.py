"""expose and readout as stages of a cycle: the log grows, the readout closes when its window is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from scipy import stats

from flywheel_tasks.core import ids, schemas
from flywheel_tasks.core.config import FlywheelConfig, StageConfig
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.forget import forget
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.runner import run_stage
from flywheel_tasks.core.stage import Inputs, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.release import expose, ledger, readout
from flywheel_tasks.release.ledger import Change, Model
from flywheel_tasks.release.stamp import layout_of
from flywheel_tasks.stats.multiplicity import holm
from flywheel_tasks.stats.srm import sample_ratio
from tests.release.promotion_world import ledger_on
from tests.release.worlds import activity_table, day, world, write


class DaysConfig(StageConfig):
    days: int = 7
    units: int = 3000


def traffic(inputs: Inputs, config: DaysConfig, out: Output) -> None:
    """Activity of the first days; every unit chats every other day."""
    rows = [
        (f"{u:08x}", day(d), 1 + (u + d) % 4) for u in range(config.units) for d in range(config.days) if (u + d) % 2
    ]
    with out.table("activity") as writer:
        writer.write(activity_table(rows))
    with out.table("conversations") as writer:
        for locales in (LOCALES, LOCALES[:1]):
            writer.write(conversations([(f"{u:08x}", locale) for u in range(0, config.units, 3) for locale in locales]))
    out.account("row", rows_in=len(rows), rows_out=len(rows))


LOCALES = ("pt", "en", "de")
"""Every third user talks twice in pt and once in the others; nothing is known of the rest."""


def conversations(rows: list[tuple[str, str]]) -> pa.Table:
    plain = {name: ["x"] * len(rows) for name in ("character_id", "source", "split")}
    named = {"conversation_id": [f"c{i}" for i in range(len(rows))], "turns": [[]] * len(rows)}
    nulls = dict.fromkeys(("language", "model_version"), [None] * len(rows))
    users = {"user": [u for u, _ in rows], "locale": [locale for _, locale in rows]}
    return pa.table(plain | named | nulls | users).select(schemas.CONVERSATION.names).cast(schemas.CONVERSATION)


INGEST = Stage(
    name="ingest",
    phase="curation",
    paper="Sec. 2.2",
    outputs={"activity": "activity", "conversations": "conversation"},
    config=DaysConfig,
    run=traffic,
)
HALF = {"name": "x", "arms": {"test": 0.5, "control": 0.5}}


class Cycle:
    """One store, one configuration; what a daily DAG would run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"file://{folder}/store"

    def run(
        self, stage: Stage, cycle: str = "2026-W45", given: dict[str, str] | None = None, **sections: dict[str, Any]
    ) -> Artifact:
        classes = {"ingest": DaysConfig, "expose": expose.ExposeConfig, "readout": readout.ReadoutConfig}
        stages = {name: kind.model_validate(sections.get(name, {})) for name, kind in classes.items()}
        config = FlywheelConfig.model_validate(
            {"store": {"uri": self.uri}, "tracking": {"uri": f"sqlite:///{self.folder}/mlflow.db"}}
        ).model_copy(update={"stages": stages})
        return run_stage(stage, cycle, config, Store(self.uri), given).artifact


@pytest.fixture
def cycle(tmp_path: Path) -> Cycle:
    return Cycle(tmp_path)


def exposures(artifact: Artifact) -> list[dict[str, Any]]:
    return list(artifact.table("exposures").read().to_pylist())


def test_one_cycle_from_activity_to_decision(cycle: Cycle) -> None:
    sections = {"expose": {"experiments": [HALF]}}
    cycle.run(INGEST)
    log = exposures(cycle.run(expose.STAGE, **sections))
    arms = [row["arm"] for row in log]
    assert len(log) == 3000
    assert stats.binomtest(arms.count("test"), 3000, 0.5).pvalue > 1e-4
    assert {row["exposed_at"].date() for row in log} == {day(0), day(1)}
    made = cycle.run(readout.STAGE, readout={"days": 7, "as_of": str(day(7))}, **sections)
    found = made.json("readout")
    assert found["status"] == "closed"
    assert found["comparisons"]["test"]["breadth"]["kind"] == "bounded"
    assert found["decisions"][0]["verdict"] in ("hold", "ship", "roll back")
    assert made.file("report", "forest.png").startswith(b"\x89PNG")
    assert b"rule: the first exposure of a unit counts" in made.file("report", "readout.txt")
    assert {"test.breadth.lift_pct", "test.depth.lift_pct_lower", "closed"} <= set(made.manifest.metrics)


def test_default_arms_are_ten_percent_and_named_by_the_cycle(cycle: Cycle) -> None:
    cycle.run(INGEST)
    log = exposures(cycle.run(expose.STAGE))
    assert {row["experiment"] for row in log} == {"release-2026-W45"}
    counts = [sum(row["arm"] == arm for row in log) for arm in ("test", "control")]
    assert stats.chisquare([*counts, 3000 - sum(counts)], [300, 300, 2400]).pvalue > 1e-4


def test_the_log_is_cumulative_and_keeps_the_first_exposure(cycle: Cycle) -> None:
    sections = {"expose": {"experiments": [HALF]}}
    cycle.run(INGEST, ingest={"days": 1})
    first = exposures(cycle.run(expose.STAGE, **sections))
    cycle.run(INGEST, "2026-W46", ingest={"days": 9, "units": 3100})
    larger = {"expose": {"experiments": [HALF | {"arms": {"test": 0.4, "control": 0.5}}]}}
    made = cycle.run(expose.STAGE, "2026-W46", **larger)
    second = exposures(made)
    assert second[: len(first)] == first
    assert len({row["unit_id"] for row in second}) == len(second)
    report = made.json("report")["x"]
    assert report["already_exposed"] == len(first)
    assert report["newly_exposed"] == len(second) - len(first) > 0
    renamed = HALF | {"arms": {"candidate": 0.5, "control": 0.5}}
    cycle.run(INGEST, "2026-W47")
    with pytest.raises(InputError, match="keep them"):
        cycle.run(expose.STAGE, "2026-W47", expose={"experiments": [renamed]})


def test_eligibility(cycle: Cycle) -> None:
    cycle.run(INGEST, ingest={"days": 4})
    log = exposures(cycle.run(expose.STAGE, expose={"experiments": [HALF], "min_sends": 4, "start": str(day(3))}))
    assert len(log) == 750
    assert {row["exposed_at"].date() for row in log} == {day(3)}


def test_an_open_window_waits_and_the_next_day_closes_it(cycle: Cycle) -> None:
    sections = {"expose": {"experiments": [HALF]}, "readout": {"start": str(day(0))}}
    cycle.run(INGEST, ingest={"days": 6})
    cycle.run(expose.STAGE, **sections)
    assert cycle.run(readout.STAGE, **sections).json("readout")["status"] == "running"
    cycle.run(INGEST, ingest={"days": 7})
    cycle.run(expose.STAGE, **sections)
    assert cycle.run(readout.STAGE, **sections).json("readout")["status"] == "running"
    told = sections["readout"] | {"as_of": str(day(7))}
    assert cycle.run(readout.STAGE, **(sections | {"readout": told})).json("readout")["status"] == "closed"
    cycle.run(INGEST, ingest={"days": 8})
    cycle.run(expose.STAGE, **sections)
    assert cycle.run(readout.STAGE, **sections).json("readout")["status"] == "closed"


def test_a_release_waits_until_every_arm_has_a_unit(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small platform the first days may bring people of one arm only."""
    ledger_on(monkeypatch, day(0))
    model = Model(stage="dpo", key="a" * 32, output="model", sha256="0" * 64)
    ledger.append(Store(cycle.uri).storage, lambda _: Change("nominate", model, "2026-W45", "x", "x", "gate/x"))
    sections = {"expose": {"experiments": [{"arms": HALF["arms"]}]}}
    cycle.run(INGEST, ingest={"days": 8, "units": 1})
    assert sum(cycle.run(expose.STAGE, **sections).json("report")["release-2026-W45"]["units"].values()) == 1
    found = cycle.run(readout.STAGE, **sections).json("readout")
    assert (found["status"], found["comparisons"]) == ("running", {})
    assert found["problems"][0].startswith("not every arm has a unit")


def test_the_stock_pipeline_reads_its_second_week(cycle: Cycle) -> None:
    """The log keeps the release of the week before; each week's readout is of its own release."""
    for week in ("2026-W45", "2026-W46"):
        cycle.run(INGEST, week, ingest={"days": 8})
        log = exposures(cycle.run(expose.STAGE, week))
        found = cycle.run(readout.STAGE, week).json("readout")
        assert (found["experiment"], found["status"]) == (f"release-{week}", "closed"), found["problems"]
        mine = sum(row["experiment"] == f"release-{week}" for row in log)
        assert found["rows"]["units"] == mine
    assert mine < len(log)


def test_p_values_are_adjusted_across_the_versions_read_so_far(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the releases that tested a candidate: the week of W44 had none, so its numbers are of nothing."""
    sections = {"expose": {"experiments": [{"arms": HALF["arms"]}]}}
    model = Model(stage="dpo", key="a" * 32, output="model", sha256="0" * 64)
    storage = Store(cycle.uri).storage
    claims: list[dict[str, Any]] = []
    ledger_on(monkeypatch, day(0))
    for week in ("2026-W44", "2026-W45", "2026-W46", "2026-W47"):
        tested = week != "2026-W44"
        if tested:
            ledger.append(storage, lambda _, week=week: Change("nominate", model, week, "x", "x", f"gate/{week}"))
        cycle.run(INGEST, week, ingest={"days": 8, "units": 1500})
        cycle.run(expose.STAGE, week, **sections)
        found = cycle.run(readout.STAGE, week, **sections).json("readout")
        mine = found["comparisons"]["test"]
        names = ("breadth", "depth") if tested else ()
        claims += [{"experiment": f"release-{week}", "metric": name, "p": mine[name]["p"]} for name in names]
        assert [{k: c[k] for k in ("experiment", "metric", "p")} for c in found["versions"]] == claims
    p = [c["p"] for c in claims]
    assert [c["p_holm"] for c in found["versions"]] == holm(p)
    assert [c["p_bh"] for c in found["versions"]] == pytest.approx(stats.false_discovery_control(p))
    assert max(c["p_holm"] for c in found["versions"]) >= max(mine[m]["p_holm"] for m in ("breadth", "depth"))


def test_a_release_names_the_models_that_it_compares(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's nomination of the cycle and its champion, from exposure to readout."""
    week = "2026-W45"
    model = Model(stage="dpo", key="a" * 32, output="model", sha256="0" * 64)
    ledger_on(monkeypatch, day(0))
    ledger.append(Store(cycle.uri).storage, lambda _: Change("nominate", model, week, "the gate", "x", "gate/x"))
    cycle.run(INGEST, week, ingest={"days": 8})
    sections = {"expose": {"experiments": [{"arms": HALF["arms"]}]}}
    cycle.run(expose.STAGE, week, **sections)
    made = cycle.run(readout.STAGE, week, **sections)
    expected = {"artifact": f"dpo/{'a' * 32}", "path": model.path(cycle.uri), "sha256": "0" * 64}
    assert made.json("readout")["candidate"] == expected
    assert made.json("readout")["champion"] == "the base policy"
    text = made.file("report", "readout.txt").decode()
    assert f"candidate: dpo/{'a' * 32}\nchampion: the base policy\n" in text


def test_an_experiment_never_changes_the_model_behind_its_arm(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither within its week nor in a later one, nor by a refusal; a new name starts anew."""
    week, storage = "2026-W45", Store(cycle.uri).storage
    models = [Model(stage="dpo", key=digit * 32, output="model", sha256=digit * 64) for digit in "ab"]

    def nominate(model: Model) -> None:
        ledger.append(storage, lambda _: Change("nominate", model, week, "the gate", "x", f"gate/{model.key}"))

    ledger_on(monkeypatch, day(0))
    nominate(models[0])
    cycle.run(INGEST, week, ingest={"days": 2})
    cycle.run(expose.STAGE, week)
    kept = {"experiments": [{"name": f"release-{week}"}]}
    cycle.run(INGEST, "2026-W46", ingest={"days": 3})
    cycle.run(expose.STAGE, "2026-W46", expose=kept)
    nominate(models[1])
    cycle.run(INGEST, week, ingest={"days": 4})
    with pytest.raises(InputError, match=f"exposed its users to dpo/{'a' * 32}, and the candidate is now dpo/b"):
        cycle.run(expose.STAGE, week)
    cycle.run(INGEST, "2026-W47", ingest={"days": 4})
    with pytest.raises(InputError, match="start an experiment under a new name"):
        cycle.run(expose.STAGE, "2026-W47", expose=kept)
    ledger.append(storage, lambda _: Change("refuse", models[1], week, "the gate", "x", "gate/c"))
    with pytest.raises(InputError, match="the candidate is now refused"):
        cycle.run(expose.STAGE, "2026-W47", expose=kept)
    cycle.run(expose.STAGE, "2026-W47")


def readings(cycle: Cycle, **sections: Any) -> dict[str, dict[str, Any]]:
    """One readout of the same exposures with the layout that expose wrote, and one without."""
    found = {}
    for name, written in (("layout", True), ("raw", False)):
        told = sections | {"expose": sections.get("expose", {}) | {"layout": written}}
        cycle.run(expose.STAGE, **told)
        found[name] = cycle.run(readout.STAGE, **told).json("readout")
        assert found[name]["status"] == "closed", found[name]["problems"]
    return found


def test_the_readout_reads_the_layout_that_expose_wrote(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle.run(INGEST, ingest={"days": 8})
    used = []
    monkeypatch.setattr("flywheel_tasks.release.read.layout_of", lambda *p: used.append(layout_of(*p)) or used[-1])
    other = {"name": "y", "slice_from": 0.5, "arms": HALF["arms"]}
    found = readings(
        cycle,
        expose={"experiments": [HALF | {"slice_to": 0.5}, other]},
        readout={"experiment": "y", "segments": ["locale"], "days": 7, "start": str(day(0))},
    )
    assert [stamp is not None for stamp in used] == [True, False]
    rows = [reading.pop("rows") for reading in found.values()]
    assert rows[0]["units"] == rows[1]["units"] > 1000
    assert found["layout"] == found["raw"]


def test_a_layout_of_purged_or_other_activity_is_not_read(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows have no names, so a purge can't find them: the log and the activity, which it can, are read instead."""
    sections = {"expose": {"experiments": [HALF]}}
    cycle.run(INGEST, ingest={"days": 8})
    log = exposures(cycle.run(expose.STAGE, **sections))
    before = cycle.run(readout.STAGE, **sections).json("readout")["rows"]["units"]
    monkeypatch.setattr(ids, "pseudonym", lambda user, secret: log[0]["unit_id"])
    report = forget(Store(cycle.uri), "somebody", b"k" * 32)
    assert report["clean"]
    after = cycle.run(readout.STAGE, readout={"alpha": 0.04}, **sections).json("readout")["rows"]
    assert after["units"] == before - 1
    assert "unit not exposed" in after or after["exposure rows"] == len(log) - 1


def test_a_forgotten_users_days_are_in_no_layout_and_in_no_tracking(
    cycle: Cycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its units stand in the order of the log, so the place of a row that is gone from there would name the person."""
    cycle.run(INGEST, ingest={"days": 8, "units": 300})
    made = cycle.run(expose.STAGE, expose={"experiments": [HALF]})
    assert made.manifest.outputs["layout"].files
    unit = exposures(made)[7]["unit_id"]
    monkeypatch.setattr(ids, "pseudonym", lambda user, secret: unit)
    assert forget(Store(cycle.uri), "somebody", b"k" * 32)["clean"]
    assert not [path for path in cycle.folder.rglob("*") if "/layout/" in str(path) and path.is_file()]
    assert not list((cycle.folder / "mlflow-files").rglob("*.parquet"))


def test_unequal_arms_are_checked_against_the_shares_that_expose_drew(cycle: Cycle) -> None:
    sections = {"expose": {"experiments": [HALF | {"arms": {"test": 0.1, "control": 0.5}}]}}
    cycle.run(INGEST, ingest={"days": 8})
    cycle.run(expose.STAGE, **sections)
    found = cycle.run(readout.STAGE, **sections).json("readout")
    assert found["status"] == "closed", found["problems"]
    assert found["sample_ratio"]["expected"]["control"] == pytest.approx(5 * found["sample_ratio"]["expected"]["test"])
    wrong = {"readout": {"allocation": {"test": 1, "control": 1}}}
    refused = cycle.run(readout.STAGE, **sections, **wrong).json("readout")
    assert refused["status"] == "refused"
    assert "readout.allocation" in refused["problems"][0]


@pytest.mark.parametrize("later", [{"test": 0.4, "control": 0.2}, {"test": 0.1, "control": 0.5}], ids=["more", "less"])
def test_resized_arms_are_checked_by_the_units_that_no_resizing_moved(cycle: Cycle, later: dict[str, float]) -> None:
    """Old users of places that test gained come in at once, those of places that it lost stay: the log has neither
    week's shares."""
    before, sizes = {"test": 0.2, "control": 0.2}, {"W45": 6000, "W46": 12000}
    if later["control"] > 0.2:
        before = {"test": 0.4, "control": 0.5}
    for week, arms in (("2026-W45", before), ("2026-W46", later)):
        sections = {
            "expose": {"experiments": [HALF | {"arms": arms}]},
            "ingest": {"days": 9, "units": sizes[week[-3:]]},
        }
        cycle.run(INGEST, week, **sections)
        drawn = cycle.run(expose.STAGE, week, **sections).json("report")["x"]
    assert drawn["history"] == [before, later]
    least = {arm: min(before[arm], later[arm]) for arm in later}
    counts = drawn["stayed"]["units"]
    assert drawn["stayed"]["shares"] == least
    assert sample_ratio(counts, least).p > 1e-4
    for shares in [before] + [later] * (later["control"] > 0.2):
        assert sample_ratio(drawn["units"], shares).p < 5e-4
    found = cycle.run(readout.STAGE, "2026-W46", **sections).json("readout")
    assert found["status"] == "closed", found["problems"]
    assert found["sample_ratio"]["observed"] == counts
    assert any("resized" in warning for warning in found["warnings"])


def test_the_store_knows_the_locale_of_a_unit(cycle: Cycle) -> None:
    """The usual one, at the first exposure; a unit without a conversation stays in a segment of its own."""
    sections = {"expose": {"experiments": [HALF]}, "readout": {"segments": ["locale"]}}
    cycle.run(INGEST, ingest={"days": 8})
    log = exposures(cycle.run(expose.STAGE, **sections))
    assert all(row["locale"] == (None if int(row["unit_id"], 16) % 3 else "pt") for row in log)
    found = cycle.run(readout.STAGE, **sections).json("readout")
    of_locale = {c["segment"]: c["test"]["n"] for c in found["segments"] if c["metric"] == "breadth"}
    assert set(of_locale) == {"locale=pt", "locale=(none)"}
    assert sum(of_locale.values()) == found["arms"]["test"]["breadth"]["n"]


def test_moving_a_slice_moves_no_unit_into_a_second_experiment_of_its_layer(cycle: Cycle) -> None:
    whole, half = {"name": "a", "arms": HALF["arms"]}, {"name": "b", "slice_from": 0.5, "arms": HALF["arms"]}
    cycle.run(INGEST)
    first = exposures(cycle.run(expose.STAGE, expose={"experiments": [whole]}))
    cycle.run(INGEST, "2026-W46", ingest={"units": 6000})
    both = [whole | {"slice_to": 0.5}, half]
    log = exposures(cycle.run(expose.STAGE, "2026-W46", expose={"experiments": both}))
    mine = {name: {row["unit_id"] for row in log if row["experiment"] == name} for name in "ab"}
    assert mine["a"] >= {row["unit_id"] for row in first}
    assert len(mine["b"]) > 1000
    assert not mine["a"] & mine["b"]


def test_files_of_another_platform_are_read_beside_the_store(cycle: Cycle, tmp_path: Path) -> None:
    """A team that assigns units elsewhere names its own exposures and activity."""
    cycle.run(INGEST, ingest={"days": 0, "units": 2})
    cycle.run(expose.STAGE)
    found_exposures, found_activity = write(tmp_path / "platform", *world(1, text=True), 2)
    outside = {"exposures": [found_exposures], "activity": [found_activity], "start": str(day(0))}
    found = cycle.run(readout.STAGE, readout=outside).json("readout")
    assert (found["status"], found["rows"]["units"]) == ("closed", 400)


def test_a_readout_without_anything_to_read_says_so(cycle: Cycle) -> None:
    cycle.run(INGEST, ingest={"days": 0})
    cycle.run(expose.STAGE)
    with pytest.raises(InputError, match="nothing to read"):
        cycle.run(readout.STAGE)


def test_the_stages_declare_sound_names() -> None:
    for stage in (expose.STAGE, readout.STAGE):
        assert ids.name(stage.name, "stage") == stage.name
        assert stage.doc
        assert stage.phase == "release"
