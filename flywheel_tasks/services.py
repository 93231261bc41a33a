"""Airflow and MLflow on this machine: loopback only, behind a generated password, under one supervisor."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from subprocess import STDOUT, Popen, run
from typing import IO
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import psutil

from flywheel_tasks import processes
from flywheel_tasks.core.config import home
from flywheel_tasks.core.errors import FlywheelError, InputError

LOOPBACK = "127.0.0.1"
USER = "admin"
MLFLOW_UI_VARIABLE = "FLYWHEEL_MLFLOW_UI"
"""Where a person sees what a stage tracked; stages write to the database behind it, and print the link."""
DAGS = Path(__file__).resolve().parents[1] / "dags"
START_SECONDS = 300.0
DRAIN_SECONDS, STOP_SECONDS = 3.0, 5.0


@dataclass(frozen=True)
class Endpoints:
    """Where the running services are; what a second `flywheel up` and the demo read."""

    pid: int
    airflow: str
    mlflow: str
    user: str
    password_file: str

    def password(self) -> str:
        return Path(self.password_file).read_text()


@dataclass(frozen=True)
class Service:
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]


Children = dict[str, "Popen[bytes]"]


def state_dir() -> Path:
    """The machine's local state, readable by its owner only."""
    folder = home().absolute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid == os.getuid() and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        folder.chmod(0o700)
    return folder


def secret(name: str, new: Callable[[], str] = lambda: secrets.token_urlsafe(32)) -> str:
    """The secret of that name, made on first use: one file each, 0600 in a 0700 folder."""
    folder = state_dir() / "secrets"
    folder.mkdir(exist_ok=True, mode=0o700)
    path = folder / name
    if not path.exists():
        fresh = folder / f"{name}.{secrets.token_hex(8)}"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(new())
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"{path} can be read by others: run 'chmod 600 {path}', or delete it to have a new one made")
    return path.read_text()


def user_key() -> str:
    """The pseudonymisation key: the caller's own, else this machine's generated one."""
    return os.environ.get("FLYWHEEL_USER_KEY") or secret("user_key")


@contextlib.contextmanager
def running(say: Callable[[str], None], *, whole: bool = True) -> Iterator[tuple[Endpoints, Callable[[], None]]]:
    """The services, joined if they run already, else started and stopped again on the way out.

    Yields where they are and a check that raises as soon as one of them has died. Unless the whole is wanted,
    MLflow may still be starting by then.
    """
    os.umask(0o077)
    with open(state_dir() / "services.lock", "w") as lock:
        if endpoints := _joined(say, lock):
            yield endpoints, lambda: None
            return
        yield from _started(say, whole)


def up(say: Callable[[str], None]) -> None:
    """Run the services in the foreground until Ctrl-C, SIGTERM, or the death of one of them."""
    try:
        with running(say) as (endpoints, check):
            say(banner(endpoints))
            if endpoints.pid != os.getpid():
                return
            say("Ctrl-C stops them.")
            while True:
                check()
                time.sleep(1)
    except KeyboardInterrupt:
        say("Stopped.")


def banner(endpoints: Endpoints) -> str:
    return (
        f"  Airflow   {endpoints.airflow}/dags/character_flywheel\n"
        f"  MLflow    {endpoints.mlflow}/#/experiments?workflowType=machine_learning\n"
        f"  user      {endpoints.user}\n"
        f"  password  in {endpoints.password_file}"
    )


