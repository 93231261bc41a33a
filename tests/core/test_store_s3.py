"""The same drills on s3://, over HTTP against a real S3 server process's protocol (moto)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from moto.server import ThreadedMotoServer

from flywheel_tasks.core import conditional
from flywheel_tasks.core.errors import CorruptArtifact
from flywheel_tasks.core.store import Store
from tests.core.test_store_faults import kill_everywhere
from tests.core.test_store_races import WRITERS, race
from tests.drills import worker
from tests.drills.fixtures import content
from tests.drills.stages import CYCLE

BUCKET = "flywheel-drill"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """S3 takes one write of an object at a time; moto looks and then writes, so its requests are put in line."""
    server = ThreadedMotoServer(port=0)
    server.start()
    turn, application = threading.Lock(), server._server.app

    def one_at_a_time(environ: Any, start_response: Any) -> Any:
        with turn:
            return application(environ, start_response)

    server._server.app = one_at_a_time
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URI of an empty store; credentials and endpoint come from the environment, as in production."""
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "drill", "AWS_SECRET_ACCESS_KEY": "drill",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}/store"
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=entry["Key"])


@pytest.fixture
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(worker.run("first", str(tmp_path_factory.mktemp("local"))).artifact)


def test_the_same_stage_gives_the_same_bytes_and_key_as_locally(bucket: str, tmp_path: Any) -> None:
    local, remote = (worker.run("first", uri).artifact for uri in (str(tmp_path), bucket))
    assert content(local) == content(remote)
    assert (local.manifest.key, local.manifest.digest) == (remote.manifest.key, remote.manifest.digest)
    assert remote.verify() == 7
    again = worker.run("first", bucket)
    assert again.outcome == "cached"
    assert again.artifact.manifest.attempt == remote.manifest.attempt
    below = worker.run("second", bucket).artifact
    assert below.json("report") == worker.run("second", str(tmp_path)).artifact.json("report")
    assert Store(bucket).by_uri(below.uri).manifest == below.manifest
    assert Store(bucket).cycles() == [CYCLE]


def test_put_new_is_won_once(bucket: str) -> None:
    storage = Store(bucket).storage
    assert storage.put_new("artifacts/a/manifest.json", b"one")
    assert not storage.put_new("artifacts/a/manifest.json", b"two")
    assert storage.read("artifacts/a/manifest.json") == b"one"


def test_a_replacement_of_other_bytes_is_refused(bucket: str) -> None:
    storage = Store(bucket).storage
    storage.put("cycles/x", b"one")
    assert storage.replace("cycles/x", b"one", b"two")
    assert not storage.replace("cycles/x", b"one", b"three")
    assert storage.read("cycles/x") == b"two"
    assert not storage.replace("cycles/absent", b"", b"x")


def test_a_replacement_between_the_look_and_the_put_is_seen(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Store(bucket).storage
    storage.put("cycles/x", b"one")
    look = obstore.get

    def overtaken(*arguments: Any) -> Any:
        found = look(*arguments)
        storage.put("cycles/x", b"other")
        return found

    monkeypatch.setattr(obstore, "get", overtaken)
    assert not storage.replace("cycles/x", b"one", b"two")
    assert storage.read("cycles/x") == b"other"


def test_a_commit_uses_the_credentials_that_the_data_went_with(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=b\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = Store(bucket).storage
    storage.put("x/data", b"1")
    assert storage.put_new("x/manifest.json", b"{}")


def test_a_commit_goes_to_the_region_in_which_the_data_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert conditional.connect("s3://somewhere/store", "eu-central-1").config["region"] == "eu-central-1"


def test_eight_writers_one_winner(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for serial in range(3):
            found = dict(race(bucket, "commit artifacts", serial))
            print(f"\n  s3: {WRITERS} writers at 'commit', round {serial + 1}: {found}")


@pytest.mark.parametrize("stride", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_step_a_rerun_gives_the_same_bytes(
    bucket: str, stride: int, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    stop, findings = worker.SPAWN.Event(), worker.SPAWN.Queue()
    reader = worker.start(worker.read_forever, bucket, stop, findings)
    killed = kill_everywhere("first", bucket, stride)
    stop.set()
    reads, rounds, problems = findings.get(timeout=60)
    assert worker.ended(reader) == 0
    with capsys.disabled():
        print(
            f"\n  s3: killed {killed.total()} runs: {dict(killed)}; "
            f"{reads} reads in {rounds} rounds, {len(problems)} torn"
        )
    assert not problems
    artifacts = list(Store(bucket).artifacts())
    assert len(artifacts) == killed.total() + 1
    assert all(content(a) == expected for a in artifacts)


def test_a_flipped_byte_is_refused_by_name(bucket: str) -> None:
    artifact = worker.run("first", bucket).artifact
    client = boto3.client("s3")
    names = [f.path for output in artifact.manifest.outputs.values() for f in output.files]
    for name in names:
        key = f"store/{artifact.manifest.folder}/{name}"
        whole = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        client.put_object(Bucket=BUCKET, Key=key, Body=bytes(damaged))
        with pytest.raises(CorruptArtifact, match=name):
            artifact.verify()
        client.put_object(Bucket=BUCKET, Key=key, Body=whole)
    client.delete_object(Bucket=BUCKET, Key=f"store/{artifact.manifest.folder}/{names[0]}")
    with pytest.raises(CorruptArtifact, match=names[0]):
        artifact.verify()


@pytest.mark.parametrize(
    ("change", "value"), [("bucket", "s3://no-such-bucket-here/store"), ("endpoint", "http://127.0.0.1:9")]
)
def test_a_store_that_is_not_there_is_one_clear_line(
    bucket: str, change: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = bucket
    if change == "bucket":
        uri = value
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    text = worker.reported(lambda: worker.run("first", uri))
    assert "store" in text
