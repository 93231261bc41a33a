"""What all launchers share: a stage's command line, its parameters, its docs, and the DAG around it.

A launcher is one file `launch_<mode>.py` with a class `Launcher(StageOperator)` that says how a command line is
run; the environment variable FLYWHEEL_LAUNCHER names the mode (default: local). All of them behave alike: the manifest
decides success, bad input is not tried again, every other try is a new attempt, and a cancelled task leaves nothing
running.
"""

from __future__ import annotations

import importlib
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import deployment
from airflow.sdk import DAG, BaseOperator, Param, TaskGroup
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from flywheel_tasks.core.config import PROFILES, FlywheelConfig
from flywheel_tasks.core.errors import ConfigError, InputError
from flywheel_tasks.core.ids import cycle_of
from flywheel_tasks.core.stage import PHASES, Stage
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.pipeline import load_config
from flywheel_tasks.release.due import due

CYCLE = r"^(\d{4}-W(0[1-9]|[1-4]\d|5[0-3]))?$"
OVERRIDE = r"^[A-Za-z][\w-]*(\.[\w-]+)*="
LAUNCHERS = ("local", "docker", "kubernetes")
"""Ray's is the Kubernetes one's, for stages that span nodes."""
INGEST = "ingest"
HELD_BY = "promote"
"""The stage after which a person may have to decide."""
REVIEWED_BY, SENT_BY = "annotate-import", "annotate-export"
"""Between these two, people review."""
BAD_INPUT = 2
LONGEST_LINE = 4_000
MANIFEST_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\x00-\x1f]+/manifest\.json")


