"""Which policy a cycle works with: the champion of the moment its first stage asked, for all its stages (Sec. 3.5.2).

A readout may crown another champion in mid-week; a cycle that changed its policy half way would mix the traffic of one
model with samples of another.
"""

from __future__ import annotations

import json

from flywheel_tasks.core import ids
from flywheel_tasks.core.config import FlywheelConfig, ModelConfig, model_roles
from flywheel_tasks.core.store import Store
from flywheel_tasks.release.champion import champion
from flywheel_tasks.release.ledger import Model


def policy_of(store: Store, cycle: str) -> Model | None:
    """The champion that this cycle started with; None is the base policy of the configuration."""
    path = f"champion/cycles/{ids.cycle_id(cycle)}.json"
    known = store.storage.read(path)
    if known is None:
        reigning = champion(store)
        body = json.dumps({"champion": reigning.model_dump() if reigning else None})
        store.storage.put_new(path, body.encode())
        known = store.storage.read(path) or b"{}"
    found = json.loads(known).get("champion")
    return Model.model_validate(found) if found else None


def for_stage(config: FlywheelConfig, stage: str, store: Store, cycle: str) -> FlywheelConfig:
    """The configuration with the cycle's policy where the stage would use the first one. A stage that uses none does
    not ask who reigns, so it does not settle it either."""
    used = config.stages[stage]
    base = config.models.policy
    fields = [f for f, role in model_roles(type(used)).items() if role == "policy" and getattr(used, f) == base]
    reigning = policy_of(store, cycle) if fields else None
    if reigning is None:
        return config
    policy = ModelConfig(path=reigning.path(store.uri), tensor_parallel=base.tensor_parallel)
    return config.model_copy(
        update={
            "models": config.models.model_copy(update={"policy": policy}),
            "stages": config.stages | {stage: used.model_copy(update=dict.fromkeys(fields, policy))},
        }
    )
