"""The devices that share the work, and how arrays lie on them.

Which axes there are, and what each splits, is in `lumina.mesh`.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lumina.architecture import Tensor, layer_kinds, layer_plan, tensor_table
from lumina.config import Config
from lumina.errors import ConfigError
from lumina.mesh import AXES, RULES, Sizes, resolve
from lumina.mesh import ROWS as ROW_AXES
from lumina_jax.model import canonical_names
from lumina_jax.sharding import Axes

ROWS, WHOLE, EACH = PartitionSpec(ROW_AXES), PartitionSpec(), PartitionSpec(AXES)


def make_mesh(config: Config, devices: Any = None) -> Mesh:
    """The mesh that `config.mesh` asks for, of all devices or those given; what it does not need stays idle.

    Raises ConfigError as `lumina.mesh.resolve`, and where a process would be left without a device.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve(config, len(devices))
    if jax.process_count() > 1 and sizes.devices < len(devices):
        raise ConfigError(
            f"mesh: {sizes} takes {sizes.devices} of {len(devices)} devices; with several processes it must take all, "
            "such as by -1 for one axis"
        )
    return mesh_of(sizes, devices[: sizes.devices])


def slices_of(devices: Any) -> int:
    """Parts of the devices that only a network joins: those of a TPU."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def mesh_of(sizes: Sizes, devices: Any) -> Mesh:
    """A mesh of these devices: its axes along the wires of a TPU, `data` over its slices; elsewhere in their order."""
    slices = slices_of(devices)
    if sizes.data % slices:
        raise ConfigError(f"mesh.data = {sizes.data}: must be a multiple of {slices}, the slices that a network joins")
    if slices > 1:
        within, over = (sizes.data // slices, *sizes[1:]), (slices, 1, 1, 1, 1)
        arranged = mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)
    elif devices[0].platform == "tpu":
        arranged = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
    else:
        arranged = np.array(devices).reshape(tuple(sizes))
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device() -> Mesh:
    """The first device alone."""
    return mesh_of(Sizes(), jax.local_devices()[:1])


def axes_of(mesh: Mesh) -> Axes:
    """The sizes of a mesh, for the code on one device of it."""
    return Axes(**dict(mesh.shape))


# ------------------------------------------------------------------------------------------------ how arrays lie on it


def whole(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, WHOLE)


def specs(config: Config, tree: Any) -> Any:
    """How each leaf of a state, or of a part of one, lies on any mesh: split as its tensor is, else whole.

    Leaves that stack layers have one axis more, which is not split.
    """
    plan = layer_plan(layer_kinds(config.model))
    table = {tensor.name: tensor for tensor in tensor_table(config.model)}

    def spec(path: Any, _: Any) -> PartitionSpec:
        tensor = tensor_at(plan, table, path)
        if tensor is None:
            return WHOLE
        stacked = (None,) if tensor.name.startswith("blocks.") else ()
        return PartitionSpec(*stacked, *(over or None for over in RULES.layout(tensor)))

    return jax.tree_util.tree_map_with_path(spec, tree)


def tensor_at(plan: Any, table: dict[str, Tensor], path: Any) -> Tensor | None:
    """The row of the table, the first of those stacked, of what is at `path` in a state; None for what is no tensor."""
    for start, key in enumerate(path):
        if isinstance(key, jax.tree_util.DictKey):
            return table[canonical_names(plan, path[start:])[0]]
    return None


def shardings(config: Config, mesh: Mesh, tree: Any) -> Any:
    """`specs` on this mesh; with `optim.offload` the moments are in the host's memory."""

    def sharding(path: Any, spec: PartitionSpec) -> NamedSharding:
        away = config.optim.offload and spec is not WHOLE and getattr(path[0], "name", "") == "optimizer"
        return NamedSharding(mesh, spec, memory_kind="pinned_host" if away else None)

    return jax.tree_util.tree_map_with_path(sharding, specs(config, tree), is_leaf=_is_spec)


def shaped(config: Config, mesh: Mesh, shapes: Any) -> Any:
    """Shapes and dtypes of a state, or of a part of one, with shardings."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, shardings(config, mesh, shapes)
    )


def shaped_whole(mesh: Mesh, shapes: Any) -> Any:
    """Shapes and dtypes, every device to have all of each."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole(mesh)), shapes)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


def row_blocks(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """(which of n equal parts of a batch's rows this process reads, n): what its devices work on."""
    count = axes_of(mesh).row_parts
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((count,)).values()
    return tuple(sorted({index[0].indices(count)[0] for index in indices if index})), count


def place_rows(mesh: Mesh, tree: Any) -> Any:
    """The rows that this process has read, of all `row_blocks` in their order, as its part of arrays of all rows."""
    (blocks, count), sharding = row_blocks(mesh), NamedSharding(mesh, ROWS)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        size = len(array) // len(blocks)

        def part(index: Any) -> np.ndarray:
            first = blocks.index(index[0].indices(size * count)[0] // size) * size
            return array[first : first + size]

        return jax.make_array_from_callback((size * count, *array.shape[1:]), sharding, part)

    return jax.tree.map(place, tree)


def place_each(mesh: Mesh, value: Any) -> jax.Array:
    """int32 [N]: what each device's process says, a number a device."""
    sharding = NamedSharding(mesh, EACH)
    return jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.full(1, value, np.int32))


def own_copy(mesh: Mesh, tree: Any) -> Any:
    """The arrays whole on this process's first device: what it computes with them waits for no other process.

    All processes call it together, as what is split is gathered.
    """
    gathered = jax.jit(lambda tree: tree, out_shardings=whole(mesh))(tree)
    return jax.tree.map(lambda a: a.addressable_data(0), gathered)
