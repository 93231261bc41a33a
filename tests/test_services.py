"""`flywheel up` as a user meets it: lets in who has the password, listens on loopback, runs the DAG, stops clean."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import psutil
import pytest

from flywheel_tasks import demo, processes, services
from flywheel_tasks.core.errors import InputError
from flywheel_tasks.pipeline import weekly

UP = "from flywheel_tasks import services; services.up(lambda line: print(line, flush=True))"
BETWEEN = {"await-reviews", "approve"}
"""Tasks of the weekly DAG that are no stages: nobody is waited for unless somebody says so."""
DEMO = "import sys; from flywheel_tasks import demo; sys.exit(demo.run_demo('2026-W20', print))"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLYWHEEL_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("FLYWHEEL_USER_KEY", raising=False)
    return tmp_path / "state"


def test_a_secret_is_made_once_and_only_its_owner_reads_it(home: Path):
    first = services.secret("password")
    assert services.secret("password") == first
    assert services.secret("user_key") != first
    assert len(first) >= 32
    assert stat.S_IMODE((home / "secrets" / "password").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "secrets").stat().st_mode) == 0o700
    assert sorted(p.name for p in (home / "secrets").iterdir()) == ["password", "user_key"]


def test_a_secret_that_others_can_read_is_refused(home: Path):
    services.secret("password")
    (home / "secrets" / "password").chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        services.secret("password")


def test_two_processes_that_make_a_secret_at_once_agree_on_it(home: Path):
    code = "from flywheel_tasks.services import secret; print(secret('password'))"
    racers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
    assert len({racer.communicate()[0] for racer in racers}) == 1


def test_the_users_own_key_wins(home: Path, monkeypatch: pytest.MonkeyPatch):
    generated = services.user_key()
    assert len(generated.encode()) >= 16
    monkeypatch.setenv("FLYWHEEL_USER_KEY", "k" * 20)
    assert services.user_key() == "k" * 20


def test_loopback_and_login_cannot_be_configured_away(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIRFLOW__API__HOST", "0.0.0.0")
    monkeypatch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS", "True")
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://me@db/airflow")
    environment = services.airflow_environment(8080)
    assert environment["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert environment["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS"] == "False"
    assert environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == "postgresql://me@db/airflow"
    assert all(services.secret("password") not in part for s in services.airflow_services(8080) for part in s.argv)
    assert all(services.secret("password") not in part for part in services.mlflow_service(5000).argv)


def test_a_taken_port_is_left_alone():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert services.free_port(taken) != taken


def test_a_new_password_replaces_mlflows_old_user_database(home: Path):
    services.mlflow_service(5000)
    (home / "mlflow-users.db").write_text("old users")
    services.mlflow_service(5000)
    assert (home / "mlflow-users.db").exists()
    (home / "secrets" / "password").unlink()
    services.mlflow_service(5000)
    assert not (home / "mlflow-users.db").exists()


DYING = """
import os, sys
from flywheel_tasks import services
from flywheel_tasks.core.errors import FlywheelError
def run(name, code):
    return services.Service(name, (sys.executable, "-c", code), os.environ)
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
dying = "raise SystemExit('no database')"
services.airflow_services = lambda port: [run("api-server", sleeper), run("scheduler", dying)]
services.migrate = lambda env, log: None
try:
    services.up(print)
except FlywheelError as error:
    sys.exit("\\n".join([str(error), *error.__notes__]))
"""


ORPHANS = """
import os, subprocess, sys, time, psutil
from flywheel_tasks import processes
processes.adopt_orphans()
mine = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
subprocess.run([sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '0.5'])"], check=True)
def zombies():
    return {p.pid for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE}
while len(zombies()) < 2:
    time.sleep(0.05)
processes.reap_orphans({mine.pid})
print(zombies() == {mine.pid}, mine.wait())
"""


def test_adopted_orphans_are_reaped_and_nobody_elses_child_is():
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "3"], done.stderr


def test_a_folder_that_others_could_read_is_closed(home: Path):
    (home).mkdir(mode=0o755)
    home.chmod(0o755)
    services.state_dir()
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


HOLDS = """
import fcntl, sys, time
from flywheel_tasks.services import state_dir
with open(state_dir() / "services.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(1)
"""


def test_who_waits_for_services_that_are_stopping_starts_its_own(home: Path):
    """Ctrl-C and `make up` again: the first has taken its address away and holds the lock for some seconds more."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    with open(home / "services.lock", "w") as lock:
        assert services._joined(print, lock) is None
    assert holder.wait() == 0


def test_an_address_that_is_taken_away_while_it_is_looked_for_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch):
    (services.state_dir() / "services.json").touch()
    monkeypatch.setattr(services.fcntl, "flock", held := mock.Mock(side_effect=[BlockingIOError, None]))
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=FileNotFoundError))
    with open(home / "services.lock", "w") as lock:
        assert services._joined(print, lock) is None
    assert held.call_count == 2


