"""The whole suite's surroundings: on CPU, offline, in full precision, and with no trace in the user's cache."""

import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

# Environment variables, so that JAX is imported only by the tests that use it, and subprocesses agree.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ["HF_HUB_OFFLINE"] = "1"

# No deadline: an example's first run may compile. The same examples each time, so that a red run can be repeated; others with
# --hypothesis-profile=default.
settings.register_profile("lumina", deadline=None, derandomize=True)
settings.load_profile("lumina")


def pytest_configure(config: pytest.Config) -> None:
    # A shell's & leaves SIGINT ignored, and what a test starts and interrupts would inherit that: not so of what is handled.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers inherit these, and share one cache as two trainers would
        directory = tempfile.TemporaryDirectory(prefix="lumina-tests-")
        config.add_cleanup(directory.cleanup)
        os.environ["LUMINA_CACHE"] = os.path.join(directory.name, "lumina")
        os.environ["TIKTOKEN_CACHE_DIR"] = os.path.join(directory.name, "tiktoken")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(directory.name, "inductor")  # else /tmp, for all who were here
    _guard_network()


def _guard_network() -> None:
    """Fail a test that looks up or connects to another machine. It sees Python's sockets in this process only."""

    def guarded(call: Callable, host_of: Callable[..., Any]) -> Callable:
        def checked(*args: Any, **kwargs: Any) -> Any:
            host = host_of(*args, **kwargs)
            if not _is_this_machine(host):
                pytest.fail(f"reached for the network, at {host}: the suite runs offline")
            return call(*args, **kwargs)

        return checked

    def peer(sock: socket.socket, *args: Any) -> Any:
        return args[-1][0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name), peer))
    socket.getaddrinfo = guarded(socket.getaddrinfo, lambda host, *args, **kwargs: host)


def _is_this_machine(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:  # the name of another machine
        return False
    return address.is_loopback or address.is_unspecified
