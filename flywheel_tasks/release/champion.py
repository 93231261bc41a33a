"""The champion changes only after a positive readout, and goes back with one command (Sec. 2.5.2, 2.6).

    nominate   a gate's PASS, or its HOLD and a person's approval: the cycle's candidate, ready for its A/B arm
    refuse     a gate's BLOCK, a rejected HOLD, or a HOLD that nobody decided in time
    crown      a closed readout of the candidate's experiment that says ship
    rollback   the champion before this one reigns again

Each happens once, however often and from wherever it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from flywheel_tasks.core import ids
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.core.store import Artifact, Store
from flywheel_tasks.release.ledger import Change, Entry, Model, State, append, read, title

EXPERIMENT = "release-"
"""An experiment that tests a cycle's candidate is called release-CYCLE; `expose` names it so."""
ARM = "test"

Answer = Literal["approve", "reject", "timeout"]


def champion(store: Store) -> Model | None:
    """The policy in production; None is the base policy of the configuration."""
    return read(store.storage).champion


def model_of(store: Store, stage: str, key: str, output: str) -> Model:
    """A checkpoint of the store as the ledger names it."""
    record = store.get(stage, key).manifest.outputs.get(output)
    if record is None or record.contract not in ("checkpoint", "checkpoints"):
        raise InputError(f"{stage}/{key} has no checkpoint '{output}'")
    return Model(stage=stage, key=key, output=output, sha256=record.sha256)


def answered_as(responses: Artifact, name: str) -> Model | None:
    """The checkpoint that answered the evaluation prompts as `name`; None where it is not of the store."""
    record = responses.manifest.inputs.get(name)
    return model_of(Store(responses.storage.uri), record.stage, record.key, record.output) if record else None


def conclude(store: Store, gate: Artifact, model: Model | None, max_age_days: float = 14) -> Entry | None:
    """What follows from a gate's decision without a person: PASS nominates, BLOCK refuses, HOLD leaves all as it is."""
    decision = gate.json("decision")
    verdict = decision.get("decision")
    if verdict == "HOLD":
        return None
    if verdict != "PASS":
        return _once(store, gate, "refuse", model, "the gate", "; ".join(decision.get("reasons", [])) or "BLOCK")
    _same_candidate(decision, model)
    _fresh(gate, max_age_days)
    return _once(store, gate, "nominate", model, "the gate", "every rule passes")


def answer(
    store: Store, gate: Artifact, model: Model | None, said: Answer, by: str, why: str, max_age_days: float = 14
) -> Entry:
    """A person's answer to a HOLD, or that none came in time. The first answer stands; another one is refused."""
    decision = gate.json("decision")
    if decision.get("decision") != "HOLD":
        raise InputError(f"{_name(gate)} decided {decision.get('decision')}: only a HOLD waits for an answer")
    if said == "approve":
        _same_candidate(decision, model)
        _fresh(gate, max_age_days)
        if not why.strip():
            raise InputError("an approval says why: give a reason")
    action: Literal["nominate", "refuse"] = "nominate" if said == "approve" else "refuse"
    text = why.strip() or {"reject": "rejected without a reason", "timeout": "nobody answered in time"}.get(said, "")
    made = _once(store, gate, action, model, by, text)
    if made:
        return made
    state = read(store.storage)
    first = state.find("nominate", _name(gate)) or state.find("refuse", _name(gate))
    if first is None or first.action != action:
        raise InputError(
            f"{_name(gate)} was answered before: {first.action if first else '?'} by {first.by if first else '?'}"
        )
    return first


