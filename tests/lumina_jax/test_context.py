"""Rows split over devices: the layout, tokens taken round the ring, and attention, each against the whole row on one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from lumina.config import load, override
from lumina.errors import ConfigError
from lumina.mesh import AXES
from lumina_jax import context
from lumina_jax.attend import attend_chunk, choose_attention
from lumina_jax.context import Row, attend_context, attend_context_splash, ring_take
from lumina_jax.device import forms
from tests.lumina_jax.oracles import assert_close, equations


def _mesh(n, **others):
    sizes = [{"context": n, **others}.get(axis, 1) for axis in AXES]
    devices = np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _on(mesh, function, in_specs, out_specs):
    """`function` on each device's parts; a specification is the axes that split rows and tokens, the first two dimensions."""
    in_specs, out_specs = (jax.tree.map(lambda axes: PartitionSpec(*axes.split()), specs) for specs in (in_specs, out_specs))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def _equations(function, *shapes):
    """Those on one device, in the first shard_map of `function`."""
    outer = equations(jax.make_jaxpr(function)(*shapes).jaxpr)
    inner = next(eqn.params["jaxpr"] for eqn in outer if eqn.primitive.name == "shard_map")
    return list(equations(inner))


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- layout


def _zigzag(x_BT, tokens, n, fill):
    """All devices' parts one after another, by slices: the order that Row promises."""
    chunk = math.ceil(tokens / (2 * n))
    padded = np.full((x_BT.shape[0], 2 * n * chunk, *x_BT.shape[2:]), fill, x_BT.dtype)
    padded[:, :tokens] = x_BT
    order = [j for rank in range(n) for j in (rank, 2 * n - 1 - rank)]
    return np.concatenate([padded[:, j * chunk : (j + 1) * chunk] for j in order], axis=1)


@pytest.mark.parametrize(("tokens", "n"), [(12, 2), (37, 4), (1, 2), (18, 3)])
def test_each_device_has_an_early_and_a_late_chunk_and_the_row_comes_back_whole(tokens, n):
    row, x = Row(tokens, n), _normal(2, tokens, 3)
    assert row.length % (2 * n) == 0
    assert tokens <= row.length < tokens + 2 * n
    assert row.share * n == row.length

    def there_and_back(x_BT):
        own = row.own(x_BT, 7.0)
        return own, row.whole(own)

    own, whole = _on(_mesh(n), there_and_back, ("data",), ("data context", "data"))(x)
    assert np.array_equal(own, _zigzag(x, tokens, n, 7.0))
    assert np.array_equal(whole, x)


@pytest.mark.parametrize(("tokens", "n"), [(12, 2), (37, 4), (18, 3)])
def test_an_address_is_where_the_token_lies(tokens, n):
    row, ids = Row(tokens, n), np.arange(tokens)
    parts = _zigzag(ids[None], tokens, n, -5)[0]
    address = np.asarray(row.address(ids))
    assert np.array_equal(parts[address], ids)
    assert np.array_equal(row.address(np.array([-1, 0, -1])), [-1, 0, -1])


def test_the_gradient_of_a_whole_row_is_summed_over_the_devices_that_used_it():
    row, n, weights = Row(10, 2), 2, _normal(2, 10, seed=1)

    def loss(x_Bt, weights_nT):
        def local(x_Bt):
            return jnp.sum(row.whole(x_Bt)[0] * weights_nT[0])

        return jax.grad(local)(x_Bt)

    gradient = _on(_mesh(n), loss, ("data context", "context"), "data context")(_normal(1, row.length), weights)
    assert_close(gradient, _zigzag(weights.sum(0)[None], 10, n, 0.0), 1e-6)


def test_on_one_device_nothing_is_split_and_no_axis_is_needed():
    row, x = Row(7, 1), _normal(2, 7, 3)
    assert (row.length, row.share) == (7, 7)
    assert row.own(x, 0) is x
    assert row.whole(x) is x
    assert np.array_equal(row.address(np.array([3, -1])), [3, -1])
    taken = ring_take(x, np.array([[6, -1], [0, 1]]), np.full((2, 7, 1), -1), 1)
    assert np.array_equal(taken, np.stack([[x[0, 6], np.zeros(3)], x[1, :2]]))


