"""Every instant at which a trainer changes names or syncs them, as ptrace sees it: where to kill it, or to let the call fail.

All threads are followed from the moment of `follow` on, and calls are counted over all of them, as they begin.
"""

import contextlib
import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Numbers of system calls, and which of their arguments are names: a directory's descriptor (or None) and a path.
CALLS = {
    "x86_64": {
        1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
        82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink", 257: "openat", 258: "mkdirat", 263: "unlinkat",
        264: "renameat", 316: "renameat2",
    },
}  # fmt: skip
NAMES = {
    "truncate": ((None, 0),),
    "rename": ((None, 0), (None, 1)),
    "mkdir": ((None, 0),),
    "rmdir": ((None, 0),),
    "unlink": ((None, 0),),
    "mkdirat": ((0, 1),),
    "unlinkat": ((0, 1),),
    "renameat": ((0, 1), (2, 3)),
    "renameat2": ((0, 1), (2, 3)),
    "openat": ((0, 1),),
}
WRITES = frozenset({"write", "pwrite64", "writev"})
DURABLE = frozenset(CALLS["x86_64"].values()) - WRITES - {"openat"}

POKEUSER, DETACH, SYSCALL, SEIZE, INTERRUPT, LISTEN, GET_SYSCALL_INFO = 6, 17, 24, 0x4206, 0x4207, 0x4208, 0x420E
OPTIONS = 1 | 8 | 1 << 20  # TRACESYSGOOD, TRACECLONE, EXITKILL
EVENT_STOP, ALL_CHILDREN = 128, 0x40000000
ENTRY, EXIT = 1, 2
ORIG_RAX, RAX = 120, 80  # in struct user of x86_64
AT_FDCWD = -100


class Call(NamedTuple):
    """One system call about a path below the directory that is watched."""

    name: str
    path: str  # relative; `from -> to` of a rename

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


def available() -> str:
    """Why this cannot be done here, or nothing."""
    if platform.system() != "Linux" or platform.machine() not in CALLS:
        return f"no table of system calls for {platform.system()} {platform.machine()}"
    try:
        limit = Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return "kernel.yama.ptrace_scope forbids ptrace" if limit == "3" else ""


def follow(
    pid: int,
    below: Path,
    act: Callable[[Call], Any],
    release: Callable[[], None],
    names: frozenset[str] = DURABLE,
    seconds: float = 120.0,
) -> tuple[list[Call], int | None]:
    """Follow a process until it ends, or `act` has said `leave`; returns its calls and its status, None if it was left.

    `act` is asked at the entry of each call of `names` below the directory, and says: None, go on; `kill`, before the call has
    done anything; `kill after`, when it has done it; `leave`; or an errno, with which the call is to fail without being made.
    """
    signal.signal(signal.SIGALRM, _too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        _seize(pid)
        release()
        return _follow(pid, str(below), act, names)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_late(*_: Any) -> None:
    raise TimeoutError("the traced trainer did not end")


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, thread: int, address: int = 0, data: Any = 0) -> int:
    result = _libc.ptrace(request, thread, address, data)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _seize(pid: int) -> None:
    known: set[int] = set()
    while new := {int(name) for name in os.listdir(f"/proc/{pid}/task")} - known:
        for thread in new:
            known.add(thread)
            try:
                _ptrace(SEIZE, thread, 0, OPTIONS)
                _ptrace(INTERRUPT, thread)
            except ProcessLookupError:
                continue


def _follow(pid: int, below: str, act: Callable[[Call], Any], names: frozenset[str]) -> tuple[list[Call], int | None]:
    table = CALLS[platform.machine()]
    calls: list[Call] = []
    pending: dict[int, Any] = {}  # what is to happen at the exit of a thread's call
    info = ctypes.create_string_buffer(88)
    threads: set[int] = set()
    while True:
        thread, status = os.waitpid(-1, ALL_CHILDREN)
        if not os.WIFSTOPPED(status):
            threads.discard(thread)
            if thread == pid:
                return calls, status
            continue
        threads.add(thread)
        number, event, deliver, how = os.WSTOPSIG(status), status >> 16, 0, SYSCALL
        try:
            if number == signal.SIGTRAP | 0x80:
                _ptrace(GET_SYSCALL_INFO, thread, len(info), info)
                operation = info.raw[0]
                if operation == ENTRY:
                    call_number, *arguments = struct.unpack_from("<7Q", info.raw, 24)
                    name = table.get(call_number)
                    call = _call(pid, name, arguments, below) if name in names else None
                    if call is not None:
                        calls.append(call)
                        wanted = act(call)
                        if wanted == "leave":
                            _detach(pid, threads, thread)
                            return calls, None
                        if wanted == "kill":
                            os.kill(pid, signal.SIGKILL)
                            continue
                        if wanted is not None:
                            pending[thread] = wanted
                            if isinstance(wanted, int):
                                _ptrace(POKEUSER, thread, ORIG_RAX, ctypes.c_void_p(-1))
                elif operation == EXIT and (wanted := pending.pop(thread, None)) is not None:
                    if wanted == "kill after":
                        os.kill(pid, signal.SIGKILL)
                        continue
                    _ptrace(POKEUSER, thread, RAX, ctypes.c_void_p(-wanted))
            elif event == EVENT_STOP:
                how = SYSCALL if number == signal.SIGTRAP else LISTEN
            elif not event:
                deliver = number
            _ptrace(how, thread, 0, deliver)
        except ProcessLookupError:  # killed meanwhile
            continue


def _detach(pid: int, threads: set[int], stopped: int) -> None:
    """Let all threads go on by themselves."""
    _ptrace(DETACH, stopped)
    left = threads - {stopped}
    for thread in list(left):
        try:
            _ptrace(INTERRUPT, thread)
        except OSError:
            left.discard(thread)
    while left:
        thread, status = os.waitpid(-1, ALL_CHILDREN)
        if not os.WIFSTOPPED(status):
            left.discard(thread)
            continue
        number, event = os.WSTOPSIG(status), status >> 16
        deliver = number if not event and number != signal.SIGTRAP | 0x80 else 0
        with contextlib.suppress(OSError):
            _ptrace(DETACH, thread, 0, deliver)
        left.discard(thread)


def _call(pid: int, name: str, arguments: list[int], below: str) -> Call | None:
    try:
        if name in NAMES:
            paths = [_path(pid, None if fd is None else arguments[fd], arguments[path]) for fd, path in NAMES[name]]
        else:
            paths = [os.readlink(f"/proc/{pid}/fd/{arguments[0]}")]
    except OSError:  # a descriptor that is closed, an address that is not mapped: the call fails by itself
        return None
    if name == "openat" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return None
    if not any(path == below or path.startswith(below + "/") for path in paths):
        return None
    return Call(name, " -> ".join(os.path.relpath(path, below) for path in paths))


def _path(pid: int, fd: int | None, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        path = os.fsdecode(memory.read(4096).split(b"\0", 1)[0])
    base = ctypes.c_int(fd & 0xFFFFFFFF).value if fd is not None else AT_FDCWD
    return os.path.join(os.readlink(f"/proc/{pid}/cwd" if base == AT_FDCWD else f"/proc/{pid}/fd/{base}"), path)
