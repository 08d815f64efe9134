"""Who shares the work: the devices of one process."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lumina.errors import ConfigError
from lumina_jax.device import describe
from lumina_jax.mesh import ROWS, make_mesh, one_device, own_copy, place_rows, shaped_whole, whole
from tests.lumina_jax.tiny import tiny

ROOT = Path(__file__).parents[2]


def config(data, **train):
    made = tiny("dense", **train)
    made.mesh.data = data
    return made


@pytest.mark.parametrize(("data", "rows", "micro", "size"), [(1, 4, 1, 1), (4, 8, 1, 4), (4, 8, 2, 4), (-1, 16, 2, 8)])
def test_the_mesh_has_the_devices_that_were_asked_for(data, rows, micro, size):
    mesh = make_mesh(config(data, batch_size=rows, micro_batches=micro))
    assert list(mesh.devices.flat) == jax.devices()[:size]


@pytest.mark.parametrize(
    ("data", "rows", "micro", "works"),
    [
        (9, 9, 1, r"mesh.data = 9: 9 devices, and there are 8; their product must be at most 8"),
        (4, 6, 1, r"6 rows cannot be split over 4 devices; use a multiple of 4 rows, or mesh.data=3$"),
        (4, 8, 4, r"= 2 rows cannot be split over 4 devices; use a multiple of 4 rows, or mesh.data=2$"),
        (-1, 12, 1, r"mesh.data = 8: .* 12 rows cannot be split over 8 devices; .* or mesh.data=6$"),
        (3, 7, 1, r"or mesh.data=1$"),
    ],
)
def test_rows_that_cannot_be_split_are_refused_with_what_would_work(data, rows, micro, works):
    with pytest.raises(ConfigError, match=works):
        make_mesh(config(data, batch_size=rows, micro_batches=micro))


@pytest.mark.parametrize(
    ("axes", "changed", "says"),
    [
        ({"fsdp": 3}, {}, r"mesh.fsdp = 3: .* rows cannot be split over 3 devices; .* or mesh.fsdp=2$"),
        ({"data": -1, "fsdp": 3}, {}, r"mesh.data = -1: 8 devices cannot be split by the 3 of the other axes"),
        ({"tensor": 2}, {}, r"mesh.tensor = 2: blocks.0-1.attention.key has 1 of kv_heads, which cannot be split into 2"),
        ({"context": 4}, {"sequence_length": 20}, r"sequence_length = 20: must be a multiple of 8 for mesh.context = 4"),
        ({"context": 2}, {"dropout": 0.1}, r"model.dropout: must be 0 with mesh.context = 2"),
        ({"expert": 8}, {}, r"mesh.expert = 8: blocks.0-1.moe.experts.gate has 4 of expert, .* into 8"),
        ({"data": 2, "tensor": 8}, {}, r"mesh.data = 2, mesh.tensor = 8: 16 devices, and there are 8"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(axes, changed, says):
    made = tiny("moe", batch_size=8)
    made.data.sequence_length = changed.get("sequence_length", made.data.sequence_length)
    made.model.dropout = changed.get("dropout", 0.0)
    for axis, size in {"data": 1, **axes}.items():
        setattr(made.mesh, axis, size)
    with pytest.raises(ConfigError, match=says):
        make_mesh(made)


def test_of_the_axes_one_may_take_the_rest():
    made = tiny("moe", batch_size=8)
    made.mesh.data, made.mesh.fsdp, made.mesh.expert = 2, -1, 2
    assert dict(make_mesh(made).shape) == {"data": 2, "fsdp": 2, "expert": 2, "context": 1, "tensor": 1}


def test_rows_are_spread_in_order_and_whole_arrays_are_on_every_device():
    mesh = make_mesh(config(4, batch_size=8))
    batch = {"a": np.arange(24).reshape(8, 3).astype(np.int32), "b": np.arange(8).astype(np.float32)}
    placed = place_rows(mesh, batch)
    for name, array in batch.items():
        assert np.array_equal(placed[name], array)
        for i, shard in enumerate(placed[name].addressable_shards):
            assert np.array_equal(shard.data, array[2 * i : 2 * i + 2])
    shapes = shaped_whole(mesh, jax.eval_shape(lambda: batch))
    assert {name: (s.shape, s.dtype, s.sharding) for name, s in shapes.items()} == {
        name: (array.shape, array.dtype, whole(mesh)) for name, array in batch.items()
    }


def test_an_own_copy_is_the_whole_array_on_one_device():
    mesh = make_mesh(config(8, batch_size=8))
    array = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, ROWS))
    own = own_copy(mesh, {"a": array})["a"]
    assert np.array_equal(own, array)
    assert own.devices() == {jax.devices()[0]}


def test_a_device_tells_how_many_work_and_how_many_stay_idle():
    assert describe(make_mesh(config(8, batch_size=8))) == f"8 x cpu (cpu) as data 8, jax {jax.__version__}"
    assert describe(one_device()) == f"1 x cpu (cpu), jax {jax.__version__}; 7 more stay idle"