def test_a_process_that_ends_while_it_is_stopped_is_no_error(monkeypatch: pytest.MonkeyPatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(ended.pid)
    ended.wait()
    monkeypatch.setattr(processes, "descendants", lambda roots: [process])
    processes.stop_everything_below(0.1)


def test_a_dead_service_stops_the_rest_and_shows_its_log(home: Path):
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"scheduler died \(exit 1\)[^\n]*\nno database", done.stderr), done.stderr
    left = (home / "logs" / "api-server.log").read_text().strip()
    assert not left or not psutil.pid_exists(int(left))


class Up:
    """A running `flywheel up` and what it printed."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "FLYWHEEL_USER"))}
        self.environment["FLYWHEEL_HOME"] = str(state)
        self.output = state.with_suffix(".log")
        with self.output.open("wb") as out:
            self.process = subprocess.Popen([sys.executable, "-c", UP], env=self.environment, stdout=out, stderr=out)
        try:
            wait_for(lambda: "Ctrl-C" in self.output.read_text(), self.process, 240)
        except BaseException:
            self.process.terminate()
            raise
        self.endpoints = services.Endpoints(**json.loads((state / "services.json").read_text()))

    def tree(self) -> list[psutil.Process]:
        return processes.descendants([psutil.Process(self.process.pid)])

    def client(self) -> httpx.Client:
        login = {"username": self.endpoints.user, "password": self.endpoints.password()}
        token = httpx.post(f"{self.endpoints.airflow}/auth/token", json=login, timeout=60).raise_for_status().json()
        headers = {"Authorization": f"Bearer {token['access_token']}"}
        return httpx.Client(base_url=f"{self.endpoints.airflow}/api/v2", headers=headers, timeout=60)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended first"
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up") / "state")
    yield running
    if running.process.poll() is None:
        running.process.terminate()
        running.process.wait(20)


@pytest.mark.slow
def test_who_has_no_password_stays_out(up: Up):
    airflow, mlflow = up.endpoints.airflow, up.endpoints.mlflow
    wrong = {"username": "admin", "password": "admin"}
    assert httpx.post(f"{airflow}/auth/token", json=wrong, timeout=60).status_code == 401
    for path in ("dags", "config", "connections", "variables"):
        assert httpx.get(f"{airflow}/api/v2/{path}", timeout=60).status_code == 401
    assert httpx.get(f"{mlflow}/", timeout=60).status_code == 401
    experiments = f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=5"
    assert httpx.get(experiments, auth=("admin", "password1234"), timeout=60).status_code == 401
    assert httpx.get(experiments, auth=("admin", up.endpoints.password()), timeout=60).status_code == 200
    assert (
        httpx.get(experiments, auth=("admin", up.endpoints.password()), headers={"Host": "evil.example"}).status_code
        == 403
    )


@pytest.mark.slow
def test_both_answer_and_the_dags_are_there(up: Up):
    health = httpx.get(f"{up.endpoints.airflow}/api/v2/monitor/health", timeout=60).json()
    assert {health[part]["status"] for part in ("metadatabase", "scheduler", "dag_processor")} == {"healthy"}
    assert httpx.get(f"{up.endpoints.mlflow}/health", timeout=60).text == "OK"
    with up.client() as client:
        assert client.get("/importErrors").json()["import_errors"] == []
        wait_for(lambda: client.get("/dags").json()["total_entries"] == 2, up.process, 60)
        assert {d["dag_id"] for d in client.get("/dags").json()["dags"]} == {"ab_readout", "character_flywheel"}


@pytest.mark.slow
def test_only_loopback_is_listened_on(up: Up):
    listening = [
        connection.laddr
        for process in up.tree()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert sorted(f"http://{a.ip}:{a.port}" for a in listening) == sorted({up.endpoints.airflow, up.endpoints.mlflow})


@pytest.mark.slow
def test_nobody_else_can_read_its_files_or_its_secrets(up: Up):
    open_to_others = [str(path) for path in up.state.rglob("*") if path.stat().st_mode & 0o077]
    assert open_to_others == []
    command_lines = " ".join(part for process in up.tree() for part in process.cmdline())
    values = [path.read_text() for path in (up.state / "secrets").iterdir()]
    assert not [value for value in values if value in command_lines or value in up.output.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "conf", [{"cycle": "2026-47; id"}, {"profile": "huge"}, {"overrides": ["--config=x"]}, {"skip": ["nothing"]}]
)
def test_a_wrong_form_is_refused(up: Up, conf: dict[str, Any]):
    with up.client() as client:
        answer = client.post("/dags/character_flywheel/dagRuns", json={"logical_date": None, "conf": conf})
    assert answer.status_code == 400
    assert next(iter(conf)) in answer.text


@pytest.mark.slow
def test_a_second_up_finds_the_first(up: Up):
    again = subprocess.run([sys.executable, "-c", UP], env=up.environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert f"Already running (process {up.process.pid})" in again.stdout
    assert up.endpoints.airflow in again.stdout


def finished(up: Up, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=up.environment, capture_output=True, text=True, timeout=2700
    )


def table(output: str) -> list[str]:
    """The lines of the demo's summary table, without its head."""
    return output.rpartition("artifact")[2].partition("Cycle")[0].strip().splitlines()


