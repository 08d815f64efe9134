"""JSON lines that grow while a run goes on: whole lines or none, and a full disk never stops training."""

import errno
import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAITING = 100_000  # lines kept for a disk that has no room; older ones are dropped, and counted


class Journal:
    """Appends records to a file. Lines that the disk refuses wait in memory and follow as soon as it takes them."""

    def __init__(self, path: Path, warn: Callable[[str], None], step: int | None = None):
        """Records of steps after `step` are dropped from the file, and so is half a line at its end."""
        self.path, self.warn = path, warn
        self._waiting: deque[bytes] = deque(maxlen=WAITING)
        self._refused, self._lost = False, 0
        self._trimmed, self._step = True, step  # unless trimmed, the file holds steps after `_step`, or half a line
        self.trim(step)

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. A number that is not finite becomes null: JSON has no other word for it."""
        line = json.dumps(finite(record), allow_nan=False).encode() + b"\n"
        self._hash.update(line)
        self._bytes += len(line)
        self._lost += len(self._waiting) == WAITING
        self._waiting.append(line)
        self._drain()

    def trim(self, step: int | None) -> None:
        """Forget the records of steps after `step`: they will be made again."""
        self._waiting = deque((line for line in self._waiting if _is_record(line, step)), WAITING)
        self._step = min((each for each in (step, self._step) if each is not None), default=None)
        self._trimmed = False
        kept: list[bytes] = []
        try:
            kept = whole_lines(self.path, self._step)
            _shorten(self.path, kept)
            self._trimmed, self._step = True, None
        except OSError as error:
            self._refuse(error)
        data = b"".join([*kept, *self._waiting])
        self._hash, self._bytes = hashlib.sha256(data), len(data)

    def position(self) -> dict[str, Any]:
        """Length and SHA-256 of all lines so far, those that wait included; those on disk are synced."""
        self._drain()
        try:
            with self.path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            self._refuse(error)
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def _drain(self) -> None:
        if not self._waiting:
            return
        try:
            if not self._trimmed:
                trim_after(self.path, self._step)
                self._trimmed, self._step = True, None
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while self._waiting:
                    self._write(fd, self._waiting[0])
                    self._waiting.popleft()
            finally:
                os.close(fd)
        except OSError as error:
            self._refuse(error)
            return
        if self._refused:
            lost = f"; {self._lost} lines are lost" if self._lost else ", nothing is lost"
            self._refused, self._lost = False, 0
            self.warn(f"{self.path}: takes lines again{lost}")

    def _write(self, fd: int, line: bytes) -> None:
        end = os.fstat(fd).st_size
        if os.write(fd, line) < len(line):  # the disk filled up within the line
            self._trimmed = False  # unless the half of it can go now
            os.ftruncate(fd, end)
            self._trimmed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            self.warn(f"{self.path}: cannot be written ({error.strerror}); training goes on, its lines wait in memory")
        self._refused = True


def finite(value: Any) -> Any:
    """`value` with null for numbers that are not finite, such as a diverged run's losses: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trim_after(path: Path, step: int | None = None) -> list[bytes]:
    """Drop the records of steps after `step` and lines that are not whole; returns the lines that stay."""
    kept = whole_lines(path, step)
    _shorten(path, kept)
    return kept


def _shorten(path: Path, kept: list[bytes]) -> None:
    data, whole = path.read_bytes() if path.is_file() else b"", b"".join(kept)
    if data == whole:
        return
    if data.startswith(whole):  # as it is but for damage in the middle
        os.truncate(path, len(whole))
        return
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk it would take up room


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of a journal."""
    return [json.loads(line) for line in whole_lines(path)]


def whole_lines(path: Path, step: int | None = None) -> list[bytes]:
    """The lines of a journal that are whole, of steps up to `step`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if _is_record(line, step)]


def _is_record(line: bytes, step: int | None) -> bool:
    """Whether it is a whole line, of a step up to `step` unless that is None."""
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and isinstance(record, dict) and (step is None or record["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