def crown(store: Store, readout: Artifact, by: str = "the readout") -> Entry | None:
    """The candidate becomes champion where its closed readout says ship; else nothing changes and None is returned.

    A readout counts once: what was rolled back is not crowned again by the same numbers. It crowns the model that its
    test arm was served, and no other, over the champion that its control arm was served in all of its window.
    """
    found: Mapping[str, Any] = readout.json("readout")
    experiment = str(found.get("experiment") or "")
    if not experiment.startswith(EXPERIMENT):
        return None
    cycle = ids.cycle_id(experiment.removeprefix(EXPERIMENT))
    ship = [d for d in found.get("decisions", []) if d["arm"] == ARM and d["verdict"] == "ship"]
    if found.get("status") != "closed" or found.get("problems") or len(ship) != 1:
        return None

    def decide(state: State) -> Change | None:
        nominated = state.nomination(cycle)
        if nominated is None or nominated.model is None:
            raise InputError(f"{experiment} shipped, but no candidate of {cycle} was nominated: nothing to crown")
        because = _name(readout)
        tested = found.get("candidate") or {}
        if tested.get("sha256") != nominated.model.sha256:
            raise InputError(
                f"{because} tested {tested.get('artifact') or 'a model that it does not name'}, "
                f"the candidate of {cycle} is {nominated.model}: expose the candidate and read its own experiment"
            )
        crowned = [e for e in state.entries if e.action == "crown"]
        if any((e.cycle, e.model) == (cycle, nominated.model) or e.because == because for e in crowned):
            return None
        _fair(because, found, state, nominated)
        return Change("crown", nominated.model, cycle, by, "; ".join(ship[0]["reasons"])[:4000], because)

    return append(store.storage, decide)


def rollback(store: Store, by: str, why: str, expected: str | None = None) -> Entry:
    """The champion before this one reigns again.

    Two people who see the same trouble must not go back twice, so a rollback right after a rollback has to name the
    champion (STAGE/KEY) that it removes.
    """
    if not why.strip():
        raise InputError("a rollback says why: give a reason")

    def decide(state: State) -> Change:
        if expected is not None and str(state.champion) != expected:
            raise InputError(f"the champion is {title(state.champion)}, not {expected}: nothing was changed")
        if state.champion is None:
            raise InputError("there is no champion to roll back: the base policy is in production")
        last = next(e for e in reversed(state.entries) if e.action in ("crown", "rollback"))
        if last.action == "rollback" and expected is None:
            raise InputError(
                f"{last.by} rolled back at {last.at:%Y-%m-%d %H:%M} UTC: to go back further, name the champion that "
                f"reigns now ({state.champion})"
            )
        reason = next(e for e in reversed(state.entries) if e.action == "crown" and e.model == state.champion)
        return Change("rollback", state.champions[-2], reason.cycle, by, why.strip(), reason.because)

    made = append(store.storage, decide)
    if made is None:
        raise InputError("nothing was rolled back")
    return made


def _once(
    store: Store, gate: Artifact, action: Literal["nominate", "refuse"], model: Model | None, by: str, why: str
) -> Entry | None:
    """One conclusion for each gate decision, whoever comes first."""
    because = _name(gate)

    def decide(state: State) -> Change | None:
        if state.find("nominate", because) or state.find("refuse", because):
            return None
        return Change(action, model, gate.manifest.cycle, by, why[:4000], because)

    return append(store.storage, decide)


def _name(artifact: Artifact) -> str:
    return f"{artifact.manifest.stage}/{artifact.manifest.key}"


def _same_candidate(decision: Mapping[str, Any], model: Model | None) -> None:
    if model is None or decision.get("candidate") != str(model):
        decided = decision.get("candidate") or "an unnamed model"
        raise InputError(f"the gate decided on {decided}, not on {model or 'a model of the store'}")


def _fair(because: str, readout: Mapping[str, Any], state: State, nominated: Entry) -> None:
    """In its window the test arm had the candidate, and control today's champion and no other."""
    first, since = date.fromisoformat(readout["window"]["first"]), nominated.at.date()
    if first < since:
        raise InputError(
            f"{because} reads from {first} on, and {nominated.model} was nominated on {since}: nobody met it earlier, "
            f"so set readout.start to {since} or later and read again"
        )
    served = [readout.get("champion") or "a model that it does not name", *map(title, state.reigned(nominated, first))]
    if set(served) != {title(state.champion)}:
        raise InputError(
            f"control of {because} was served {' and '.join(dict.fromkeys(served))}, the champion is "
            f"{title(state.champion)}: read a week that began after the last change of champion (readout.start)"
        )


def _fresh(gate: Artifact, max_age_days: float) -> None:
    age = datetime.now(UTC) - gate.manifest.finished
    if age > timedelta(days=max_age_days):
        raise InputError(f"{_name(gate)} is {age.days} days old: measure again before promoting on it")
