"""Generated code runs shut in: what each attempt to get out gives (Table 3's code benchmarks)."""

from __future__ import annotations

import os
import socket
import time
import tracemalloc
from pathlib import Path

import pytest

from flywheel_tasks.core.errors import FlywheelError
from flywheel_tasks.evaluation import sandbox
from flywheel_tasks.evaluation.sandbox import Limits, passes

LIMITS = Limits(seconds=20, cpu_seconds=2, memory_mib=512, disk_mib=4)


@pytest.fixture(autouse=True, scope="module")
def _kernel() -> None:
    try:
        passes("pass")
    except FlywheelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [1, 2]",
        "from math import sqrt\nassert sqrt(4) == 2",
        "import collections, itertools, re, heapq, typing, functools",
        "open('scratch', 'w').write('x')\nassert open('scratch').read() == 'x'",
        "print('a' * 100_000)",
        "import bz2, ctypes, decimal, hashlib, lzma, pyexpat, unittest, zlib",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as file:\n    file.write(b'x')",
        "import os, sys\nassert sys.stdin.read() == ''\nassert open(os.devnull, 'w').write('x') == 1",
    ],
)
def test_an_honest_program_passes(program: str) -> None:
    assert passes(program, LIMITS) == "passed"


@pytest.mark.parametrize(
    "program",
    [
        "assert sorted([2, 1]) == [2, 1]",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "x = bytearray(2 << 30)",
        "open('big', 'wb').write(b'x' * (20 << 20))",
        "import os; os.setuid(0)",
        "import os; os.kill(os.getppid(), 9); raise SystemExit(1)",
        "import os\nassert len([p for p in os.listdir('/proc') if p.isdigit()]) < 0",
    ],
)
def test_a_wrong_or_greedy_program_fails(program: str) -> None:
    assert passes(program, LIMITS) == "failed"


def test_nothing_outside_is_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    target = tmp_path / "evil"
    home = Path(__file__).parent / "evil"
    library = Path(os.__file__).with_name("evil")
    for path in (target, home, library, Path("/dev/shm/evil"), Path("/var/tmp/evil")):
        assert passes(f"open({str(path)!r}, 'w').write('x')", LIMITS) == "failed"
        assert not path.exists()


def test_the_walls_cannot_be_taken_down_from_inside(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    program = f"""
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
attributes = struct.pack("QQQQ", 0, 1, 0, 0)
assert libc.syscall(442, -100, b"/usr", 0x8000, attributes, len(attributes)) != 0
assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) != 0
assert libc.unshare(0x40000000) != 0
open({str(tmp_path / "evil")!r}, "w")
"""
    assert passes(program, LIMITS) == "failed"
    assert not (tmp_path / "evil").exists()
    assert passes(program.rsplit("\n", 2)[0], LIMITS) == "passed", "each attempt was refused"


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert passes(code, LIMITS) == "failed"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_it_can_talk_to_nobody_on_this_machine(tmp_path: Path) -> None:
    """A socket, a pipe or a device that its user may open would be a way out, past any read-only mount."""
    tmp_path.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({server.getsockname()!r})"
        assert passes(code, LIMITS) == "failed"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ear = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert passes(f"open({str(pipe)!r}, 'w').write('x')", LIMITS) == "failed"
        assert os.read(ear, 1) == b""
    finally:
        os.close(ear)
    assert passes("open('/dev/zero', 'rb')", LIMITS) == "failed"


def test_it_sees_no_file_but_those_of_python(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("x")
    for path in (secret, Path(__file__), Path("/etc/passwd"), Path("/proc/self/environ")):
        assert path.exists()
        assert passes(f"open({str(path)!r})", LIMITS) == "failed"


def test_a_loop_and_a_fork_bomb_end() -> None:
    assert passes("while True: pass", LIMITS._replace(seconds=3)) in ("failed", "timed out")
    assert passes("import time; time.sleep(60)", LIMITS._replace(seconds=1)) == "timed out"
    bomb = "import os\nfor _ in range(1000):\n    os.fork()"
    assert passes(bomb, LIMITS._replace(seconds=5)) in ("failed", "timed out")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True:\n    os.write(1, b'x' * 65536)",
        "import os\nfor _ in range(4):\n    os.fork()\nwhile True:\n    os.write(1, b'x' * 65536)",
        "print('x' * (2 << 20))",
    ],
)
def test_a_flood_of_words_ends_at_a_mebibyte_and_does_not_fill_our_memory(program: str) -> None:
    tracemalloc.start()
    began = time.monotonic()
    try:
        assert passes(program, LIMITS) == "failed"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert time.monotonic() - began < 15, "it is killed at once, not when its time is over"


def test_a_program_longer_than_a_pipe_holds_arrives_whole() -> None:
    body = f"x = '{'y' * (1 << 20)}'\nassert len(x) == {1 << 20}"
    assert passes(body, LIMITS) == "passed"
    assert passes(f"raise SystemExit(0)\n{body}", LIMITS) == "failed"


def test_no_secret_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_USER_KEY", "secret")
    assert passes("import os; assert 'FLYWHEEL_USER_KEY' not in os.environ", LIMITS) == "passed"
    assert passes("open('/proc/1/environ').read().index('FLYWHEEL')", LIMITS) == "failed"


def test_without_namespaces_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(f"raise SystemExit({sandbox.NO_SANDBOX})")
    monkeypatch.setattr(sandbox, "_CHILD", child)
    with pytest.raises(FlywheelError, match="is not run"):
        passes("print('hello')")
