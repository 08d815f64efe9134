"""Digests against slow integers in Python, and the accidents that they must find."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lumina.mesh import Sizes
from lumina_jax.digest import _sums, digests
from lumina_jax.mesh import ROWS, mesh_of, whole

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.standard_normal((4, 5)).astype(np.float32),
    "bfloat16": RNG.standard_normal(7).astype(jnp.bfloat16),
    "int32": RNG.integers(-9, 9, (2, 3)).astype(np.int32),
    "uint8": RNG.integers(0, 255, 6).astype(np.uint8),
    "bool": np.array([True, False, False, True]),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
}
WIDE = {"float64": RNG.standard_normal((3, 4)), "int64": RNG.integers(-(2**60), 2**60, 5)}


def digest(array):
    return digests({"it": array})["it"]


def mix(x):
    """MurmurHash3's finaliser, with Python's integers."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def slowly(array):
    array = np.asarray(array)
    size = min(array.dtype.itemsize, 4)
    data = array.tobytes()
    words = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    mixed = [mix(word ^ place * 0x9E3779B9 % 2**32) for place, word in enumerate(words)]
    return f"{sum(mixed) % 2**32:08x}{sum(m * m for m in mixed) % 2**32:08x}"


@pytest.mark.parametrize("name", ARRAYS)
def test_a_digest_is_that_of_slow_integers(name):
    assert digest(ARRAYS[name]) == slowly(ARRAYS[name])


def test_words_of_eight_bytes_count_as_two_of_four():
    with jax.enable_x64(True):
        found = digests(WIDE)
    assert found == {name: slowly(array) for name, array in WIDE.items()}


def test_many_arrays_at_once_have_the_digest_of_each():
    assert digests(ARRAYS) == {name: slowly(array) for name, array in ARRAYS.items()}
    assert digests({}) == {}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int32", "uint8"])
def test_every_flipped_bit_is_found(name):
    array = ARRAYS[name].ravel()[:3]
    changed = []
    for bit in range(8 * array.nbytes):
        data = bytearray(array.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        changed.append(np.frombuffer(bytes(data), array.dtype))
    found = set(digests(dict(enumerate(changed))).values())
    assert len(found) == len(changed)
    assert digest(array) not in found


def test_any_two_swapped_elements_are_found():
    array = np.arange(12, dtype=np.float32)
    swapped = {}
    for i in range(12):
        for j in range(i):
            swapped[i, j] = array.copy()
            swapped[i, j][[i, j]] = array[[j, i]]
    found = set(digests(swapped).values())
    assert len(found) == len(swapped)
    assert digest(array) not in found


def test_equal_numbers_of_other_bits_differ():
    assert digest(np.float32([0.0, 1.0])) != digest(np.float32([-0.0, 1.0]))
    quiet, payload = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert digest(quiet) != digest(payload)


def test_another_dtype_or_length_differs():
    ones = [np.ones(4, dtype) for dtype in (np.float32, np.int32, jnp.bfloat16)]
    zeros = [np.zeros(n, np.float32) for n in (1, 2, 3)]
    assert len({digest(array) for array in (*ones, *zeros)}) == 6


def test_a_digest_does_not_depend_on_how_an_array_lies_on_devices():
    mesh = mesh_of(Sizes(data=8), jax.devices())
    array = RNG.standard_normal((16, 3)).astype(np.float32)
    spread, copied = jax.device_put(array, NamedSharding(mesh, ROWS)), jax.device_put(array, whole(mesh))
    assert len(spread.addressable_shards[0].data) == 2
    assert digest(spread) == digest(copied) == digest(jnp.asarray(array)) == slowly(array)
    inner = jax.device_put(array.T.copy(), NamedSharding(mesh, PartitionSpec(None, mesh.axis_names)))
    assert digest(inner) == slowly(array.T)


def test_no_device_gathers_what_others_have():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("data", None, "fsdp"))
    lowered = _sums.lower([jax.ShapeDtypeStruct((64, 3, 64), dtype, sharding=split) for dtype in (jnp.float32, jnp.bfloat16)])
    gathered = re.findall(r"(\w+)\[([\d,]*)\][^=]* all-gather", lowered.compile().as_text())
    assert all(math.prod(map(int, shape.split(","))) <= 16 for _, shape in gathered), gathered
