"""MLflow's registry follows the ledger: one registered model, its versions the nominated checkpoints, two aliases.

A registry that is down or behind is brought up by the next call; it never decides anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.core.store import Store
from flywheel_tasks.release.ledger import Model, State, read

NAME = "character-flywheel"
CHAMPION, CANDIDATE = "champion", "candidate"
_ILLEGAL = re.compile(r"[^\w .:/-]")
_TRIES = 16
_KEY, _OUTPUT = "artifact_key", "output"


def follow(store: Store, uri: str) -> dict[str, str | None]:
    """Make the registry say what the ledger says; returns the version behind each alias."""
    import mlflow
    from mlflow.exceptions import MlflowException

    # A registry in a database looks a version's models:/ source up under the process's URI, not under its client's.
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.create_registered_model(
            NAME, description="Policies that the gate let through; aliases follow the ledger."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for _ in range(_TRIES):
        state = read(store.storage)
        found = _follow(client, store, state)
        # Whoever changed the ledger meanwhile may have pointed before us, at what came after.
        if read(store.storage).entries == state.entries:
            return found
    raise FlywheelError(f"the ledger changed {_TRIES} times while the registry followed: run `champion --sync` again")


def _follow(client: Any, store: Store, state: State) -> dict[str, str | None]:
    nominated = {str(e.model): e.model for e in state.entries if e.action == "nominate" and e.model}
    versions = {name: _version(client, store, model, state) for name, model in nominated.items()}
    found: dict[str, str | None] = {}
    for alias, model in ((CHAMPION, state.champion), (CANDIDATE, state.candidate)):
        version = versions.get(str(model)) if model else None
        _point(client, alias, version)
        found[alias] = version
    return found


def publish(store: Store, uri: str, cycle: str) -> bool:
    """Put everything that was measured of a cycle's candidate onto its logged model, where checkpoints are compared:
    win-rates, metrics, benchmarks, the A/B lifts once they are read, the gate's decision and the lineage."""
    from flywheel_tasks.evaluation.history import of_cycle
    from flywheel_tasks.release.champion import EXPERIMENT, answered_as

    responses = store.pointed(cycle, "respond")
    model = answered_as(responses, CANDIDATE) if responses else None
    if model is None:
        return False
    found = of_cycle(store, cycle)
    metrics = {name: number.value for name, number in found.numbers.items()}
    for name, number in found.numbers.items():
        metrics |= {f"{name}.{end}": x for end, x in (("low", number.low), ("high", number.high)) if x is not None}
    tags = {"cycle": cycle, "gate": found.decision or "none", "champion": found.champion or "none"}
    tags |= {"experiment": f"{EXPERIMENT}{cycle}", "reasons": "; ".join(found.reasons)[:4000] or "none"}
    for stage in ("respond", "winrate", "metrics", "benchmarks", "gate"):
        if artifact := store.pointed(cycle, stage):
            tags[f"artifact.{stage}"] = artifact.uri
    return link(store, uri, model, metrics, tags)


def link(store: Store, uri: str, model: Model, metrics: Mapping[str, float], tags: Mapping[str, str]) -> bool:
    """Write numbers and tags onto a checkpoint's logged model; False where tracking does not know it."""
    import time

    import mlflow
    from mlflow.entities import Metric

    client = mlflow.MlflowClient(tracking_uri=uri)
    model_id = _logged_model(client, store, model)
    if model_id is None:
        return False
    client.set_logged_model_tags(model_id, dict(tags))
    run_id, now = client.get_logged_model(model_id).source_run_id, int(time.time() * 1000)
    named = [Metric(_ILLEGAL.sub("_", name)[:250], value, now, 0, model_id=model_id) for name, value in metrics.items()]
    for start in range(0, len(named) if run_id else 0, 900):
        client.log_batch(run_id, named[start : start + 900])
    return True


def _version(client: Any, store: Store, model: Model, state: State) -> str:
    """The registered version of a checkpoint, made where there is none."""
    for version in client.search_model_versions(f"name='{NAME}'"):
        if version.tags.get(_KEY) == model.key and version.tags.get(_OUTPUT) == model.output:
            return str(version.version)
    entry = next(e for e in state.entries if e.action == "nominate" and e.model == model)
    model_id = _logged_model(client, store, model)
    made = client.create_model_version(
        NAME,
        source=f"models:/{model_id}" if model_id else model.path(store.uri),
        tags={
            _KEY: model.key, _OUTPUT: model.output, "stage": model.stage, "sha256": model.sha256, "cycle": entry.cycle,
            "uri": store.uri_of(model.stage, model.key), "gate": entry.because, "by": entry.by,
        },
        description=entry.why[:1000],
    )  # fmt: skip
    return str(made.version)


def _logged_model(client: Any, store: Store, model: Model) -> str | None:
    from flywheel_tasks.core.tracking import EXPERIMENT

    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    wanted = store.uri_of(model.stage, model.key)
    found = client.search_logged_models([experiment.experiment_id], filter_string=f"tags.sha256 = '{model.sha256}'")
    return next((str(m.model_id) for m in found if m.tags.get("uri") == wanted), None)


def _point(client: Any, alias: str, version: str | None) -> None:
    from mlflow.exceptions import MlflowException

    if version is not None:
        client.set_registered_model_alias(NAME, alias, version)
        return
    try:
        client.delete_registered_model_alias(NAME, alias)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