class StageOperator(BaseOperator):
    """Runs one stage as `flywheel run`; the manifest's URI is its only XCom.

    Nothing here is a template and nothing reaches a shell: what a person typed into the trigger form travels as
    one element of an argument list.
    """

    def __init__(
        self, *, stage: Stage, upstream: Sequence[str], settled_days: int = 0, as_of: str = "", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.stage_name = stage.name
        self.uses_user_key = stage.uses_user_key
        self.upstream_stages = list(upstream)
        self.settled_days = settled_days
        self.as_of = as_of
        self.reads_ingest = any(wanted.stage == INGEST for wanted in stage.inputs.values())

    def execute(self, context: Mapping[str, Any]) -> str:
        params, ti = context["params"], context["ti"]
        if self.stage_name in (params.get("skip") or ()):
            raise AirflowSkipException(
                f"{self.stage_name} is skipped: later stages use what this cycle has in the store"
            )
        found = {stage: ti.xcom_pull(task_ids=stage) for stage in self.upstream_stages}
        cycle, ingest = self.due(context)
        if ingest and self.reads_ingest:
            found[INGEST] = ingest.uri
        settings = [*self.derived_settings(context, ingest), *(params.get("overrides") or ())]
        arguments = stage_arguments(self.stage_name, cycle, {**params, "overrides": settings}, found)
        uri = self.launch(arguments, context)
        if not MANIFEST_URI.fullmatch(uri):
            raise AirflowFailException(
                f"{self.stage_name} ended without printing its manifest's URI (got {uri[:200]!r})"
            )
        self.log.info("artifact: %s", uri)
        return uri

    def due(self, context: Mapping[str, Any]) -> tuple[str, Artifact | None]:
        """What was typed, or the ISO week of the run; for the readout the release to be read, and the ingest it reads:
        the newest, or that of the cycle that was typed."""
        typed = context["params"]["cycle"]
        if typed and not self.as_of:
            return typed, None
        settled = day_of(context) - timedelta(days=self.settled_days)
        if not self.as_of:
            return cycle_of(settled), None
        try:
            config = config_of(context)
            if typed:
                return typed, Store(config.store.uri).pointed(typed, INGEST)
            window = config.stages[self.as_of.partition(".")[0]]
            return due(Store(config.store.uri), settled, window.days + window.settle_days)  # type: ignore[attr-defined]
        except InputError as error:
            raise AirflowFailException(f"{self.stage_name}: {error}") from error

    def derived_settings(self, context: Mapping[str, Any], ingest: Artifact | None = None) -> list[str]:
        """The deployment's store, the day before which data is complete; what a person typed comes after and wins."""
        stage, _, _ = self.as_of.partition(".")
        if stage != self.stage_name:
            return deployment.overrides()
        complete = day_of(context) - timedelta(days=self.settled_days - 1)
        if ingest and not config_of(context).stages[stage].activity:  # type: ignore[attr-defined]
            complete = min(complete, ingest.manifest.started.date())
        return [*deployment.overrides(), f"{self.as_of}={complete}"]

    @classmethod
    def for_stage(cls, stage: Stage) -> type[StageOperator]:
        """The operator that runs this stage in this mode."""
        return cls

    @staticmethod
    def placement(stage: Stage) -> dict[str, Any]:
        """Airflow settings that follow from what the stage asks of the machine. The deadline holds wherever it runs."""
        return {"execution_timeout": timedelta(hours=deployment.load().deadline_hours)}

    @abstractmethod
    def launch(self, arguments: Sequence[str], context: Mapping[str, Any]) -> str:
        """Run `flywheel` with these arguments, log its stderr, return the last line of its stdout."""


def config_of(context: Mapping[str, Any]) -> FlywheelConfig:
    """The configuration of a run, as its stages see it."""
    params = context["params"]
    return load_config(params["profile"], None, [*deployment.overrides(), *(params.get("overrides") or ())])


def slots(stage: Stage) -> int:
    """Of Airflow's pool, which `flywheel up` makes as large as the machine has cores: two stages that fill the machine
    wait for each other, and so do two that use its GPUs, because nothing else divides those between them."""
    cores = os.cpu_count() or 1
    return cores if stage.resources.gpus else max(1, min(round(stage.resources.cpus), cores))


def day_of(context: Mapping[str, Any]) -> date:
    """The day on which the run is due."""
    run = context["dag_run"]
    due = run.logical_date or run.run_after
    return date(due.year, due.month, due.day)


def stage_arguments(stage: str, cycle: str, params: Mapping[str, Any], upstream: Mapping[str, str | None]) -> list[str]:
    """The arguments of `flywheel` for one stage of one run."""
    arguments = ["run", stage, "--cycle", cycle, "--profile", params["profile"]]
    for override in params.get("overrides") or ():
        arguments += ["--set", override]
    for name, uri in upstream.items():
        if uri:
            arguments += ["--input", f"{name}={uri}"]
    return arguments


def build(dag: DAG, stages: Sequence[Stage], *, settled_days: int = 0, as_of: str = "") -> None:
    """Fill a DAG with one task per stage: groups are the phases, edges are the declared inputs.

    `as_of` is the setting that takes the day before which data is complete when a run is due; a DAG that has one reads
    the release that is due.
    """
    mode = launcher_of(os.environ.get("FLYWHEEL_LAUNCHER", "local"))
    edges = {stage.name: upstream_in(stage, stages) for stage in stages}
    tasks: dict[str, StageOperator] = {}
    for phase in PHASES:
        members = [stage for stage in stages if stage.phase == phase]
        if not members:
            continue
        with TaskGroup(group_id=phase, dag=dag, prefix_group_id=False):
            for stage in members:
                launcher = mode.for_stage(stage)
                tasks[stage.name] = launcher(
                    task_id=stage.name,
                    stage=stage,
                    upstream=edges[stage.name],
                    settled_days=settled_days,
                    as_of=as_of,
                    doc_md=documentation(stage),
                    # A skipped stage does not stop the loop; a failed one does.
                    trigger_rule="none_failed",
                    **launcher.placement(stage),
                )
    for name, upstream in edges.items():
        for other in upstream:
            tasks[other] >> tasks[name]
    if {REVIEWED_BY, SENT_BY} <= tasks.keys():
        from reviews import AwaitReviews
        from reviews import __doc__ as reviews_page

        # It never fails, so the import needs no rule that would also let it run after a failed export.
        wait = AwaitReviews(
            task_id="await-reviews",
            task_group=tasks[REVIEWED_BY].task_group,
            after=SENT_BY,
            before=REVIEWED_BY,
            trigger_rule="none_failed",
            doc_md=reviews_page,
        )
        tasks[SENT_BY] >> wait >> tasks[REVIEWED_BY]
    if HELD_BY in tasks:
        from approval import Approval, form
        from approval import __doc__ as approval_page

        # Skipped unless the gate said HOLD; an answer that cannot be taken is asked for again.
        ask = Approval(
            task_id="approve", dag=dag, after=HELD_BY, params=form(), retry_delay=timedelta(0), doc_md=approval_page
        )
        tasks[HELD_BY] >> ask


def launcher_of(mode: str) -> type[StageOperator]:
    """The launcher called `mode`."""
    if mode not in LAUNCHERS:
        raise ConfigError(f"FLYWHEEL_LAUNCHER='{mode}': the launchers are {', '.join(LAUNCHERS)}")
    launcher: type[StageOperator] = importlib.import_module(f"launch_{mode}").Launcher
    return launcher


def failure(stage: str, code: int | None, how: str = "") -> AirflowException:
    """The error of a stage that left no artifact: final where another try would end the same way."""
    if code == BAD_INPUT:
        return AirflowFailException(f"{stage}: bad input, see the line above; not tried again")
    if code == 0:
        return AirflowFailException(f"{stage} ended well but left no manifest: does its store differ from Airflow's?")
    return AirflowException(f"{stage} {how or f'failed with exit code {code}'}")


def printable(line: bytes) -> str:
    """A log line that can't move the cursor, forge another line, or fill the disk."""
    text = "".join(c if c.isprintable() or c == "\t" else "�" for c in line.decode(errors="replace").rstrip())
    return (
        text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} … {len(text) - LONGEST_LINE:,} characters more"
    )


