"""As much of a Kubernetes API server as one pod needs: a pod's container is a process of this machine.

The registries carry no API server. This one speaks the real wire format to the real client, keeps pods until they are
deleted, and can be told to lose one the ways clusters do.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Cluster:
    """Pods, the processes behind them, and what was asked of the server."""

    def __init__(self, folder: Path, secrets: dict[str, str]) -> None:
        self.folder, self.secrets = folder, secrets
        self.pods: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.command: tuple[str, ...] = (sys.executable, "-m", "flywheel_tasks.cli")
        self.end_as: str | None = None
        """What the server says of a pod whose process ended, whatever its exit code: a reason such as OOMKilled."""
        self.answers_creation = self.lists_created = True
        """False: the pod is made and the answer is lost; pods that were made are listed with an error."""

    def create(self, pod: dict[str, Any]) -> dict[str, Any]:
        name, base = pod["metadata"]["name"], pod["spec"]["containers"][0]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("FLYWHEEL", "AIRFLOW"))}
        for variable in base.get("env", []):
            held = (variable.get("valueFrom") or {}).get("secretKeyRef")
            environment[variable["name"]] = self.secrets[f"{held['name']}/{held['key']}"] if held else variable["value"]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*self.command, *(expand(text, environment) for text in base["args"])],
                env=environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        pod["metadata"] |= {"uid": name, "creationTimestamp": now()}
        self.created.append(json.loads(json.dumps(pod)))
        self.pods[name], self.processes[name] = pod, process
        return self.read(name)

    def read(self, name: str) -> dict[str, Any]:
        pod, code = self.pods[name], self.processes[name].poll()
        state: dict[str, Any] = {"running": {"startedAt": now()}}
        phase = "Running"
        if code is not None:
            reason = self.end_as or ("Completed" if code == 0 else "Error")
            code = 137 if self.end_as else (code if code >= 0 else 128 - code)
            phase = "Succeeded" if code == 0 else "Failed"
            state = {"terminated": {"exitCode": code, "reason": reason, "startedAt": now(), "finishedAt": now()}}
        pod["status"] = {
            "phase": phase,
            "conditions": [{"type": kind, "status": "True"} for kind in ("PodScheduled", "Ready")],
            "containerStatuses": [
                {"name": "base", "image": "x", "imageID": "x", "ready": True, "restartCount": 0, "state": state}
            ],
        }
        return pod

    def delete(self, name: str) -> dict[str, Any]:
        pod, process = self.pods.pop(name), self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return pod

    def list(self, selector: str) -> list[dict[str, Any]]:
        wanted = [part.split("=", 1) for part in selector.split(",") if "=" in part and "!=" not in part]
        return [
            self.read(name)
            for name, pod in list(self.pods.items())
            if all(pod["metadata"]["labels"].get(key) == value for key, value in wanted)
        ]

    def log(self, name: str) -> Iterator[bytes]:
        """The log with timestamps, until the process ends."""
        with (self.folder / f"{name}.log").open("rb") as file:
            while True:
                over = name not in self.processes or self.processes[name].poll() is not None
                for line in file:
                    yield f"{now()} ".encode() + line.rstrip(b"\n") + b"\n"
                if over:
                    return
                threading.Event().wait(0.05)


@contextmanager
def serve(folder: Path, secrets: dict[str, str]) -> Iterator[tuple[Cluster, Path]]:
    """The server on loopback, and a kubeconfig that leads to it."""
    cluster = Cluster(folder, secrets)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"cluster": cluster}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = folder / "kubeconfig"
    config.write_text(json.dumps(kubeconfig(f"http://127.0.0.1:{server.server_port}")))
    try:
        yield cluster, config
    finally:
        server.shutdown()
        server.server_close()
        for name in list(cluster.pods):
            cluster.delete(name)


def kubeconfig(address: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {}}],
    }


class Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def _route(self) -> None:
        url, cluster = urlsplit(self.path), self.cluster
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        cluster.requests.append(f"{self.command} {url.path}")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        parts = url.path.strip("/").split("/")
        if "events" in parts or "pods" not in parts:
            return self._json({"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": []})
        name = parts[parts.index("pods") + 1] if len(parts) > parts.index("pods") + 1 else ""
        if name and name not in cluster.pods:
            return self._json({"kind": "Status", "code": 404, "reason": "NotFound"}, 404)
        if parts[-1] == "log":
            return self._stream(name)
        if self.command == "POST":
            if body["metadata"]["name"] in cluster.pods:
                return self._json({"kind": "Status", "code": 409, "reason": "AlreadyExists"}, 409)
            made = cluster.create(body)
            return self._json(made, 201) if cluster.answers_creation else self.connection.close()
        if self.command == "DELETE":
            return self._json(cluster.delete(name))
        if self.command == "PATCH":
            cluster.pods[name]["metadata"]["labels"] |= body["metadata"]["labels"]
        if name:
            return self._json(cluster.read(name))
        if cluster.created and not cluster.lists_created:
            return self._json({"kind": "Status", "code": 503, "reason": "ServiceUnavailable"}, 503)
        items = cluster.list(query.get("labelSelector", ""))
        return self._json({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})

    do_GET = do_POST = do_PATCH = do_DELETE = _route

    def _json(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, name: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        for line in self.cluster.log(name):
            self.wfile.write(line)
            self.wfile.flush()

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


def expand(text: str, variables: dict[str, str]) -> str:
    """What a kubelet makes of an argument: $(NAME) is a variable, $$ is a dollar."""

    def replace(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
