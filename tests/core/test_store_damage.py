"""One flipped byte in any committed file, a cut, a swap, a loss: refused, and the error names the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from flywheel_tasks.core import manifest
from flywheel_tasks.core.errors import CorruptArtifact
from flywheel_tasks.core.store import Artifact, Store
from tests.drills import worker
from tests.drills.stages import CYCLE


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("store")
    return folder, worker.run("first", str(folder)).artifact


@pytest.fixture
def store(committed: tuple[Path, Artifact], tmp_path: Path) -> tuple[Store, Path]:
    """A copy of the store that the test may damage, and the artifact's folder in it."""
    copy = tmp_path / "store"
    shutil.copytree(committed[0], copy)
    return Store(str(copy)), copy / committed[1].manifest.folder


def files_of(artifact: Artifact) -> Iterator[tuple[str, str]]:
    for name, output in artifact.manifest.outputs.items():
        for file in output.files:
            yield name, file.path


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def read_as_a_stage_would(artifact: Artifact, output: str, path: str) -> object:
    contract = artifact.manifest.outputs[output].contract
    if contract == "json":
        return artifact.json(output)
    if contract in ("file", "checkpoint"):
        return artifact.file(output, path.rsplit("/", 1)[-1])
    return next(artifact.table(output).batches()) if path.endswith("00000.parquet") else artifact.table(output).read()


def test_a_flipped_byte_in_any_data_file_is_refused_by_name(
    committed: tuple[Path, Artifact], store: tuple[Store, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = store[0].get("drill-first", committed[1].manifest.key)
    flips = 0
    names = list(files_of(artifact))
    assert {name for name, _ in names} == {"activity", "report", "plot", "model", "quarantine"}
    for output, relative in names:
        path = store[1] / relative
        whole = path.read_bytes()
        for place in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1} - {-1}):
            flip(path, place, bit=place % 8)
            for use in (lambda: artifact.verify(), lambda: read_as_a_stage_would(artifact, output, relative)):  # noqa: B023
                with pytest.raises(CorruptArtifact, match=relative):
                    use()
            flips += 1
            path.write_bytes(whole)
        assert artifact.verify() == len(names)
    with capsys.disabled():
        print(f"\n  {flips} flipped bytes in {len(names)} files, all refused by name on verify and on read")


def test_a_flip_of_any_byte_of_the_manifest_is_refused(
    committed: tuple[Path, Artifact], store: tuple[Store, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = store[1] / "manifest.json"
    whole = path.read_bytes()
    missed = []
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        try:
            manifest.parse(bytes(data), "store/manifest.json")
        except CorruptArtifact as error:
            if str(error).startswith("store/manifest.json is damaged"):
                continue
        missed.append(place)
    flip(path, len(whole) // 2)
    with pytest.raises(CorruptArtifact, match=r"manifest\.json"):
        store[0].find("drill-first", committed[1].manifest.key)
    with capsys.disabled():
        print(f"\n  {len(whole)} flips of the manifest, {len(missed)} not refused")
    assert not missed


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "gone", "other file's bytes"])
def test_any_other_damage_is_refused_by_name(
    damage: str, committed: tuple[Path, Artifact], store: tuple[Store, Path]
) -> None:
    artifact = store[0].get("drill-first", committed[1].manifest.key)
    for output, relative in files_of(artifact):
        path = store[1] / relative
        whole = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            other = (store[1] / "manifest.json").read_bytes()
            path.write_bytes({"empty": b"", "cut": whole[:-1], "longer": whole + b"\n"}.get(damage, other))
        with pytest.raises(CorruptArtifact, match=relative):
            artifact.verify()
        with pytest.raises(CorruptArtifact, match=relative):
            read_as_a_stage_would(artifact, output, relative)
        path.write_bytes(whole)
    assert artifact.verify() == 7


def test_a_downstream_stage_refuses_a_damaged_input_and_commits_nothing(
    committed: tuple[Path, Artifact], store: tuple[Store, Path]
) -> None:
    relative = next(path for output, path in files_of(committed[1]) if output == "activity")
    flip(store[1] / relative, 100)
    with pytest.raises(CorruptArtifact, match=relative):
        worker.run("second", store[0].uri)
    assert [a.manifest.stage for a in store[0].artifacts()] == ["drill-first"]


def test_a_manifest_in_another_folder_is_refused(committed: tuple[Path, Artifact], store: tuple[Store, Path]) -> None:
    moved = store[1].parent / ("0" * 32)
    shutil.copytree(store[1], moved)
    with pytest.raises(CorruptArtifact, match="describes drill-first/"):
        store[0].get("drill-first", "0" * 32)


@pytest.mark.parametrize("bytes_", [b"", b"{}", b"null", b'{"key": 5}', b'{"key": "../../etc/passwd"}', b"\xff\xfe"])
def test_a_damaged_pointer_is_refused(bytes_: bytes, store: tuple[Store, Path], tmp_path: Path) -> None:
    (tmp_path / "store" / "cycles" / CYCLE / "drill-first.json").write_bytes(bytes_)
    with pytest.raises(CorruptArtifact, match=r"drill-first\.json"):
        store[0].pointed(CYCLE, "drill-first")
