"""One Ray for a process: the cluster at RAY_ADDRESS, or a local one that listens on loopback with a token."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from flywheel_tasks.core.errors import FlywheelError, InputError

_OBJECT_STORE_BYTES = 256 << 20
_START_SECONDS, _TRIES = 90, 3
"""A raylet gives its agents 15 s to start, however busy the machine is, and else dies (ray-project/ray#65983), which
Ray sees as one that is slow: another try costs less than a longer wait."""
_HANG_SECONDS = 2 * _TRIES * _START_SECONDS
"""On a machine that is starved enough Ray's own connect waits for ever, in a call that nothing interrupts."""
_LEAN = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
"""For the workers of a small machine: give memory back instead of keeping pools; a fifth less in all, measured."""
_LATE = "timed out during startup"
_starting = threading.Lock()


CPUS_VARIABLE = "FLYWHEEL_CPUS"
"""What a launcher grants: a pod's request and a container's quota leave all cores of the node in sight."""


def cpus() -> int:
    """Cores this process may use."""
    return len(cores())


def cores() -> list[int]:
    """Their numbers, where threads are bound to them."""
    seen = sorted(os.sched_getaffinity(0))
    granted = os.environ.get(CPUS_VARIABLE, "")
    if granted and not (granted.isdecimal() and int(granted) > 0):
        raise InputError(f"{CPUS_VARIABLE}='{granted}': give a number of cores, 1 or more")
    return seen[: int(granted)] if granted else seen


def ensure() -> Any:
    """The `ray` module, connected. The first call starts or joins; later calls cost nothing. Replicas of an engine ask
    for it from several threads at once."""
    with _starting:
        return _ensure()


def _ensure() -> Any:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_raylet_start_wait_time_s", str(_START_SECONDS))
    import ray

    if ray.is_initialized():
        return ray
    with _own_sigterm():
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="WARNING")
        else:
            _stay_on_loopback()
            for name, value in _LEAN.items():
                os.environ.setdefault(name, value)
            _start(ray)
    return ray


def _start(ray: Any) -> None:
    """A Ray of this process, on loopback."""
    hung = threading.Timer(_HANG_SECONDS, _give_up)
    hung.daemon = True
    hung.start()
    try:
        _try(ray)
    finally:
        hung.cancel()


def _give_up() -> None:
    """End this process and what it started: a stage that hangs is a failure, which the scheduler tries again."""
    import psutil

    print(f"error: Ray did not start on this machine in {_HANG_SECONDS} s and can't be interrupted", file=sys.stderr)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def _try(ray: Any) -> None:
    for left in reversed(range(_TRIES)):
        try:
            ray.init(
                address="local",  # without it Ray joins whatever cluster somebody started on this machine
                num_cpus=cpus(),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address="127.0.0.1",
            )
            return
        except Exception as error:
            if _LATE not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise FlywheelError(
                    f"Ray did not start on this machine in {_TRIES} tries of {_START_SECONDS} s: give it less to do at "
                    "once and run the stage again (/tmp/ray/session_latest/logs/raylet.err says more)"
                ) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray's handler aborts the process on SIGTERM; ours unwinds it, so that a cancelled stage cleans up."""
    ours = signal.getsignal(signal.SIGTERM)
    yield
    if ours is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)


def _stay_on_loopback() -> None:
    """Ray rewrites 127.0.0.1 to the machine's own address, which would open its ports to the network."""
    from ray._private import services

    services.resolve_ip_for_localhost = lambda host: host
