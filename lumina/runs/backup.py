"""Backups of a run: one tar file a step, in a second place, from which `restore` makes the run directory again.

A backup holds config, data, tokenizer, one step, the journals up to it, and last SHA256SUMS, the hashes of all these. It is
written under another name, and gets its own once it is whole and synced. An encrypted one is a tar of two files in the age
format: identity.age, a key under the passphrase, and run.tar.age, the backup under that key. The passphrase could encrypt the
backup itself, but pyrage then wants all of it in memory, and works for seconds, with a gigabyte, at each backup.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError, UsageError
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import whole_lines
from lumina.runs.steps import MANIFEST, Steps, sync_directory
from lumina.runs.units import gib

PASSPHRASE = "LUMINA_BACKUP_PASSPHRASE"  # noqa: S105  (the variable's name)
SHORTEST = 12  # characters of a passphrase
SUMS = "SHA256SUMS"
IDENTITY, ENCRYPTED = "identity.age", "run.tar.age"
BLOCK = 2**22
END = bytes(1024)  # of a tar file


class Backups:
    """The backups of one run in `checkpoint.backup_dir`, which it may share with other runs and other files."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig):
        """Clean up after an earlier process: only the holder of the run's lock may.

        Raises UsageError when the directory cannot take backups of this run, or they cannot be encrypted as the config asks.
        """
        named = f"checkpoint.backup_dir = {config.backup_dir!r}"
        self._run, self._keep = run, config.backup_keep
        self.path = Path(config.backup_dir).expanduser().resolve()
        if self.path.is_relative_to(run.path.resolve()):
            raise UsageError(f"{named}: inside the run directory {run.path}, and lost with it; choose a place on another disk")
        passphrase = _passphrase() if config.backup_encrypt else ""
        self._stem = f"{run.path.resolve().name}-{_identity(run)}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self._writing(self._file(10**12, ".age"))
            probe.write_bytes(b"")
            for each in self._mine(".writing-"):
                each.unlink()
        except OSError as error:
            raise UsageError(f"{named}: cannot be written ({error.strerror}); choose another place, or none") from error
        self._key = _new_key(passphrase) if config.backup_encrypt else None

    def make(self, step: int) -> Path:
        """Write a backup of a step that verifies, then remove older ones beyond `checkpoint.backup_keep`.

        Raises OSError or CheckpointError, and then leaves older backups as they were and nothing half-written.
        """
        target = self._file(step, ".age" if self._key else "")
        temporary = self._writing(target)
        members = list(_members(self._run, step))
        needed, free = sum(member.size for member in members), shutil.disk_usage(self.path).free
        if needed > free:  # rather than fill the disk to the brim, which others may be writing to
            raise OSError(errno.ENOSPC, f"{self.path} has {gib(free)} free, a backup takes {gib(needed)}")
        try:
            with temporary.open("wb", buffering=BLOCK) as file:  # age writes small pieces, each a wait for Python's lock
                if self._key:
                    _write_encrypted(file, _tar(members), self._key)
                else:
                    file.writelines(_tar(members))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(self.path)
        # After a rewind the newest is not the one of the highest step; it stays in any case.
        others = [each for each in self._mine() if each != target]
        for each in others[: max(0, len(others) - self._keep + 1)]:
            each.unlink()
        return target

    def _file(self, step: int, kind: str) -> Path:
        return self.path / f"{self._stem}-{step:09d}{kind}.tar"

    def _writing(self, file: Path) -> Path:
        return file.with_name(f".writing-{file.name}")

    def _mine(self, prefix: str = "") -> list[Path]:
        """The files of this run that are named so, by step."""
        pattern = re.compile(re.escape(prefix + self._stem) + r"-(\d{9,})(?:\.age)?\.tar")
        found = [(int(match[1]), path) for path in self.path.iterdir() if (match := pattern.fullmatch(path.name))]
        return [path for _, path in sorted(found)]


