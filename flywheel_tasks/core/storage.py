"""Bytes under a URI (`file://`, `s3://`, `gs://`): durable writes, and a create-if-absent that is atomic on each.

Data goes through pyarrow.fs. A commit and a safe replacement need more than pyarrow.fs offers: they go through a hard
link, a lock and fsync locally, and through conditional puts (obstore) on an object store.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from flywheel_tasks.core import conditional, ids
from flywheel_tasks.core.errors import ConfigError, FlywheelError, InputError

_CHUNK = 1 << 20
UNFINISHED = ".partial"
"""The end of a name that a write is still going to; a kill can leave one behind."""
_LIST_TRIES = 5
_REPLACE_SECONDS = 60.0


def fault_point(step: str) -> None:
    """Called before every step that changes what is stored. Tests replace it to stop a process exactly there."""


class HashingFile(io.RawIOBase):
    """A write-only file that knows the size and sha256 of what went through it."""

    def __init__(self, raw: Any, path: str) -> None:
        super().__init__()
        self._raw, self._path = raw, path
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        fault_point(f"write {self._path}")
        view = memoryview(data)
        self._raw.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self.size

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class Storage:
    """Paths are relative to the root URI, always with '/', always validated."""

    def __init__(self, uri: str) -> None:
        self.uri = normal_uri(uri)
        self.local = self.uri.startswith("file://")
        self.root = self.uri.split("://", 1)[1]

    @cached_property
    def fs(self) -> pafs.FileSystem:
        if self.local:
            return pafs.LocalFileSystem()
        try:
            return pafs.FileSystem.from_uri(self.uri + endpoint_query(self.uri))[0]
        except (OSError, ValueError) as error:
            raise ConfigError(f"store.uri '{self.uri}' cannot be opened: {error}") from error

    def full(self, path: str) -> str:
        return f"{self.root}/{ids.relative_path(path, self.uri)}"

    @contextmanager
    def create(self, path: str) -> Iterator[HashingFile]:
        """Write a new file; it is durable when the block ends, and absent or unreferenced when the block fails."""
        full = self.full(path)
        fault_point(f"create {path}")
        with _storage_errors(path):
            if self.local:
                os.makedirs(os.path.dirname(full), exist_ok=True)
                with open(full, "xb") as raw:
                    stream = HashingFile(raw, path)
                    yield stream
                    raw.flush()
                    fault_point(f"fsync {path}")
                    os.fsync(raw.fileno())
                _fsync_folder(os.path.dirname(full))
                _fsync_folder(os.path.dirname(os.path.dirname(full)))
            else:
                with self.fs.open_output_stream(full) as raw:
                    stream = HashingFile(raw, path)
                    yield stream
                    fault_point(f"close {path}")

    def put_new(self, path: str, data: bytes) -> bool:
        """Create the object with exactly these bytes, or return False because it already exists. Atomic."""
        full = self.full(path)
        fault_point(f"commit {path}")
        with _storage_errors(path):
            if self.local:
                return _link_new(Path(full), data, Path(self.root))
            return conditional.create(self._conditional, path, data)

    def put(self, path: str, data: bytes) -> None:
        """Create or replace a small object. A reader sees the old bytes or the new ones, never a mixture."""
        full = self.full(path)
        fault_point(f"put {path}")
        with _storage_errors(path):
            if self.local:
                temporary = _write_beside(Path(full), data)
                fault_point(f"rename {path}")
                os.replace(temporary, full)
                _fsync_folder(os.path.dirname(full))
            else:
                with self.fs.open_output_stream(full) as stream:
                    stream.write(data)

    def replace(self, path: str, old: bytes, new: bytes) -> bool:
        """Replace the object if it still holds exactly `old`, or return False. Atomic against every other `replace`."""
        full = self.full(path)
        fault_point(f"put {path}")
        with _storage_errors(path):
            if self.local:
                return _replace_local(Path(full), old, new, Path(self.root))
            return conditional.replace(self._conditional, path, old, new)

    def read(self, path: str) -> bytes | None:
        """The object's bytes, or None if there is none."""
        full = self.full(path)
        with _storage_errors(path):
            try:
                if self.local:
                    return Path(full).read_bytes()
                with self.fs.open_input_stream(full) as stream:
                    return bytes(stream.read())
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open(self, path: str) -> Any:
        """A random-access file for reading."""
        with _storage_errors(path):
            return self.fs.open_input_file(self.full(path))

    def sha256(self, path: str) -> tuple[int, str]:
        """Size and digest of a stored file."""
        full = self.full(path)
        with _storage_errors(path):
            if self.local:
                with open(full, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256")
                    return stream.tell(), digest.hexdigest()
            with self.fs.open_input_stream(full) as stream:
                return digest_stream(stream)

    def list(self, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.full(folder), allow_not_found=True, recursive=recursive)
        with _storage_errors(folder):
            for _ in range(_LIST_TRIES):
                # A folder that appears or goes while Arrow looks is an error to it, even where absence is allowed.
                with suppress(FileNotFoundError):
                    return sorted(self.fs.get_file_info(selector), key=lambda info: info.path)
            return sorted(self.fs.get_file_info(selector), key=lambda info: info.path)

    def relative(self, info: pafs.FileInfo) -> str:
        return str(info.path)[len(self.root) + 1 :]

    def delete_folder(self, folder: str) -> None:
        fault_point(f"delete {folder}")
        full = self.full(folder)
        with _storage_errors(folder):
            if self.fs.get_file_info(full).type != pafs.FileType.NotFound:
                self.fs.delete_dir(full)

    def delete(self, path: str) -> None:
        fault_point(f"delete {path}")
        with _storage_errors(path):
            self.fs.delete_file(self.full(path))

    @cached_property
    def _conditional(self) -> Any:
        return conditional.connect(self.uri, getattr(self.fs, "region", ""))


def normal_uri(uri: str) -> str:
    """An absolute URI without a trailing slash; a plain path is a local store."""
    if "://" not in uri:
        uri = "file://" + str(Path(uri).expanduser().absolute())
    scheme = uri.split("://", 1)[0]
    if scheme not in ("file", "s3", "gs"):
        raise ConfigError(f"'{uri}' has scheme '{scheme}': use file://, s3:// or gs://, or a path")
    where = uri.partition("://")[2].rstrip("/")
    if ".." in where.split("/") or set(where) & set("?%#") or not where or (scheme == "file" and where[0] != "/"):
        raise ConfigError(
            f"'{uri}' must be a plain URI such as s3://bucket/folder or file:///folder, without '..', '?', '%' or '#'"
        )
    return f"{scheme}://{where}"


def open_external(uri: str) -> BinaryIO:
    """A file outside the store (a raw log), as a stream of its stored bytes."""
    try:
        if "://" not in uri:
            return open(uri, "rb")
        fs, path = external(uri)
        stream: BinaryIO = fs.open_input_file(path)
        return stream
    except OSError as error:
        raise InputError(f"{uri}: {error.strerror or error}: check the path and the permissions") from error


def external(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path of a URI outside the store."""
    try:
        fs, path = pafs.FileSystem.from_uri(uri + endpoint_query(uri))
    except ValueError as error:
        raise InputError(f"'{uri}' cannot be opened: {error}: use a path, s3:// or gs://") from error
    except OSError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"'{uri}' cannot be reached: {reason}: check the network and the credentials") from error
    return fs, path


def endpoint_query(uri: str) -> str:
    """What pyarrow must be told of an S3 endpoint that is not Amazon's."""
    endpoint = conditional.s3_endpoint()
    if not uri.startswith("s3://") or not endpoint:
        return ""
    parts = urlsplit(endpoint)
    return f"?scheme={parts.scheme}&endpoint_override={parts.netloc}"


def digest_stream(stream: Any) -> tuple[int, str]:
    """Size and sha256 of what a stream holds."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def _write_beside(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(6)}{UNFINISHED}")
    try:
        with open(temporary, "xb") as raw:
            raw.write(data)
            raw.flush()
            os.fsync(raw.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _link_new(target: Path, data: bytes, root: Path) -> bool:
    """A hard link fails if the name exists and publishes all bytes at once; O_EXCL alone could publish half."""
    temporary = _write_beside(target, data)
    try:
        fault_point(f"link {target.name}")
        os.link(temporary, target)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    for folder in target.parents:
        _fsync_folder(folder)
        if folder == root:
            break
    return True


def _replace_local(target: Path, old: bytes, new: bytes, root: Path) -> bool:
    """Compare and rename under a lock of the whole store, which the kernel releases with the process."""
    temporary = _write_beside(target, new)
    try:
        fault_point(f"rename {target.name}")
        with open(root / "replace.lock", "ab") as lock:
            _lock(lock.fileno())
            if not target.is_file() or target.read_bytes() != old:
                return False
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(target.parent)
    return True


def _lock(descriptor: int) -> None:
    until = time.monotonic() + _REPLACE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > until:
                raise FlywheelError(
                    f"store: replace.lock was held by another process for {_REPLACE_SECONDS:.0f} s: look for one that "
                    "hangs, then run again"
                ) from error
            time.sleep(0.05)


def _fsync_folder(folder: str | Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_ADVICE = {
    errno.ENOSPC: "no space left: free some and run again; what was committed is intact",
    errno.EDQUOT: "the disk quota is used up: free some space and run again; what was committed is intact",
    errno.EFBIG: "the file is larger than this system allows",
    errno.EROFS: "the store is read-only: mount it writable or set store.uri",
    errno.EACCES: "permission denied: check who owns the store",
    errno.EPERM: "not permitted: check who owns the store",
}


@contextmanager
def medium_errors(where: str) -> Iterator[None]:
    """A full disk and its like become one line with advice; anything else passes through untouched."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise
        raise FlywheelError(f"{where}: {advice}") from error


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    """Whatever keeps a store from answering is one line; that something is not there is for the caller to say."""
    from obstore.exceptions import BaseError

    try:
        with medium_errors(f"store: {path}"):
            yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError):
        raise
    except (OSError, BaseError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FlywheelError(
            f"store: {path}: {reason}: check store.uri, the credentials and that the store can be reached"
        ) from error
