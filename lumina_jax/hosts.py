"""The processes of one run, one a host or several on one: how they find each other, agree, and tell each other things."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lumina.errors import ConfigError, UsageError

JOINED_BY = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Join the other processes of this run, if the environment names any. Before anything else asks JAX for devices."""
    given = [name for name in JOINED_BY if os.environ.get(name)]
    if not given or jax.distributed.is_initialized():
        return
    if len(given) < len(JOINED_BY):
        missing = ", ".join(name for name in JOINED_BY if name not in given)
        raise UsageError(f"{given[0]} is set, so this is one of several processes: set {missing} as well")
    address, count, number = (os.environ[name] for name in JOINED_BY)
    try:
        jax.distributed.initialize(address, int(count), int(number))
    except ValueError as error:
        raise UsageError(f"{JOINED_BY[0]}={address} {JOINED_BY[1]}={count} {JOINED_BY[2]}={number}: {error}") from error


def agreed(value: Any) -> Any:
    """What the first process says, so that all do the same: None, a truth value, or a number from 0."""
    if jax.process_count() == 1:
        return value
    number = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return type(value)(number) if isinstance(value, bool) else None if number < 0 else number


def in_any(value: bool) -> bool:
    """Whether it holds in any process."""
    return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(value)).any())


def require_same(what: str, digest: str) -> None:
    """Raise a ConfigError, in all processes, unless each has the same: 64 hexadecimal digits."""
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        different = [number for number, each in enumerate(found) if (each != found[0]).any()]
        if different:
            raise ConfigError(f"{what}: process {different[0]} has another than process 0; start all with the same")


def tell(key: str, word: str) -> None:
    """Let other processes hear `word`. Of any thread: it goes over the coordination service, not over the devices."""
    _client().key_value_set(f"lumina/{key}", word)


def hear(key: str, seconds: float) -> str:
    """What was or will be told, waited for at most so long, in any thread; raises TimeoutError."""
    try:
        return str(_client().blocking_key_value_get(f"lumina/{key}", int(1000 * seconds)))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(str(error).splitlines()[0]) from error


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