def made(up: Up) -> dict[str, dict[str, str]]:
    """Stage → artifact, for every run of the weekly DAG."""
    with up.client() as client:
        runs = client.get("/dags/character_flywheel/dagRuns").json()["dag_runs"]
        return {run["dag_run_id"]: artifacts(client, run["dag_run_id"]) for run in runs}


def artifacts(client: httpx.Client, run: str) -> dict[str, str]:
    instances = f"/dags/character_flywheel/dagRuns/{run}/taskInstances"
    done = [task["task_id"] for task in client.get(instances).json()["task_instances"] if task["state"] == "success"]
    names = {stage.name for stage in weekly()}.intersection(done)
    return {name: client.get(f"{instances}/{name}/xcomEntries/return_value").json()["value"] for name in names}


@pytest.mark.slow
@pytest.mark.timeout(4500)
def test_a_cycle_runs_through_the_scheduler_and_a_second_time_there_is_nothing_to_do(up: Up):
    first = finished(up, DEMO)
    assert first.returncode == 0, first.stdout
    assert {line.split()[0] for line in table(first.stdout)} == {stage.name for stage in weekly()} | BETWEEN
    assert "from store" not in first.stdout
    before, began = made(up), time.monotonic()
    second = finished(up, DEMO)
    assert second.returncode == 0, second.stdout
    assert time.monotonic() - began < 60
    assert made(up) == before
    assert [line.split()[0] for line in table(second.stdout)] == [stage.name for stage in weekly()]
    assert all(" from store " in line for line in table(second.stdout))
    report = re.search(r"Report\s+(\S+)", second.stdout)
    assert report
    assert Path(report[1]).read_text().startswith("<!doctype html>")
    assert up.endpoints.airflow in second.stdout
    assert up.endpoints.mlflow in second.stdout
    assert re.search(r"the champion stays|A/B test  release-2026-W20: closed", second.stdout)
    with up.client() as client:
        for dag in ("character_flywheel", "ab_readout"):
            assert client.get(f"/dags/{dag}").json()["is_paused"] is True
        xcoms = client.get("/dags/character_flywheel/dagRuns/~/taskInstances/~/xcomEntries").json()["xcom_entries"]
        assert {entry["key"] for entry in xcoms} == {"return_value"}


@pytest.mark.slow
def test_a_failing_cycle_says_why(up: Up):
    (up.state / "demo" / "2026-W21").mkdir()
    done = finished(up, DEMO.replace("2026-W20", "2026-W21"))
    assert done.returncode == 1
    assert re.search(r"\| error: .*2026-W21", done.stdout), done.stdout
    assert f"{weekly()[0].name} " in done.stdout.partition("artifact")[2]


@pytest.mark.slow
def test_the_command_line_finds_everything_the_dag_made(up: Up):
    world = up.state / "demo" / "2026-W20"
    settings = [f"--set={setting}" for setting in demo.overrides(world)]
    argv = [sys.executable, "-m", "flywheel_tasks.cli", "cycle", "--cycle", "2026-W20", *settings, "--json"]
    env = up.environment | {"FLYWHEEL_USER_KEY": (up.state / "secrets" / "user_key").read_text()}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {entry["stage"]: entry["outcome"] for entry in json.loads(done.stdout)} == {
        s.name: "cached" for s in weekly()
    }


