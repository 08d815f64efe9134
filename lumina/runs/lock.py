"""One writer: the lock on a run directory."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from lumina.errors import UsageError

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # any other error: the file system knows no locks
PATIENCE = 1.0  # seconds: who asks whether a run is locked locks it for an instant, and a killed process takes one to be gone


class RunLock:
    """Held until `release` or the end of the process, however that comes: the kernel keeps it, not the file."""

    def __init__(self, path: Path):
        """Raises UsageError, with the holder's pid and host, when another process has it."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"{path}: cannot be opened ({error.strerror}); choose another --workdir") from error
        try:
            self._take()
        except OSError as error:
            os.close(self._fd)
            if error.errno not in HELD:
                raise UsageError(
                    f"{path}: this file system cannot lock files ({error.strerror}), so two trainers could write at once; "
                    "choose a --workdir on one that can"
                ) from error
            raise UsageError(
                f"{path.parent} is in use by {holder(path) or 'another process'}; "
                "wait for it, stop it, or choose another run directory"
            ) from error
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        with contextlib.suppress(OSError):  # who holds it is a courtesy; on a full disk the lock holds all the same
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, (json.dumps(record) + "\n").encode(), 0)

    def _take(self) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in HELD or time.monotonic() > until:
                    raise
            time.sleep(PATIENCE / 50)

    def release(self) -> None:
        os.close(self._fd)


def is_locked(path: Path) -> bool:
    """Whether a process of this machine (on a network file system that shares locks, of any) holds the lock now."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in HELD
    finally:
        os.close(fd)
    return False


def holder(path: Path) -> str:
    """Who wrote the lock file last, in words; empty when that cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return f"process {record['pid']} on {record['host']} since {record['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