# ---------------------------------------------------------------------------------------------------------------- taking


def _wishes(n, groups, rows, size, places, reach, seed):
    """(address [groups, rows, n, places], back [groups, rows, n, size, 2]): who takes what, at most `reach[group]` away.

    Each token is taken at most twice; a fifth of the places stay empty.
    """
    rng = np.random.default_rng(seed)
    address, back = np.full((groups, rows, n, places), -1), np.full((groups, rows, n, size, 2), -1)
    for g, b, rank, m in np.ndindex(address.shape):
        owner, place = (rank + rng.integers(-reach[g], reach[g] + 1)) % n, rng.integers(size)
        free = np.flatnonzero(back[g, b, owner, place] < 0)
        if len(free) and rng.random() < 0.8:
            address[g, b, rank, m] = owner * size + place
            back[g, b, owner, place, free[0]] = rank * places + m
    return address, back


def _gathered_take(x_BND, address_BM, n):
    """The oracle: everything to everyone, then what is wanted."""
    x_BSD = jax.lax.all_gather(x_BND, "context", axis=1, tiled=True)
    taken = jnp.take_along_axis(x_BSD, jnp.maximum(address_BM, 0)[:, :, None], axis=1)
    return jnp.where(address_BM[:, :, None] < 0, 0, taken)


@pytest.mark.parametrize(("n", "reach"), [(2, (0, 1)), (3, (1, 0)), (4, (2, 0)), (4, (1, 2))])
def test_tokens_taken_round_the_ring_are_those_of_a_gathered_row_forward_and_backward(n, reach):
    groups, rows, size, places = 2, 2, 5, 4
    address, back = _wishes(n, groups, rows, size, places, reach, seed=n)
    assert max((address >= 0).sum((0, 1, 3))) > 0
    # Whole numbers: their sums are exact in any order.
    x, dy = (np.round(8 * _normal(groups * rows, n * count, 3, seed=count)) for count in (size, places))

    def both(x, address, back, dy):
        y, pull = jax.vjp(lambda x: ring_take(x, address, back, n), x)
        expected, expected_pull = jax.vjp(lambda x: _gathered_take(x, address, n), x)
        return y, pull(dy)[0], expected, expected_pull(dy)[0]

    flat = (address.reshape(groups * rows, -1), back.reshape(groups * rows, -1, 2))
    along = _on(_mesh(n, data=groups), both, ("data context",) * 4, ("data context",) * 4)
    y, dx, expected, expected_dx = along(x, *(index.astype(np.int32) for index in flat), dy)
    assert np.array_equal(y, expected)
    assert np.array_equal(dx, expected_dx)
    assert np.any(dx != 0)


@pytest.mark.parametrize(
    ("owners", "rounds"),
    [((0, 1, 2, 3), 0), ((1, 1, 2, 3), 1), ((3, 0, 1, 2), 1), ((2, 1, 2, 3), 2), ((-1, -1, -1, -1), 0)],
    ids=["all_at_home", "one_next_door", "round_the_end", "opposite", "nothing_wanted"],
)
def test_blocks_travel_only_as_far_as_the_farthest_wish(owners, rounds):
    size = 5
    address = np.array([[owner * size if owner >= 0 else -1 for owner in owners]], np.int32)
    back = np.full((1, 4 * size, 1), -1, np.int32)

    def count(x, address, back):
        return context._ring_forward(x, address, back, 4)[1][1][None]

    counted = _on(_mesh(4), count, ("data context",) * 3, "context")(_normal(1, 4 * size, 2), address, back)
    assert list(counted) == [rounds] * 4