@pytest.mark.slow
def test_after_a_skipped_stage_the_rest_runs_on_what_the_store_has(up: Up):
    first, *later = (stage.name for stage in weekly())
    skipped = {first, *later[later.index("constrain") + 1 :]}
    with up.client() as client:
        client.patch("/dags/character_flywheel", json={"is_paused": False}).raise_for_status()
        body = {"dag_run_id": "skips", "logical_date": None, "conf": {"cycle": "2026-W20", "skip": sorted(skipped)}}
        client.post("/dags/character_flywheel/dagRuns", json=body).raise_for_status()
        run = "/dags/character_flywheel/dagRuns/skips"
        wait_for(lambda: client.get(run).json()["state"] in ("success", "failed"), up.process, 240)
        states = {t["task_id"]: t["state"] for t in client.get(f"{run}/taskInstances").json()["task_instances"]}
    assert {name for name, state in states.items() if state == "skipped"} == skipped | BETWEEN
    assert {state for name, state in states.items() if name not in skipped | BETWEEN} == {"success"}


@contextlib.contextmanager
def browsing(**login: Any) -> Iterator[Any]:
    """A page of a headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1400, "height": 1200}, **login).new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.mark.slow
def test_a_person_can_compare_two_checkpoints_in_mlflow(up: Up, tmp_path: Path):
    login = {"username": up.endpoints.user, "password": up.endpoints.password()}
    with browsing(http_credentials=login) as page:
        search = f"{up.endpoints.mlflow}/api/2.0/mlflow/experiments/search"
        found = page.request.post(search, data={"max_results": 5}).json()["experiments"]
        (mine,) = [one["experiment_id"] for one in found if one["name"] == "character-flywheel"]
        page.goto(f"{up.endpoints.mlflow}/#/experiments/{mine}/runs?workflowType=machine_learning")
        page.get_by_role("row").filter(has_text="cycle 2026-W20").locator("button").first.click()
        for run in ("sft 2026-W20", "dpo 2026-W20"):
            page.get_by_role("row").filter(has_text=run).get_by_role("checkbox").check(force=True)
        page.get_by_role("button", name="Compare", exact=True).click()
        page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
        # Both are there with what they were trained on and what came of it.
        for known in ("dpo 2026-W20", "sft 2026-W20", "sft.train.learning_rate", "train/loss", "rows.out"):
            page.get_by_text(known, exact=True).first.wait_for(state="attached")
        page.screenshot(path=tmp_path / "compared.png", full_page=True)


@pytest.mark.slow
def test_a_person_can_trigger_a_run_from_the_form_and_read_its_log(up: Up, tmp_path: Path):
    first = weekly()[0].name
    with browsing() as page:
        page.goto(up.endpoints.airflow, wait_until="domcontentloaded")
        page.fill("input[name=username]", up.endpoints.user)
        page.fill("input[name=password]", up.endpoints.password())
        page.keyboard.press("Enter")
        page.wait_for_url(lambda url: "login" not in url)
        page.goto(f"{up.endpoints.airflow}/dags/character_flywheel", wait_until="domcontentloaded")
        page.get_by_role("button", name="Trigger").first.click()
        page.locator("input[name=element_cycle]").fill("2026-W20")
        page.locator("textarea[name=element_overrides]").fill("\n".join(demo.overrides(up.state / "demo" / "2026-W20")))
        page.get_by_role("dialog").get_by_role("button", name="Trigger").click()
        page.wait_for_url("**/runs/*")
        run_id = urllib.parse.unquote(page.url.rpartition("/runs/")[2].split("/")[0].split("?")[0])
        with up.client() as client:
            run = f"/dags/character_flywheel/dagRuns/{run_id}"
            wait_for(lambda: client.get(run).json()["state"] in ("success", "failed"), up.process, 240)
            assert client.get(run).json()["state"] == "success"
            demos = [there for name, there in made(up).items() if name.startswith("demo-2026-W20")]
            assert artifacts(client, run_id) in demos  # every stage of it found what the demo had made
        page.goto(f"{up.endpoints.airflow}/dags/character_flywheel/runs/{run_id}/tasks/{first}")
        page.get_by_text(f"artifact: file://{up.state}/store/artifacts/{first}/").wait_for()
        page.screenshot(path=tmp_path / "log.png")


@pytest.mark.slow
def test_sigterm_stops_everything_within_ten_seconds(up: Up):
    tree = up.tree()
    assert len(tree) >= 4
    assert [process for process in tree if process.status() == psutil.STATUS_ZOMBIE] == []
    began = time.monotonic()
    up.process.terminate()
    assert up.process.wait(30) == 0
    assert time.monotonic() - began < 10
    _, alive = psutil.wait_procs(tree, timeout=1)
    assert not alive
    with contextlib.suppress(httpx.TransportError):
        pytest.fail(f"something still answers: {httpx.get(up.endpoints.airflow, timeout=2)}")
