"""The inside of the sandbox. Started as a script with the standard library alone; reads its program from stdin."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

NO_SANDBOX = 97
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x4000, 0x40000, 0x2, 0x4, 0x8
_MS_BIND = 0x1000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NODEV = 442, -100, 0x8000, 1, 4
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 24, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine, -1)
_PYTHON = ("/usr", "/lib", "/lib64", os.path.dirname(os.path.dirname(os.__file__)))
"""What Python needs of the machine: its standard library, and the shared libraries that this uses."""
_libc = ctypes.CDLL(None, use_errno=True)


def _must(result: int) -> None:
    """Half a sandbox is none."""
    if result != 0:
        os._exit(NO_SANDBOX)


def _write(path: str, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def _shut_in(folder: str, disk_mib: int) -> None:
    """Namespaces, and a new root on `folder`: a small memory disk that shows what Python needs, read-only."""
    user, group = os.getuid(), os.getgid()
    _must(_libc.unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWPID))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"65534 {user} 1")
    _write("/proc/self/gid_map", f"65534 {group} 1")
    _must(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    attributes = _MountAttributes(set=_ATTR_RDONLY | _ATTR_NODEV)
    size = ctypes.sizeof(attributes)
    _must(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(attributes), size))
    options = f"size={disk_mib}m,mode=0700".encode()
    _must(_libc.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options))
    for path in filter(os.path.isdir, _PYTHON):
        os.makedirs(folder + path, exist_ok=True)
        _must(_libc.mount(path.encode(), (folder + path).encode(), None, _MS_BIND | _MS_REC, None))
    os.chroot(folder)
    os.chdir("/")
    os.mkdir("tmp")
    os.mkdir("dev")
    _write(os.devnull, "")  # an ordinary file: what is printed there is lost with the memory disk
    os.chdir("tmp")


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def _powerless() -> None:
    """Whoever makes a namespace may do anything in it, undo the above too, until that is given up."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    header, none = _CapabilityHeader(version=0x20080522, pid=0), (ctypes.c_uint32 * 6)()
    _must(_libc.syscall(_CAPSET, ctypes.byref(header), ctypes.byref(none)))
    _must(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _limit(cpu_seconds: int, memory_mib: int, disk_mib: int, processes: int) -> None:
    sizes = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_FSIZE: disk_mib << 20,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in sizes.items():
        resource.setrlimit(kind, (most, most))


def main() -> None:
    folder, (cpu_seconds, memory_mib, disk_mib, processes) = sys.argv[1], map(int, sys.argv[2:6])
    program = sys.stdin.buffer.read()
    _must(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    try:
        _shut_in(folder, disk_mib)
    except OSError:
        os._exit(NO_SANDBOX)
    first = os.fork()  # the first process of the new namespace: when it ends, all that it started end
    if first:
        _, status = os.waitpid(first, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 1)
    _must(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _powerless()
    _limit(cpu_seconds, memory_mib, disk_mib, processes)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    exec(compile(program, "<generated>", "exec"), {"__name__": "__main__"})  # noqa: S102 - what the sandbox is for


if __name__ == "__main__":
    main()
