"""Every id, path and URI that a person or a file may hand in: none leads out of the store, and none leaves a trace."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flywheel_tasks import cli
from flywheel_tasks.core import ids, manifest
from flywheel_tasks.core.errors import CorruptArtifact, FlywheelError, InputError
from flywheel_tasks.core.manifest import FileRecord, OutputRecord
from flywheel_tasks.core.output import Output
from flywheel_tasks.core.storage import Storage, normal_uri
from flywheel_tasks.core.store import Store
from tests.drills import worker

KEY = "0123456789abcdef" * 2
EVIL = [
    "../outside", "../../etc/passwd", "a/../../outside", "/etc/passwd", "..", ".", "", "~/x", "a//b", "a/./b",
    "a\x00b", "a\nb", "..\\x", "C:\\x", "%2e%2e/x", "a/..", "\u2024\u2024/x", "．．/x", "file:///etc/passwd", "-rf",
    "a b", "a;b", "$(x)",
]  # fmt: skip


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A store with one artifact, in a folder whose every other file is watched."""
    worker.run("first", str(tmp_path / "store"))
    (tmp_path / "outside").write_text("secret")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def storage_calls(storage: Storage) -> dict[str, Callable[[str], object]]:
    def create(path: str) -> None:
        with storage.create(path) as stream:
            stream.write(b"x")

    return {
        "read": storage.read,
        "open": storage.open,
        "sha256": storage.sha256,
        "list": storage.list,
        "delete": storage.delete,
        "delete_folder": storage.delete_folder,
        "put": lambda path: storage.put(path, b"x"),
        "put_new": lambda path: storage.put_new(path, b"x"),
        "create": create,
    }


@pytest.mark.parametrize("text", EVIL)
def test_no_call_of_the_store_leaves_its_folder(house: Path, text: str) -> None:
    store, before = Store(str(house / "store")), everything(house)
    for call in storage_calls(store.storage).values():
        with pytest.raises(InputError):
            call(text)
    for lookup in (
        lambda: store.get(text, KEY),
        lambda: store.get("drill-first", text),
        lambda: store.by_uri(f"{store.uri}/artifacts/{text}/{KEY}/manifest.json"),
        lambda: store.by_uri(f"{store.uri}/{text}"),
        lambda: store.by_uri(text),
        lambda: store.resolve(f"{text}/{KEY}"),
        lambda: store.pointed(text, "drill-first"),
        lambda: store.pointed("2026-W47", text),
        lambda: store.discard("drill-first", KEY, text),
    ):
        with pytest.raises(InputError) as refused:
            lookup()
        assert "\n" not in str(refused.value)
    assert everything(house) == before


@pytest.mark.parametrize("text", EVIL)
def test_a_stage_cannot_name_a_file_out_of_its_output(house: Path, text: str) -> None:
    out = Output(Storage(str(house / "store")), "s", KEY, "a", {"plot": "file"}, seed=1, cycle="2026-W47")
    before = everything(house)
    with pytest.raises(InputError):
        out.file("plot", text)
    with pytest.raises(InputError):
        out.folder(text)
    out.close()
    assert everything(house) == before


@pytest.mark.parametrize("text", [t for t in EVIL if t])
def test_a_manifest_that_points_outside_is_refused(house: Path, text: str) -> None:
    """Even with a right checksum: whoever can write a manifest must not be able to read the machine."""
    artifact = next(Store(str(house / "store")).artifacts())
    file = FileRecord.model_construct(path=text, bytes=6, rows=None, sha256="0" * 64)
    output = OutputRecord.model_construct(contract="file", version=1, files=(file,))
    forged = artifact.manifest.model_copy(update={"outputs": {"plot": output}})
    with pytest.raises(CorruptArtifact, match="damaged"):
        manifest.parse(forged.to_bytes(), "manifest.json")


@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "/", "a", "%2e", "\\", "~", ""])).map("".join))
def test_whatever_passes_the_checks_stays_inside(text: str) -> None:
    root = Path("/root-of-the-store")
    for check in (lambda: ids.relative_path(text, "x"), lambda: ids.name(text, "x"), lambda: ids.key(text)):
        with contextlib.suppress(InputError):
            inside = (root / check()).resolve()
            assert inside != root
            assert inside.is_relative_to(root)


@pytest.mark.parametrize(
    "uri", ["file:///a/../b", "s3://bucket/../x", "ftp://x/y", "s3://b/x?endpoint_override=evil", "file://%2e%2e"]
)
def test_a_store_uri_with_tricks_is_refused(uri: str) -> None:
    with pytest.raises(FlywheelError, match="'"):
        normal_uri(uri)


def flywheel(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """The command, in this process: exit code and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["flywheel", *arguments])
    said, quiet = io.StringIO(), contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(said), quiet, pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), said.getvalue()


@pytest.mark.parametrize("text", [t for t in EVIL if t and not t.startswith("-") and "\x00" not in t])
def test_the_command_line_refuses_it_in_one_line(house: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_HOME", str(house / "home"))
    here = ("--profile", "test", "--set", f"store.uri={house / 'store'}")
    before = everything(house)
    for command in (
        ("show", text, *here),
        ("show", f"drill-first/{text}", *here),
        ("lineage", text, *here),
        ("status", "--cycle", text, *here),
        ("run", "ingest", "--cycle", text, *here),
        ("run", text, "--cycle", "2026-W47", *here),
        ("run", "filter", "--cycle", "2026-W47", "--input", f"ingest={text}", *here),
        ("run", "filter", "--cycle", "2026-W47", "--input", f"ingest=file://{house}/outside", *here),
        ("run", "ingest", "--cycle", "2026-W47", "--config", f"{house}/outside"),
        ("cycle", "--cycle", text, *here),
    ):
        code, said = flywheel(monkeypatch, *command)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (2, 1), (command, code, said)
        assert said.splitlines()[-1] == errors[0]
        assert "secret" not in said
        assert "Traceback" not in said
    assert everything(house) == before
