"""The way to one engine: a child process on this machine, or a Ray actor anywhere on a cluster.

Both take an order as bytes and give an answer as bytes within a deadline, or raise `EngineLost`; nothing is pickled
and nothing listens. On one machine a child process starts in the time vLLM needs; a Ray for a single engine would
add ten seconds and half a GiB.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection
from typing import Any, Protocol

from flywheel_tasks.compute import session
from flywheel_tasks.models import engine_wire as wire

_LOG_TAIL = 4096
_ENDING_SECONDS = 5


class EngineLost(Exception):
    """The engine is dead or silent; whatever it had in work has to be done again by another one."""


class Link(Protocol):
    def call(self, order: wire.Order, seconds: float) -> wire.Answer: ...

    def kill(self) -> None: ...


def environment(cpus: list[int]) -> dict[str, str]:
    """What vLLM reads before it is imported. `cpus` are the cores of an engine without a GPU: left alone it binds to
    one core of two, which halves its speed."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The ranks of one engine are on one machine; gloo would otherwise listen wherever the host's name points.
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cpus))),
    }


class ProcessLink:
    """An engine in a child process, spoken to over a socket pair that nobody else can reach."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile(prefix="flywheel-engine-")  # noqa: SIM115  # closes with the link
        command = [sys.executable, "-m", "flywheel_tasks.models.engine_worker", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment(session.cores())},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._connection = Connection(os.dup(self._socket.fileno()))

    def call(self, order: wire.Order, seconds: float) -> wire.Answer:
        """An engine that stops reading, or stops in the middle of its answer, would hold this thread for ever: past the
        deadline of the whole exchange it is killed, which ends the socket at both sides."""
        silent = threading.Event()

        def end() -> None:
            silent.set()
            self.kill()

        late = threading.Timer(min(max(seconds, 0), threading.TIMEOUT_MAX), end)
        late.daemon = True
        late.start()
        try:
            self._connection.send_bytes(wire.encode(order))
            return wire.answer(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            if silent.is_set():
                raise EngineLost(f"it was silent for {seconds:.0f} s") from error
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_ENDING_SECONDS)
            ending = _ending(self._process.returncode)
            raise EngineLost(f"its process ended with {ending}{self._last_words()}") from error
        finally:
            late.cancel()

    def kill(self) -> None:
        """Safe while another thread waits in `call`: that one finds the socket ended, even if the process hangs in a
        driver where no signal reaches it. It closes with the link."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_SECONDS)

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


class RayLink:
    """An engine as a Ray actor with the GPUs of one replica."""

    def __init__(self, tensor_parallel: int) -> None:
        self._ray = session.ensure()
        gpus = tensor_parallel if self._ray.cluster_resources().get("GPU", 0) else 0
        actor = self._ray.remote(EngineActor).options(
            # On one machine learners and engines work in turn, and the learners ask for all cores.
            num_cpus=1 if os.environ.get("RAY_ADDRESS") else 0,
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment(session.cores())},
        )
        self._actor = actor.remote()

    def call(self, order: wire.Order, seconds: float) -> wire.Answer:
        reference = self._actor.call.remote(wire.encode(order))
        try:
            return wire.answer(self._ray.get(reference, timeout=max(seconds, 0)))
        except self._ray.exceptions.GetTimeoutError as error:
            raise EngineLost(f"it was silent for {seconds:.0f} s") from error
        except self._ray.exceptions.RayError as error:
            raise EngineLost(f"its actor ended: {str(error).strip().splitlines()[0][:300]}") from error

    def kill(self) -> None:
        self._ray.kill(self._actor, no_restart=True)


class EngineActor:
    """What `RayLink` starts. vLLM goes into the actor's own process, as it does in a child process."""

    def __init__(self) -> None:
        from flywheel_tasks.models.engine_worker import EngineWorker

        self._worker: Any = EngineWorker()

    def call(self, message: bytes) -> bytes:
        return self._worker.call(message)


def ready(replicas: int) -> None:
    """What must be there before engines are started from threads: a local Ray ends with the thread that started it."""
    if _on_ray(replicas):
        session.ensure()


def _on_ray(replicas: int) -> bool:
    return replicas > 1 or bool(os.environ.get("RAY_ADDRESS"))


def connect(tensor_parallel: int, replicas: int) -> Link:
    """A new engine process, not yet loaded."""
    if _on_ray(replicas):
        return RayLink(tensor_parallel)
    return ProcessLink()
