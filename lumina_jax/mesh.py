"""The devices that share the work, and how arrays lie on them.

Each device takes some rows of every batch; parameters and optimizer are whole on each. Processes, one a host or several on one,
join when JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lumina.config import Config
from lumina.errors import ConfigError, UsageError

AXIS = "data"
ROWS, WHOLE = PartitionSpec(AXIS), PartitionSpec()
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


def make_mesh(config: Config) -> Mesh:
    """All devices, or the first `mesh.data`; raises ConfigError where the rows computed at once do not divide by them."""
    available, wanted = jax.device_count(), config.mesh.data
    count = available if wanted == -1 else wanted
    rows = config.train.batch_size // config.train.micro_batches
    if count > available or (jax.process_count() > 1 and count < available):
        works = f"at most {available}" if jax.process_count() == 1 else f"-1 or {available}, so that no process is left out"
        raise ConfigError(f"mesh.data = {wanted}: there are {available} devices; it must be {works}")
    if rows % count:
        fits = max(n for n in range(1, count + 1) if rows % n == 0)
        raise ConfigError(
            f"mesh.data = {wanted}: train.batch_size / train.micro_batches = {rows} rows cannot be split over {count} devices; "
            f"use a multiple of {count} rows" + (f", or mesh.data={fits}" if jax.process_count() == 1 else "")
        )
    return jax.make_mesh((count,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


def one_device() -> Mesh:
    """The first device alone."""
    return jax.make_mesh((1,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=jax.local_devices()[:1])


def whole(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, WHOLE)


def shaped_whole(mesh: Mesh, shapes: Any) -> Any:
    """Shapes and dtypes, every device to have all of each."""
    sharding = whole(mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def place_rows(mesh: Mesh, tree: Any) -> Any:
    """This process's rows as its part of arrays whose leading axis is spread over the devices."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree)


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


def own_copy(tree: Any) -> Any:
    """Whole arrays as this process's first device has them: what it computes with them waits for no other process."""
    return jax.tree.map(lambda a: a.addressable_data(0), tree)