def restore(archive: Path, out: Path, passphrase: str | None = None) -> int:
    """Make the run directory `out` from a backup; returns its step.

    Raises UsageError when `out` holds something or a passphrase is needed, CheckpointError when the backup is damaged, the
    passphrase is not the one, or the disk fails; nothing is left behind then.
    """
    out = out.resolve()
    if not archive.is_file():
        raise UsageError(f"{archive}: no such file; give a backup, such as run-0a1b2c3d-000000200.tar")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already; give a directory that is new or empty")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".restoring-{out.name}-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); give another directory") from error
    try:
        run = temporary / "run"  # mkdtemp's own directory is closed to others
        run.mkdir()
        with _opened(archive, passphrase) as stream:
            _extract(stream, run)
        step = _require_run(run)
        for directory in [path for path in run.rglob("*") if path.is_dir()]:
            sync_directory(directory)
        sync_directory(run)
        os.rename(run, out)
        sync_directory(out.parent)
    except (OSError, ValueError, tarfile.TarError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CheckpointError(f"{archive}: cannot be restored: {why.splitlines()[0]}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return step


# -------------------------------------------------------------------------------------------------------- what goes in


class _Member(NamedTuple):
    """A file of a backup: the first `size` bytes of `source`, or these bytes; `sha256` is what they must hash to, if known."""

    name: str
    source: Path | bytes
    size: int
    sha256: str | None = None


def _members(run: RunDirectory, step: int) -> Iterator[_Member]:
    """Small files first, which are read now; the journals grow on, and their later lines are not of this step."""
    steps = Steps(run.checkpoints)
    if wrong := steps.verify(step, contents=False):  # contents are compared as they are copied: one reading, of what is kept
        raise CheckpointError(f"{steps.directory(step)}: not backed up: {wrong[0]}")
    manifest = steps.manifest(step)
    fixed = [run.config, run.data, *sorted(path for path in run.tokenizer.rglob("*") if path.is_file())]
    small = {path.relative_to(run.path).as_posix(): path.read_bytes() for path in fixed}
    small["metrics.jsonl"] = b"".join(whole_lines(run.metrics, step))
    small["events.jsonl"] = b"".join(whole_lines(run.events))
    small[f"checkpoints/{step}/{MANIFEST}"] = (steps.directory(step) / MANIFEST).read_bytes()
    for name, data in small.items():
        yield _Member(name, data, len(data))
    try:
        ledger = manifest["ledger"]
        yield _Member("ledger.jsonl", run.ledger if ledger["bytes"] else b"", ledger["bytes"], ledger["sha256"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{steps.directory(step) / MANIFEST}: does not say how far the ledger had come") from error
    for name, entry in manifest["files"].items():
        path = steps.directory(step) / name
        yield _Member(f"checkpoints/{step}/{name}", path, entry["bytes"], entry["sha256"])


def _identity(run: RunDirectory) -> str:
    """Eight hex digits that tell this run from others of its name: elsewhere, on other machines, copied, or here before it."""
    path = run.path / "backup-id"
    try:
        token = path.read_bytes() if path.is_file() else b""
        if not re.fullmatch(rb"[0-9a-f]{32}\n", token):
            token = secrets.token_hex(16).encode() + b"\n"
            with path.open("wb") as file:
                file.write(token)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another --workdir") from error
    return hashlib.sha256(token + os.fsencode(run.path.resolve())).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------- tar files


def _header(name: str, size: int) -> bytes:
    """512 bytes where the name has up to 100."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _tar(members: list[_Member]) -> Iterator[bytes]:
    """A tar file, piece by piece; raises CheckpointError at a file that is not what its manifest says."""
    sums = ""
    for name, source, size, sha256 in members:
        if not _is_plain(name):
            raise CheckpointError(f"{name!r}: not backed up: a backup cannot hold such a file name")
        yield _header(name, size)
        digest, left = hashlib.sha256(), size
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            while left and (block := file.read(min(left, BLOCK))):
                digest.update(block)
                left -= len(block)
                yield block
        if left or (sha256 and digest.hexdigest() != sha256):
            raise CheckpointError(f"{name}: not backed up: {f'{left} bytes are missing' if left else 'its contents changed'}")
        yield _padding(size)
        sums += f"{digest.hexdigest()}  {name}\n"
    data = sums.encode()
    yield _header(SUMS, len(data)) + data + _padding(len(data)) + END


def _file_in(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Any:
    """To read the member from; None unless it is a plain file, with its own bytes."""
    if member is None or member.type != tarfile.REGTYPE or member.issparse():
        return None
    return tar.extractfile(member)


def _extract(stream: BinaryIO, into: Path) -> None:
    """Write out the files of a tar file; raises ValueError, or what tarfile raises, unless it is a whole backup."""
    expected, found = "", {}
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            source = _file_in(tar, member)
            if source is None or not _is_plain(member.name):
                raise ValueError(f"it holds {member.name!r}, which no backup does")
            if member.name == SUMS:
                expected = source.read().decode()
                continue
            target, digest = into / member.name, hashlib.sha256()
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                while block := source.read(BLOCK):
                    digest.update(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            found[member.name] = digest.hexdigest()
    while stream.read(BLOCK):  # age tells at the end whether anything is missing there
        pass
    if not expected:
        raise ValueError(f"it ends before its {SUMS}: cut short, or damaged")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in expected.splitlines())}
    if wrong := sorted(name for name in sums.keys() | found.keys() if sums.get(name) != found.get(name)):
        raise ValueError(f"{wrong[0]}: damaged" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))


def _require_run(path: Path) -> int:
    """The one step of a run directory that is whole; raises ValueError."""
    run, steps = RunDirectory(path), Steps(path / "checkpoints")
    if not (run.config.is_file() and run.data.is_file() and run.tokenizer.is_dir() and len(steps.all()) == 1):
        raise ValueError("it is not a backup of a run: config.json, data.json, tokenizer/ and one step")
    if wrong := steps.verify(steps.all()[0]):
        raise ValueError(wrong[0])
    return steps.all()[0]


def _is_plain(name: str) -> bool:
    """Whether it stays inside, has one spelling, and needs no quoting in a list of hashes."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts and name.isprintable() and "\\" not in name


# --------------------------------------------------------------------------------------------------------- encryption


class _Key(NamedTuple):
    """Made at each start. It writes and cannot read: that takes the passphrase, which is not kept."""

    recipient: Any
    identity: bytes  # the part that reads, under the passphrase, as `age --identity` takes it


def _age() -> Any:
    try:
        import pyrage
    except ImportError as error:
        raise UsageError(
            "encrypted backups need a package that is not installed: pip install pyrage (the extra `encryption`)"
        ) from error
    return pyrage


def _passphrase() -> str:
    """Whoever gets hold of a backup may guess at leisure: some length is required."""
    passphrase = os.environ.get(PASSPHRASE, "")
    if len(passphrase) < SHORTEST:
        has = f"has {len(passphrase)} characters" if passphrase else "is not set"
        raise UsageError(f"checkpoint.backup_encrypt = True: ${PASSPHRASE} {has}; set it, to {SHORTEST} characters or more")
    _age()
    return passphrase


def _new_key(passphrase: str) -> _Key:
    identity = _age().x25519.Identity.generate()
    return _Key(identity.to_public(), _age().passphrase.encrypt(f"{identity}\n".encode(), passphrase))


class _Ends:
    """What age reads from and writes to. It tells of a failure there as text, so the failure itself is kept."""

    def __init__(self, chunks: Iterator[bytes], file: BinaryIO):
        self._chunks, self._file = chunks, file
        self._left = memoryview(b"")
        self.failure: BaseException | None = None

    def read(self, size: int) -> bytes:
        try:
            while not self._left and (chunk := next(self._chunks, None)) is not None:
                self._left = memoryview(chunk)
        except BaseException as error:
            self.failure = error
            raise
        piece, self._left = bytes(self._left[:size]), self._left[size:]
        return piece

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.failure = error
            raise


def _write_encrypted(file: BinaryIO, chunks: Iterator[bytes], key: _Key) -> None:
    """A tar file of the identity and the encrypted chunks, whose length is known only once they are written."""
    file.write(_header(IDENTITY, len(key.identity)) + key.identity + _padding(len(key.identity)))
    begins = file.tell()
    file.write(_header(ENCRYPTED, 0))
    ends = _Ends(chunks, file)
    try:
        _age().encrypt_io(ends, ends, [key.recipient])
    except _age().EncryptError as error:
        raise ends.failure or OSError(errno.EIO, f"cannot be encrypted ({error})") from error
    size = file.tell() - begins - tarfile.BLOCKSIZE
    file.write(_padding(size) + END)
    file.seek(begins)
    file.write(_header(ENCRYPTED, size))


@contextlib.contextmanager
def _opened(archive: Path, passphrase: str | None) -> Iterator[BinaryIO]:
    """The tar file that holds the run, encrypted or not."""
    with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        first = tar.next()
        if first is None or first.name != IDENTITY:
            file.seek(0)
            yield file
            return
        if not passphrase:
            raise UsageError(f"{archive}: is encrypted; set ${PASSPHRASE} to its passphrase")
        identity, encrypted = _file_in(tar, first), _file_in(tar, tar.next())
        if not identity or not encrypted:
            raise ValueError(f"it holds {IDENTITY}, but no {ENCRYPTED}: cut short, or damaged")
        age = _age()
        try:
            key = age.x25519.Identity.from_str(age.passphrase.decrypt(identity.read(BLOCK), passphrase).decode().strip())
        except (age.DecryptError, age.IdentityError) as error:
            raise ValueError(f"the passphrase is not the one it was made with, or {IDENTITY} is damaged ({error})") from error
        with _decrypted(encrypted, key) as stream:
            yield stream


@contextlib.contextmanager
def _decrypted(encrypted: Any, key: Any) -> Iterator[BinaryIO]:
    """age pushes what it has decrypted, and tarfile pulls: a pipe between them."""
    age, failures = _age(), []
    reading, writing = os.pipe()

    def decrypt() -> None:
        try:
            with open(writing, "wb") as pipe:
                age.decrypt_io(encrypted, pipe, [key])
        except Exception as error:  # of age, of the disk, or of a pipe that nobody reads any more
            failures.append(error)

    thread = threading.Thread(target=decrypt)
    thread.start()
    try:
        with open(reading, "rb") as stream:
            yield stream
    finally:  # with the reading end closed, what is still to be written fails, and the thread ends
        thread.join()
    if failures:
        raise ValueError(f"{ENCRYPTED} is damaged, or cut short ({failures[0]})")