def upstream_in(stage: Stage, stages: Sequence[Stage]) -> list[str]:
    """The stages of the same DAG whose artifact of this same cycle the stage reads, in declared order."""
    here = {other.name for other in stages}
    return list(dict.fromkeys(i.stage for i in stage.inputs.values() if not i.previous and i.stage in here))


def documentation(stage: Stage) -> str:
    """The task's page in the UI, from the declaration alone."""
    reads = [
        f"`{i.stage}/{i.output}`{' of the cycle before' if i.previous else ''}{' (optional)' if i.optional else ''}"
        for i in stage.inputs.values()
    ] + [f"files named by `{stage.name}.{field}`" for field in stage.sources]
    writes = [f"`{name}` ({schema})" for name, schema in stage.outputs.items()]
    fields = {f"{stage.name}.{name}": field for name, field in stage.config.model_fields.items()}
    rows = [
        f"| `{key}` | `{_cell(field.get_default(call_default_factory=True))}` | {_cell(field.description or '')} |"
        for key, field in fields.items()
    ]
    settings = ["| setting | default | meaning |", "|---|---|---|", *rows] if rows else []
    parts = [
        stage.doc,
        f"**Paper** {stage.paper}",
        f"**Reads** {', '.join(reads) or 'nothing'}",
        f"**Writes** {', '.join(writes)}",
    ]
    return "\n\n".join([*parts, "\n".join(settings)]).strip()


def parameters(stages: Sequence[Stage]) -> dict[str, Param]:
    """The form of a manual trigger."""
    names = [stage.name for stage in stages]
    waiting: dict[str, Param] = {}
    if REVIEWED_BY in names:
        from reviews import form

        waiting = form()
    return {
        "cycle": Param(
            None,
            title="Cycle",
            description="ISO week such as 2026-W47. Empty: the week of this run.",
            type=["null", "string"],
            pattern=CYCLE,
        ),
        "profile": Param(
            os.environ.get("FLYWHEEL_PROFILE", "demo"),
            title="Profile",
            description="Size of the models and of the work.",
            type="string",
            enum=list(PROFILES),
        ),
        "overrides": Param(
            None,
            title="Settings",
            description="One KEY=VALUE per line, as after --set on the command line, for example: seed=7",
            type=["null", "array"],
            items={"type": "string", "pattern": OVERRIDE},
        ),
        "skip": Param(
            None,
            title="Stages to skip",
            description="Later stages then use what the store holds for this cycle.",
            type=["null", "array"],
            items={"type": "string", "enum": names},
            examples=names,
            uniqueItems=True,
        ),
        **waiting,
    }


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