@pytest.mark.parametrize(("n", "permutes"), [(2, 1), (4, 2)])
def test_blocks_move_inside_the_counted_loop_alone_and_are_never_gathered(n, permutes):
    mesh = _mesh(n)
    take = _on(mesh, functools.partial(ring_take, n=n), ("data context",) * 3, "data context")
    kinds = (((3,), "float32"), ((), "int32"), ((1,), "int32"))
    eqns = _equations(take, *(jax.ShapeDtypeStruct((1, 4 * n, *rest), dtype) for rest, dtype in kinds))
    loops = [eqn for eqn in eqns if eqn.primitive.name == "while"]
    assert len(loops) == 1
    moves = [eqn for eqn in equations(loops[0].params["body_jaxpr"].jaxpr) if eqn.primitive.name == "ppermute"]
    assert len(moves) == permutes
    names = [eqn.primitive.name for eqn in eqns]
    assert names.count("ppermute") == permutes
    assert "all_gather" not in names


# ------------------------------------------------------------------------------------------------------------- attention


def _example(tokens, heads=4, kv_heads=2, width=6, rows=2, dtype=np.float32):
    q, k, v, w = (
        (2 * _normal(rows, tokens, n, width, seed=i)).astype(dtype) for i, n in enumerate((heads, kv_heads, kv_heads, heads))
    )
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (rows, tokens)), axis=1).astype(np.int32)
    return q, k, v, segments, w


def _split(mesh, row, inner, fills=(0.0, 0.0, 0.0)):
    """(result, gradients) of whole rows, as the devices compute them: heads are split over `tensor`."""

    def local(q, k, v, segments, w):
        own = [row.own(x, fill) for x, fill in zip((q, k, v), fills, strict=True)]
        out, pull = jax.vjp(lambda q, k, v: inner(q, k, v, segments, row), *own)
        return row.whole(out), jax.tree.map(row.whole, pull(row.own(w, 0))), jnp.all(jnp.isfinite(out))[None]

    arrays, finite = PartitionSpec("data", None, "tensor"), PartitionSpec(AXES)
    in_specs, out_specs = (arrays, arrays, arrays, PartitionSpec("data"), arrays), (arrays, (arrays,) * 3, finite)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def _whole_row(q, k, v, segments, w):
    out, pull = jax.vjp(lambda q, k, v: attend_chunk(q, k, v, segments, segments), q, k, v)
    return out, pull(w)


def _assert_equal(split, whole, tolerance):
    for one, other in zip(jax.tree.leaves(split[:2]), jax.tree.leaves(whole), strict=True):
        assert_close(one, other, tolerance)
    assert np.all(split[2])


MESHES = {"context_2_tensor_2": {"n": 2, "data": 2, "tensor": 2}, "context_4": {"n": 4, "data": 2}, "context_3": {"n": 3}}