def airflow_environment(port: int) -> dict[str, str]:
    """Airflow's settings; the caller's own AIRFLOW__ variables win, except where the UI listens and who may log in."""
    if not DAGS.is_dir() and "AIRFLOW__CORE__DAGS_FOLDER" not in os.environ:
        raise InputError(f"no DAG folder at {DAGS}: run from a checkout, or set AIRFLOW__CORE__DAGS_FOLDER")
    airflow_home = state_dir() / "airflow"
    airflow_home.mkdir(exist_ok=True, mode=0o700)
    passwords = airflow_home / "passwords.json"
    with open(os.open(passwords, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({USER: secret("password")}, file)
    address = f"http://{LOOPBACK}:{port}"
    cpus = str(os.cpu_count() or 1)
    defaults = {
        "AIRFLOW_HOME": str(airflow_home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": cpus,
        # A stage takes as many slots as it asks for cores: two that fill the machine do not run at once.
        "AIRFLOW__CORE__DEFAULT_POOL_TASK_SLOT_COUNT": cpus,
        "AIRFLOW__CORE__FERNET_KEY": secret("fernet_key", lambda: base64.urlsafe_b64encode(os.urandom(32)).decode()),
        "AIRFLOW__API__SECRET_KEY": secret("airflow_api_key"),
        "AIRFLOW__API_AUTH__JWT_SECRET": secret("airflow_jwt_key"),
        # A cycle that was cut off by a power failure starts again after two minutes, not five.
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "120",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
        "AIRFLOW__API__INSTANCE_NAME": "CharacterFlywheel",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    }
    forced = {
        "AIRFLOW__API__HOST": LOOPBACK,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), LOOPBACK, "localhost"))),
        "FLYWHEEL_HOME": str(state_dir()),
        "FLYWHEEL_USER_KEY": user_key(),
    }
    return defaults | os.environ | forced


def airflow_services(port: int) -> list[Service]:
    """The parts of Airflow, each with the same environment."""
    env = airflow_environment(port)
    # Without its flag the scheduler serves its logs on every interface.
    parts = {"api-server": (), "dag-processor": (), "scheduler": ("--skip-serve-logs",)}
    return [_airflow_part(name, flags, env) for name, flags in parts.items()]


def triggerer_service(env: Mapping[str, str]) -> Service:
    """Only the wait for annotators needs it, and nothing waits for it: it starts last, and not for the demo."""
    return _airflow_part("triggerer", ("--skip-serve-logs",), env)


