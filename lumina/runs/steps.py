"""Checkpoints on disk: a step exists whole or not at all, and every byte of it can be checked.

A step is written into `.writing-STEP`. `commit` then records the size and SHA-256 of each file in its manifest, syncs all to
disk, and renames the directory to STEP: that rename is the mark that makes the step exist. Only then may older steps go, each
renamed out of sight before anything in it is deleted. Whatever instant a machine dies at, what is left is whole steps and
leftovers that `clean` removes.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from lumina.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
# Of errors in reading, these tell of the files; any other (EIO, ESTALE, EMFILE, ...) tells of the storage or the machine.
DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL)
NUMBER = "0|[1-9][0-9]*"


class Steps:
    """The steps in one directory. Of several processes one writes, the one that holds the run's lock."""

    def __init__(self, path: Path, keep: int = 2, keep_every: int = 0):
        """`keep` newest steps stay, and those that `keep_every` divides (0: none), the best one and pinned ones."""
        self.path, self.keep, self.keep_every = path, keep, keep_every

    def all(self) -> list[int]:
        """The steps that exist, oldest first; not whether they verify."""
        if not self.path.is_dir():
            return []
        return sorted(int(each.name) for each in self.path.iterdir() if re.fullmatch(NUMBER, each.name) and each.is_dir())

    def directory(self, step: int) -> Path:
        return self.path / str(step)

    def writing(self, step: int) -> Path:
        """Where a step is before it exists."""
        return self.path / f".writing-{step}"

    # ---------------------------------------------------------------------------------------------------- writing

    def begin(self, step: int) -> Path:
        """An empty directory to write the step into; what an earlier attempt left goes first, to make room."""
        self.clean()
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            sync_directory(self.path.parent)
        directory = self.writing(step)
        directory.mkdir()
        return directory

    def commit(self, step: int, manifest: dict[str, Any]) -> None:
        """Make the step exist: its files are hashed and synced, then the manifest, then the rename, each before the next.

        Raises OSError where the disk fails, and leaves every older step as it was.
        """
        directory = self.writing(step)
        write_manifest(directory, {"step": step, **manifest})
        for parent in sorted({path for path in directory.rglob("*") if path.is_dir()}, reverse=True):
            sync_directory(parent)
        sync_directory(directory)
        os.rename(directory, self.directory(step))
        sync_directory(self.path)

    def abandon(self, step: int) -> None:
        """Drop what was written of a step that cannot be finished."""
        shutil.rmtree(self.writing(step), ignore_errors=True)

    def clean(self) -> None:
        """Remove what an earlier process left half-written or half-deleted. Only the holder of the run's lock may."""
        if self.path.is_dir():
            for each in self.path.iterdir():
                if each.name.startswith((".writing-", ".deleting-")):
                    _delete(each)

    # ---------------------------------------------------------------------------------------------------- reading

    def manifest(self, step: int) -> dict[str, Any]:
        """What was recorded of the step; raises CheckpointError when it is missing or changed, OSError where storage fails."""
        return read_manifest(self.directory(step), step)

    def verify(self, step: int, contents: bool = True) -> list[str]:
        """What is wrong with the step, empty when nothing is: every file there, of its size and (`contents`) its hash.

        Raises OSError where storage fails for now, which says nothing against the step.
        """
        directory = self.directory(step)
        try:
            expected = self.manifest(step)["files"]
        except CheckpointError as error:
            return [str(error).removeprefix(f"{directory}/")]
        found = {path.relative_to(directory).as_posix() for path in _files(directory)} - {MANIFEST}
        return [f"{name}: not in the manifest" for name in sorted(found - expected.keys())] + differing(
            directory, expected, contents
        )

    def set_aside(self, step: int) -> Path:
        """Rename a broken step out of the way, for a person to look at; nothing is deleted."""
        target, number = self.path / f"broken-{step}", 2
        while target.exists():
            target, number = self.path / f"broken-{step}-{number}", number + 1
        os.rename(self.directory(step), target)
        sync_directory(self.path)
        return target

    def broken(self) -> list[Path]:
        """What was set aside."""
        return sorted(self.path.glob("broken-*"))

    # -------------------------------------------------------------------------------------------------- retention

    def pinned(self) -> set[int]:
        """Steps that a person wants to stay."""
        names = [each.name.removeprefix("pinned-") for each in self.path.glob("pinned-*")]
        return {int(name) for name in names if re.fullmatch(NUMBER, name)}

    def pin(self, step: int) -> None:
        if step not in self.all():
            raise CheckpointError(f"{self.path}: no step {step} to pin; there are {', '.join(map(str, self.all())) or 'none'}")
        (self.path / f"pinned-{step}").touch()

    def unpin(self, step: int) -> None:
        (self.path / f"pinned-{step}").unlink(missing_ok=True)

    def superfluous(self, best: int | None) -> list[int]:
        """Steps that may go: not among the newest `keep` whole ones, nor best, pinned or divided by `keep_every`."""
        steps, whole = self.all(), 0
        stay = self.pinned() | {best} | {step for step in steps if self.keep_every and step % self.keep_every == 0}
        for step in reversed(steps):
            if whole == self.keep:
                break
            stay.add(step)
            whole += not self.verify(step, contents=False)  # one that lacks a file does not count as one of them
        return [step for step in steps if step not in stay]

    def remove(self, steps: Iterable[int], said: Callable[[int], None] = lambda step: None) -> None:
        """Delete steps, each out of sight at once; `said` is told of each."""
        for step in steps:
            doomed = self.path / f".deleting-{step}"
            _delete(doomed)
            os.rename(self.directory(step), doomed)
            sync_directory(self.path)
            _delete(doomed)
            self.unpin(step)
            said(step)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Record the size and SHA-256 of each file in `directory` beside `manifest`, which has at least `step`; all is synced."""
    files = {}
    for path in _files(directory):
        if path == directory / MANIFEST:  # of a commit that failed, and is tried again
            continue
        files[path.relative_to(directory).as_posix()] = _hash_and_sync(path)
    body = {"format": FORMAT, **manifest, "files": files}
    _write_synced(directory / MANIFEST, json.dumps({"manifest": body, "sha256": _digest(body)}, indent=1) + "\n")


def read_manifest(directory: Path, step: int | None = None) -> dict[str, Any]:
    """What was recorded of a directory, of `step` if that is given.

    Raises CheckpointError when it is missing or changed, OSError where storage fails.
    """
    path = directory / MANIFEST
    try:
        _require_regular(path)
        wrapped = json.loads(path.read_bytes())
        body = wrapped["manifest"]
        if wrapped["sha256"] != _digest(body):
            raise ValueError("its own hash does not match")
        if body["format"] != FORMAT or (step is not None and body["step"] != step):
            raise ValueError(f"it is of step {body['step']}, format {body['format']}")
        for name, entry in body["files"].items():
            _require_inside(name)
            if not {"bytes", "sha256"} <= entry.keys():
                raise ValueError(f"it has no size and hash of {name!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno not in DAMAGE:
            raise
        raise CheckpointError(f"{path}: not a manifest that can be trusted ({_short(error)})") from error
    return dict(body)


def differing(directory: Path, expected: dict[str, Any], contents: bool = True) -> list[str]:
    """The files of a manifest that are not there, or not of their size and (`contents`) their hash."""
    found = {path.relative_to(directory).as_posix() for path in _files(directory)}
    wrong = []
    for name, entry in expected.items():
        path = directory / name
        try:
            if name not in found:
                wrong.append(f"{name}: missing")
                continue
            _require_regular(path)
            if path.stat().st_size != entry["bytes"]:
                wrong.append(f"{name}: {path.stat().st_size} bytes, not {entry['bytes']}")
            elif contents and _sha256(path) != entry["sha256"]:
                wrong.append(f"{name}: its contents changed")
        except OSError as error:
            if error.errno not in DAMAGE:
                raise
            wrong.append(f"{name}: cannot be read ({error.strerror})")
    return wrong


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_files(directory: Path) -> None:
    """Make all that is in a directory durable, for another process to commit."""
    for path in _files(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for parent in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_directory(parent)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())


def _require_regular(path: Path) -> None:
    """Raise OSError for a link, which leads outside the step, and for a pipe, which may never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _delete(path: Path) -> None:
    """Remove a directory as far as the disk lets; of a link to one, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _hash_and_sync(path: Path) -> dict[str, Any]:
    _require_regular(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _require_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"file name {name!r} leads outside")


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