@pytest.mark.parametrize("block", [1024, 3], ids=["a_block_a_chunk", "blocks_that_do_not_divide_a_chunk"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_attention_over_devices_equals_that_of_the_whole_row_forward_and_backward(mesh, block, monkeypatch):
    monkeypatch.setattr(context, "BLOCK", block)
    example = _example(61)
    split = _split(_mesh(**mesh), Row(61, mesh["n"]), attend_context)(*example)
    _assert_equal(split, jax.jit(_whole_row)(*example), 5e-6)


def test_attention_over_devices_in_float64_stays_in_float64():
    example = _example(21, dtype=np.float64)
    with jax.enable_x64(True):
        split = _split(_mesh(2), Row(21, 2), attend_context)(*example)
        assert {x.dtype for x in jax.tree.leaves(split[:2])} == {jnp.dtype("float64")}
        _assert_equal(split, _whole_row(*example), 1e-13)


def test_a_packed_row_of_one_token_documents_returns_its_own_values_across_devices():
    q, k, v, _, w = _example(21)
    segments = np.tile(np.arange(21, dtype=np.int32), (2, 1))
    out, (dq, dk, dv), _ = _split(_mesh(2), Row(21, 2), attend_context)(q, k, v, segments, w)
    assert_close(out, np.repeat(v, 2, axis=2), 1e-6)
    assert_close(dv, w.reshape(2, 21, 2, 2, 6).sum(3), 1e-6)
    assert np.max(np.abs(dq)) < 1e-5  # a softmax over one key is flat
    assert np.max(np.abs(dk)) < 1e-5


def test_what_padding_holds_is_seen_by_no_token_and_gives_it_no_gradient():
    example, row, mesh = _example(29), Row(29, 4), _mesh(4)
    assert row.length > row.tokens
    zeros = _split(mesh, row, attend_context)(*example)
    others = _split(mesh, row, attend_context, fills=(3.0, -40.0, 1e4))(*example)
    assert all(np.all(finite) for finite in (zeros[2], others[2]))
    for one, other in zip(jax.tree.leaves(zeros[:2]), jax.tree.leaves(others[:2]), strict=True):
        assert np.array_equal(one, other)


def test_scores_far_apart_neither_overflow_nor_lose_their_gradient_across_devices():
    q, k, v, segments, w = _example(21)
    out, gradients, finite = _split(_mesh(2), Row(21, 2), attend_context)(30 * q, 30 * k, v, segments, w)  # in the thousands
    assert np.all(finite)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    assert_close(out, _whole_row(30 * q, 30 * k, v, segments, w)[0], 1e-3)


@pytest.mark.parametrize("count", [1, 3], ids=["one_block_a_chunk", "three_blocks_a_chunk"])
@pytest.mark.parametrize("n", [2, 4])
def test_every_visible_pair_of_blocks_is_worked_on_once_and_no_device_has_more(n, count, monkeypatch):
    monkeypatch.setattr(context, "BLOCK", 4)
    row = Row(2 * n * 4 * count, n)

    def own(_):
        pairs = context._pairs(row)
        return jnp.stack([pairs.query, pairs.query_place, pairs.key, pairs.key_place], axis=-1)[None]

    pairs = np.asarray(_on(_mesh(n), own, ("context",), "context")(np.zeros(n)))
    assert pairs.shape == (n, count * (2 * n * count + 1), 4)  # 2n + 1 a device where a chunk is one block
    places = _zigzag(np.arange(2 * n * count)[None], 2 * n * count, n, -1).reshape(n, -1)  # of blocks, by device
    for rank in range(n):
        assert np.array_equal(pairs[rank, :, 1], places[rank][pairs[rank, :, 0]])
        assert np.array_equal(pairs[rank, :, 3], places.reshape(-1)[pairs[rank, :, 2]])
    seen = sorted((q, k) for _, q, _, k in pairs.reshape(-1, 4))
    assert seen == [(q, k) for q in range(2 * n * count) for k in range(q + 1)]


def _equations_of_split(tokens, n, dtype):
    shapes = [jax.ShapeDtypeStruct((1, tokens, heads, 8), dtype) for heads in (4, 2, 2, 4)]
    segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return _equations(_split(_mesh(n), Row(tokens, n), attend_context), *shapes[:3], segments, shapes[3])


def test_only_the_pairs_are_computed_and_no_more_scores_than_of_one_pair_exist():
    heads, tokens, n = 4, 4 * 2500, 2
    eqns = _equations_of_split(tokens, n, jnp.float32)
    lengths = [eqn.params["length"] for eqn in eqns if eqn.primitive.name == "scan"]
    assert lengths == [3 * (4 * 3 + 1)] * 2  # a chunk is three blocks; there and back
    products = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 2 + 5  # all of them inside the scans
    assert max(product.outvars[0].aval.size for product in products) == heads * 834**2
    largest = max(out.aval.size for eqn in eqns for out in eqn.outvars if out.aval.shape)
    assert largest <= heads * 834**2


def test_softmax_and_the_sums_over_devices_run_in_float32_for_bfloat16():
    eqns = _equations_of_split(40, 2, jnp.bfloat16)
    names = ("exp", "reduce_scatter", "all_gather")
    dtypes = {name: [eqn.invars[0].aval.dtype.name for eqn in eqns if eqn.primitive.name == name] for name in names}
    # Keys and values are gathered once; the result and three gradients by the test.
    assert dtypes == {"exp": ["float32"] * 3, "reduce_scatter": ["float32"] * 2, "all_gather": ["bfloat16"] * 6}
    example = [jnp.asarray(x, jnp.bfloat16) if x.dtype == np.float32 else x for x in _example(40)]
    _assert_equal(_split(_mesh(2), Row(40, 2), attend_context)(*example), _whole_row(*example), 2**-6)


# ---------------------------------------------------------------------------------------------------------------- splash


def test_splash_over_devices_equals_the_whole_row_forward_and_backward(monkeypatch):
    monkeypatch.setattr(context, "splash_block", lambda length: 128)  # two blocks a chunk
    example, row = _example(1024, heads=2, kv_heads=1, width=128, rows=1), Row(1024, 2)
    split = _split(_mesh(2), row, functools.partial(attend_context_splash, interpret=True))(*example)
    _assert_equal(split, jax.jit(_whole_row)(*example), 1e-5)


def test_splash_is_told_which_blocks_are_visible_and_fetches_no_other():
    n, block = 2, 128
    row = Row(2 * n * 2 * block, n)

    def own(_):
        forward, to_keys = context._splash_masks(row, block)
        return tuple(x[None] for x in (forward.block_mask[0], forward.data_next[0], to_keys.data_next[0]))

    masks, next_keys, next_queries = map(np.asarray, _on(_mesh(n), own, ("context",), ("context",) * 3)(np.zeros(n)))
    places = _zigzag(np.arange(8)[None], 8, n, -1).reshape(n, -1)
    for rank in range(n):
        visible = places[rank][:, None] >= np.arange(8)
        assert np.array_equal(masks[rank] > 0, visible)
        steps = [(u, v) for u in range(4) for v in range(8)]
        for i, (u, v) in enumerate(steps):  # what is fetched is the next that is visible, in the kernel's order
            later = [b for a, b in steps[i:] if visible[a, b]]
            assert next_keys[rank, u, v] == (later[0] if later else 0)
        for v in range(8):
            for u in range(4):
                later = [a for a in range(u, 4) if visible[a, v]]
                assert next_queries[rank, u, v] == (later[0] if later else 3)


def test_splash_takes_larger_blocks_of_rows_so_long_that_its_tables_would_be_large():
    bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    assert context._splash_block(Row(131_072, 16), bfloat16) == 512
    assert context._splash_block(Row(1_048_576, 16), bfloat16) == 1024
    assert context._splash_block(Row(1_048_576, 16), float32) == 512


def test_splash_over_devices_lowers_for_tpu_forward_and_backward():
    row, mesh = Row(1024, 2), _mesh(2)
    shapes = [jax.ShapeDtypeStruct((1, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2, 2, 4)]
    segments = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    traced = _split(mesh, row, attend_context_splash).trace(*shapes[:3], segments, shapes[3])
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, dq, and dk with dv
    assert text.count("stablehlo.reduce_scatter") == 2
    assert "tensor<2x1x512x2x64xf32>" in text  # what they sum is in float32


# ---------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(("length", "expected"), [(2048, "splash"), (1024, "chunked")])
def test_splash_is_for_chunks_of_whole_blocks(length, expected):
    name, why = choose_attention("auto", "tpu", "bfloat16", length, context=8)
    assert name == expected
    assert expected == "splash" or "multiple of 2048, not 1024" in why


def test_a_form_that_needs_whole_rows_is_refused():
    with pytest.raises(ConfigError, match=r"reference takes rows on one device, not split over context; chunked would work"):
        choose_attention("reference", "cpu", "float32", 512, context=2)
    with pytest.raises(ConfigError, match="runs on tpu, not on cpu"):
        attend_context(*_example(8)[:4], Row(8, 2), "splash")


def test_a_run_is_told_the_form_that_its_split_rows_take():
    flags = ["--config.data.sequence_length=1024", "--config.train.compute_dtype=bfloat16", "--config.mesh.data=1"]
    config = override(load("debug"), flags)
    assert forms(config, "tpu")[0][1] == "splash"
    split = override(config, ["--config.mesh.context=8"])
    what, form, why = forms(split, "tpu")[0]
    assert (what, form) == ("attention", "chunked")
    assert "multiple of 2048, not 1024" in why
