"""What is counted of a traced program, by hand on small ones."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from lumina_jax.census import census


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return census(jax.make_jaxpr(function)(*arrays))


def test_a_product_counts_two_for_each_multiplication_and_addition():
    assert counted(jnp.matmul, (3, 5), (5, 7)).flops == 2 * 3 * 5 * 7
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)).flops == 4 * 2 * 3 * 5 * 7


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def looped(a):
        def inner(x, _):
            return jax.lax.scan(lambda y, _: (y @ a, None), x, None, length=3)[0], None

        return jax.lax.scan(inner, a, None, length=4)[0]

    found = counted(looped, (8, 8))
    assert found.flops == 12 * 2 * 8**3
    longer = counted(lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=500)[0], (8, 8))
    assert longer.equations < found.equations  # a program is not longer for running longer


def test_a_ragged_product_counts_each_row_once():
    counts = jax.ShapeDtypeStruct((4,), jnp.int32)
    rows, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 5), (4, 5, 7)))

    def loss(rows, weights, counts):
        return jax.lax.ragged_dot(rows, weights, counts).sum()

    assert census(jax.make_jaxpr(loss)(rows, weights, counts)).flops == 2 * 32 * 5 * 7
    # Only the weights' gradient, and the rows': two products more.
    assert census(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(rows, weights, counts)).flops == 3 * 2 * 32 * 5 * 7


def test_what_a_device_sends_is_counted_by_kind_and_axes():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))

    def own(x):  # [16, 4] float32, 256 bytes
        whole = jax.lax.all_gather(x, "b", tiled=True)  # 1024 bytes
        part = jax.lax.psum_scatter(whole, "b", tiled=True)
        swapped = jax.lax.all_to_all(part, "b", 0, 1, tiled=True)
        moved = jax.lax.ppermute(swapped, "a", [(0, 1), (1, 0)])
        return jax.lax.psum(moved, ("a", "b"))

    step = jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(("a", "b")), out_specs=PartitionSpec(), check_vma=False)
    assert counted(lambda x: jax.lax.scan(lambda c, _: (c, step(x)), 0.0, None, length=3)[1], (128, 4)).collectives == {
        ("all_gather", ("b",)): (3 * 768, 3),
        ("reduce_scatter", ("b",)): (3 * 768, 3),
        ("all_to_all", ("b",)): (3 * 192, 3),
        ("permute", ("a",)): (3 * 256, 3),
        ("all_reduce", ("a", "b")): (3 * 2 * 256 * 7 // 8, 3),
    }


def test_large_constants_are_noticed():
    large = np.zeros((200, 200), np.float32)
    assert counted(lambda a: a + large, (200, 200)).constants == large.nbytes
    assert counted(lambda a: a + np.ones(3, np.float32), (3,)).constants == 0
