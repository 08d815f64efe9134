"""One writer to a run directory, whatever becomes of the process that was it."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from lumina.errors import UsageError
from lumina.runs import lock
from lumina.runs.lock import RunLock, holder, is_locked
from tests.waiting import GIVES_UP

HOLD = """
import subprocess, sys
from pathlib import Path
from lumina.runs.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
child = subprocess.Popen(sys.argv[2:], close_fds=False) if sys.argv[2:] else None
print(child.pid if child else 0, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(path, *child):
    """Another process that holds the lock and has started `child`, and the id of that."""
    command = [sys.executable, "-c", HOLD, str(path), *child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            first_line = process.stdout.readline().strip()
            assert first_line
            yield process, int(first_line)
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def refusal(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "PATIENCE", 0.0)
        with pytest.raises(UsageError) as error:
            RunLock(path)
    return str(error.value)


def fails(number):
    raise OSError(number, os.strerror(number))


def test_a_second_process_is_refused_with_id_and_host_of_the_first(path):
    with held_elsewhere(path) as (process, _):
        said = refusal(path)
    assert said.startswith(f"{path.parent} is in use by process {process.pid} on {socket.gethostname()} since 2")
    assert said.endswith("; wait for it, stop it, or choose another run directory")


def test_a_second_holder_in_one_process_is_refused(path):
    held = RunLock(path)
    assert f"process {os.getpid()} on " in refusal(path)
    held.release()


def test_a_refusal_leaves_the_lock_with_its_holder(path):
    held = RunLock(path)
    refusal(path)
    assert refusal(path)
    assert f"process {os.getpid()} on " in holder(path)
    held.release()


def test_a_released_lock_may_be_taken_again(path):
    for _ in range(3):
        RunLock(path).release()


def test_a_holder_that_is_killed_frees_the_lock(path):
    with held_elsewhere(path) as (process, _):
        process.send_signal(signal.SIGKILL)
        process.wait()
        RunLock(path).release()


def test_a_program_that_the_holder_started_does_not_keep_the_lock(path):
    with held_elsewhere(path, "sleep", "600") as (process, child):
        try:
            process.kill()
            process.wait()
            RunLock(path).release()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_dead_holders_record_is_replaced(path):
    path.write_text(json.dumps({"pid": 1, "host": "a" * 500, "since": "long ago"}) + "\n")
    held = RunLock(path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.release()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[]", b"3", b'{"pid": 3}', b"\0" * 50])
def test_a_holder_that_cannot_be_read_is_another_process(path, content):
    held = RunLock(path)
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path.parent} is in use by another process; wait")
    held.release()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_lock_is_refused(path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", lambda *_: fails(number))
    assert f"{path}: this file system cannot lock files ({os.strerror(number)})" in refusal(path)


def test_a_refused_lock_keeps_no_file_open(path, monkeypatch):
    held = RunLock(path)
    opened, closed = [], []
    real_open, real_close = os.open, os.close

    def open_and_tell(*args):
        opened.append(real_open(*args))
        return opened[-1]

    def close_and_tell(fd):
        closed.append(fd)
        real_close(fd)

    monkeypatch.setattr(os, "open", open_and_tell)
    monkeypatch.setattr(os, "close", close_and_tell)
    refusal(path)
    monkeypatch.undo()
    assert opened == closed != []
    held.release()


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("no/such/directory")])
def test_a_lock_that_cannot_be_opened_is_refused_by_name(path, make):
    make(path)
    assert f"{path}: cannot be opened" in refusal(path)


def test_on_a_full_disk_the_lock_holds_all_the_same(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: fails(errno.ENOSPC))
        held = RunLock(path)
    assert "in use by another process" in refusal(path)
    held.release()


def test_whether_a_lock_is_held_can_be_asked(path):
    with held_elsewhere(path) as (process, _):
        assert is_locked(path)
        process.kill()
        process.wait()
        assert not is_locked(path)


def test_where_there_is_no_lock_none_is_held_and_none_is_made(path):
    assert not is_locked(path)
    assert holder(path) == ""
    assert not path.exists()


def test_where_nothing_can_be_locked_nothing_is(path, monkeypatch):
    path.touch()
    monkeypatch.setattr(fcntl, "flock", lambda *_: fails(errno.ENOSYS))
    assert not is_locked(path)


def test_asking_takes_nothing_from_the_holder(path):
    held = RunLock(path)
    before = path.read_bytes()
    assert is_locked(path)
    assert path.read_bytes() == before
    assert refusal(path)
    held.release()


def test_asking_keeps_no_lock(path):
    path.touch()
    assert not is_locked(path)
    RunLock(path).release()


def test_a_lock_that_is_held_for_an_instant_is_waited_for(tmp_path, monkeypatch):
    asking = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(lock, "PATIENCE", GIVES_UP)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.close(asking))
    RunLock(tmp_path / "lock").release()