def mlflow_service(port: int) -> Service:
    """MLflow's server over the database that stages write to when no tracking server is named: one history."""
    state = state_dir()
    argv = (
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
        *("--host", LOOPBACK, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{_tracking_database()}"),
        *("--artifacts-destination", str(state / "mlflow-files")),
        *("--allowed-hosts", f"{LOOPBACK}:{port},localhost:{port}"),
        *("--cors-allowed-origins", f"http://{LOOPBACK}:{port}"),
        *("--x-frame-options", "DENY"),
    )
    return Service("mlflow", argv, _mlflow_environment())


def migrate(env: Mapping[str, str], log: Path) -> None:
    """Create or upgrade Airflow's database; our own SQLite file only once per Airflow version, as it takes seconds."""
    done, version = state_dir() / "airflow" / "migrated", metadata.version("apache-airflow")
    own = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN" not in env
    if own and done.with_name("airflow.db").exists() and done.exists() and done.read_text() == version:
        return
    with log.open("wb") as out:
        argv = [sys.executable, "-m", "airflow", "db", "migrate"]
        code = run(argv, env=dict(env), stdout=out, stderr=STDOUT).returncode
    if code:
        raise _failure(f"airflow db migrate failed (exit {code})", log)
    if own:
        done.write_text(version)


def free_port(preferred: int) -> int:
    """The preferred loopback port, or any other where it is taken."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return int(probe.getsockname()[1])
    raise FlywheelError(f"no free port on {LOOPBACK}: stop another server, then try again")


def _airflow_part(name: str, flags: tuple[str, ...], env: Mapping[str, str]) -> Service:
    return Service(name, (sys.executable, "-m", "airflow", name, *flags), env)


def _joined(say: Callable[[str], None], lock: IO[str]) -> Endpoints | None:
    """The services of the process that holds the lock, once they are up; None where the lock is ours, at once or since
    that process ended."""
    file = state_dir() / "services.json"
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        with contextlib.suppress(FileNotFoundError):
            endpoints = Endpoints(**json.loads(file.read_text()))
            say(f"Already running (process {endpoints.pid}).")
            return endpoints
        if time.monotonic() > deadline:
            raise FlywheelError(
                f"another process holds {file.with_name('services.lock')} but its services never came up"
            )
        time.sleep(0.5)


def _started(say: Callable[[str], None], whole: bool) -> Iterator[tuple[Endpoints, Callable[[], None]]]:
    processes.adopt_orphans()
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    file = state_dir() / "services.json"
    file.unlink(missing_ok=True)
    children: Children = {}
    try:
        ports = free_port(8080), free_port(5000)
        elsewhere = _tracking_server()
        logs = state_dir() / "logs"
        logs.mkdir(exist_ok=True, mode=0o700)
        endpoints = Endpoints(
            pid=os.getpid(),
            airflow=f"http://{LOOPBACK}:{ports[0]}",
            mlflow=elsewhere or f"http://{LOOPBACK}:{ports[1]}",
            user=USER,
            password_file=str(state_dir() / "secrets" / "password"),
        )

        def check() -> None:
            for name, child in children.items():
                if (code := child.poll()) is not None:
                    raise _failure(f"{name} died (exit {code})", logs / f"{name}.log")
            if whole:
                processes.reap_orphans({child.pid for child in children.values()})

        def start(service: Service) -> None:
            with (logs / f"{service.name}.log").open("wb") as log:
                env = {**service.env, MLFLOW_UI_VARIABLE: endpoints.mlflow}
                children[service.name] = processes.spawn(service.argv, env=env, stdout=log, stderr=STDOUT)

        say("Starting Airflow and MLflow (half a minute) ...")
        airflow = airflow_services(ports[0])
        migrate(airflow[0].env, logs / "migrate.log")
        for service in airflow:
            start(service)
        _wait_until("Airflow", lambda: _airflow_ready(endpoints.airflow), check, logs)
        if not elsewhere:
            start(mlflow_service(ports[1]))
        # A stage that logs while the server creates the database would create it too, and one of them would fail.
        if not elsewhere and (whole or not _tracking_database().exists()):
            _wait_until("MLflow", lambda: bool(_get(f"{endpoints.mlflow}/health")), check, logs)
        if whole:
            start(triggerer_service(airflow[0].env))
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(endpoints)))
        os.replace(fresh, file)
        yield endpoints, check
    finally:
        # The stop is bounded, so a second Ctrl-C may not cut it short and leave processes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        file.unlink(missing_ok=True)
        _stop(children)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, previous)


def _stop(children: Children) -> None:
    """Tasks first, while the API server can still record that they were cut off; then the services."""
    if (scheduler := children.get("scheduler")) and scheduler.poll() is None:
        workers = psutil.Process(scheduler.pid).children()
        processes.stop(processes.descendants(workers), DRAIN_SECONDS)
    processes.stop_everything_below(STOP_SECONDS)


def _failure(what: str, log: Path) -> FlywheelError:
    """The error with the end of the log as notes, which the command line prints below it."""
    error = FlywheelError(f"{what}, see {log}")
    for line in processes.tail(log).splitlines():
        error.add_note(line)
    return error


def _wait_until(name: str, ready: Callable[[], bool], check: Callable[[], None], logs: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        check()
        if time.monotonic() > deadline:
            raise FlywheelError(f"{name} is not ready after {START_SECONDS:.0f} s: see the logs in {logs}")
        time.sleep(0.5)


def _airflow_ready(address: str) -> bool:
    health = json.loads(_get(f"{address}/api/v2/monitor/health") or "{}")
    return all(
        health.get(part, {}).get("status") == "healthy" for part in ("metadatabase", "scheduler", "dag_processor")
    )


def _get(url: str) -> bytes:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=5) as answer:
            return bytes(answer.read())
    except (URLError, TimeoutError, ConnectionError):
        return b""


def _tracking_server() -> str:
    """The team's own MLflow server where one is named: stages log there, so none is started here."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return uri if uri.startswith(("http://", "https://")) else ""


def _tracking_database() -> Path:
    return state_dir() / "mlflow.db"


def _mlflow_environment() -> dict[str, str]:
    state = state_dir()
    database, password = state / "mlflow-users.db", secret("password")
    ini = state / "mlflow-auth.ini"
    # MLflow keeps the first password it saw: a new one needs a new user database.
    if not ini.exists() or f"admin_password = {password}\n" not in ini.read_text():
        database.unlink(missing_ok=True)
    with open(os.open(ini, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{database}\n"
            f"admin_username = {USER}\nadmin_password = {password}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"
        )
    own = {"MLFLOW_AUTH_CONFIG_PATH": str(ini), "MLFLOW_FLASK_SERVER_SECRET_KEY": secret("mlflow_key")}
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("FLYWHEEL_USER_KEY", "MLFLOW_TRACKING_URI")}
    return inherited | own | quiet
