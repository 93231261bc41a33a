"""The `flywheel` command: how it starts, and how it ends when something goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import sys

INTERRUPTED = 128 + signal.SIGINT
_OF_A_PATH = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTEMPTY,
)  # fmt: skip


def main() -> None:
    """Entry point: errors meant for people are one line, and a signal unwinds so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers shows none then either
        from flywheel_tasks.app import run_app

        sys.exit(run_app(sys.argv[1:] or ["--help"]))
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run it again", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except OSError as error:
        from flywheel_tasks.core.commands import told
        from flywheel_tasks.core.errors import FlywheelError, InputError

        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        kind = InputError if where and error.errno in _OF_A_PATH else FlywheelError
        sys.exit(told(kind(f"{where}{error.strerror or error}: check the path, the permissions and the space left")))


if __name__ == "__main__":
    main()
