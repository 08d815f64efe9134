"""The transformer: embedding, segments of scanned layers, final norm, head.

B rows, T positions, D model width, V vocabulary, L layers, R repeats of a segment.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina import architecture
from lumina.architecture import (
    Segment,
    Tensor,
    block_tensors,
    embedding_tensor,
    head_tensor,
    layer_kinds,
    layer_plan,
    tensor_table,
)
from lumina.config import ModelConfig
from lumina.mesh import GATHERED_OVER
from lumina_jax.attention import Attention, Cache, RMSNorm
from lumina_jax.context import Row
from lumina_jax.feedforward import FeedForward
from lumina_jax.mod import MoD
from lumina_jax.moe import MoE, RouterBias
from lumina_jax.platform import target_platform
from lumina_jax.sharding import ALONE, Axes, gathers_again

# Repeats of a segment that training on a CPU compiles one by one: what the backward pass needs of a scanned layer is copied
# into and out of one large array, 3 to 9 % of a step (measured). More layers would take too long to compile.
UNROLLED = 8

# What the backward pass keeps of each layer besides its input; None: nothing.
REMAT = {"none": gathers_again, "full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}

Metrics = dict[str, dict[str, Any]]  # "moe" and "mod" -> name -> array with a leading axis over the layers that have it


class Variables(NamedTuple):
    """The arrays of a model, as pure pytrees."""

    params: nnx.State  # trained
    biases: nnx.State  # router biases: state, not trained


class Mode(NamedTuple):
    """What routing does; static, so that each mode is a program of its own."""

    training: bool = False  # MoE drops beyond its capacity; jitter and dropout draw
    top: bool = False  # MoD selects the top of each row, which sees the future: in training, and as control in a certificate
    tell: bool = False  # experts' metrics have what each token chose, and how nearly it chose another


TRAINING, CAUSAL = Mode(training=True, top=True), Mode()


class Block(nnx.Module):
    """x = x + attention(norm(x)); x = x + feedforward(norm(x)), the feed-forward dense or MoE, with MoD around it, around
    both, or not."""

    def __init__(self, model: ModelConfig, kind: str, param: Callable[[str], nnx.Variable]):
        self.attention_norm = RMSNorm(param("attention_norm.scale"), model.norm_eps)
        self.attention = Attention(model, param)
        self.feedforward_norm = RMSNorm(param("feedforward_norm.scale"), model.norm_eps)
        if kind.startswith("moe"):
            self.moe = MoE(model, param)
        else:
            self.feedforward = FeedForward("feedforward", model.activation, param)
        if kind.endswith("+mod"):
            self.mod = MoD(model, param)
        self.routes_block = model.mod.scope == "block"
        self.dropout = model.dropout

    def __call__(
        self, x_BtD, segments_BT, positions_BT, mode: Mode, layer=0, key_B=None, cache=None, written_BT=None, axes: Axes = ALONE
    ):
        """Returns ([B, t, D], metrics, cache). `layer` is its number; see `Transformer` for the others.

        x is a device's part of each row, in pieces over `context` and `tensor`. What computes is given the pieces of `tensor`
        together, as it has some heads and some of the feed-forward's width, and returns its share of a sum. Empty positions,
        those in no segment, take no part in routing.
        """
        keys = split_keys(key_B, 3) if key_B is not None else (None, None, None)
        row, tensor, real_BT = Row(segments_BT.shape[1], axes.context), ("tensor",), segments_BT >= 0

        def attention(row, z, segments, positions, written):
            mixed, after = self.attention(z, segments, positions, row, cache, written)
            return self._drop(mixed, mode, keys[0]), after

        def feedforward(row, z, taken):
            if hasattr(self, "moe"):
                out, metrics = self.moe(z, row, taken, mode.training, keys[1], mode.tell, axes)
            else:
                out, metrics = self.feedforward(z), {}
            return self._drop(out, mode, keys[2]), metrics

        def both(row, x, segments, positions, taken):
            """Attention and feed-forward among the tokens taken; what the others hold is in no segment of theirs."""
            segments = jnp.where(taken, segments, -1)
            written = taken if written_BT is None else written_BT & taken
            with jax.named_scope("attention"):
                mixed, after = attention(row, self.attention_norm(x), segments, positions, written)
            with jax.named_scope("feedforward"):
                out, metrics = feedforward(row, self.feedforward_norm(x + axes.sum(mixed, tensor)), taken)
            return mixed + out, metrics, after

        depth: dict[str, Any] = {}
        if hasattr(self, "mod") and self.routes_block:
            x_BTD = axes.gather(x_BtD, tensor, 1)
            selection, depth = self.mod(self.attention_norm(x_BTD), real_BT, positions_BT, layer, mode.top, row)
            change_BTD, experts, cache = selection.run(both, x_BTD, segments_BT, positions_BT, cache=cache, axes=axes)
            x_BtD = x_BtD + axes.scatter(change_BTD, tensor, 1)
        else:
            with jax.named_scope("attention"):
                z_BTD = axes.gather(self.attention_norm(x_BtD), tensor, 1)
                mixed_BTD, cache = attention(row, z_BTD, segments_BT, positions_BT, written_BT)
                x_BtD = x_BtD + axes.scatter(mixed_BTD, tensor, 1)
            with jax.named_scope("feedforward"):
                z_BTD = axes.gather(self.feedforward_norm(x_BtD), tensor, 1)
                if hasattr(self, "mod"):
                    selection, depth = self.mod(z_BTD, real_BT, positions_BT, layer, mode.top, row)
                    out_BTD, experts, _ = selection.run(
                        lambda row, z, taken: (*feedforward(row, z, taken), None), z_BTD, axes=axes
                    )
                else:
                    out_BTD, experts = feedforward(row, z_BTD, real_BT)
                x_BtD = x_BtD + axes.scatter(out_BTD, tensor, 1)
        return x_BtD, {group: of for group, of in (("moe", experts), ("mod", depth)) if of}, cache

    def _drop(self, x, mode: Mode, key_B):
        if not (mode.training and self.dropout and key_B is not None):
            return x
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:]))(key_B)
        return jnp.where(keep, x / (1 - self.dropout), 0)


class Transformer(nnx.Module):
    """Holds the parameters; each segment's are stacked over its repeats and scanned."""

    def __init__(self, model: ModelConfig, make: Callable[[list[Tensor]], nnx.Variable]):
        """`make` turns the table's rows of one tensor, a row for each repeat, into a variable; see `create`."""
        table = {tensor.name: tensor for tensor in tensor_table(model)}

        def block(segment: Segment, position: int) -> Block:
            def param(name: str) -> nnx.Variable:
                return make([table[f"blocks.{i}.{name}"] for i in segment.layers(position)])

            return Block(model, segment.kinds[position], param)

        self.plan = tuple(layer_plan(layer_kinds(model)))
        self.embedding = make([table["embedding.weight"]])
        self.segments = nnx.List([nnx.List([block(s, p) for p in range(len(s.kinds))]) for s in self.plan])
        self.final_norm = RMSNorm(make([table["final_norm.scale"]]), model.norm_eps)
        if not model.tie_embeddings:
            self.head = make([table["head.weight"]])
        self.model = model

    def __call__(
        self,
        inputs_BT,
        segments_BT,
        positions_BT,
        *,
        dtype,
        mode: Mode = CAUSAL,
        remat="none",
        key_B=None,
        caches=None,
        written_BT=None,
        axes: Axes = ALONE,
    ):
        """The last hidden state, normed [B, T, D] in `dtype`, with metrics, and with caches when given some.

        Args:
            inputs_BT, segments_BT, positions_BT: token ids, documents from 0 and positions within them, int32. A position of
                segment -1 is empty: it takes no part in routing, and no other sees it.
            dtype: of activations and of the parameters as they are used.
            mode: how layers route. In training dropout and jitter need `key_B`, a random key a row: what a row draws depends
                on nothing else, neither micro-batches nor the mesh.
            remat: what of each period of layers the backward pass recomputes, as in TrainConfig.
            caches: from `make_caches`: what each row's tokens follow, all in one document.
            written_BT: with caches: the tokens that count; the others are filling, and neither cached nor seen.
            axes: of the mesh, when called on a device of one: rows are whole, the hidden state is the device's part of them.
        """
        x_BTD = self._embed(Row(inputs_BT.shape[1], axes.context).own(inputs_BT, 0), dtype, axes)
        if self.model.scale_embeddings:
            x_BTD = x_BTD * jnp.sqrt(self.model.d_model).astype(dtype)
        keys_LB = split_keys(key_B, self.model.num_layers) if key_B is not None else None
        collected, new_caches = [], []
        for number, (segment, stacked) in enumerate(zip(self.plan, self.segments, strict=True)):
            R, period = segment.repeats, len(segment.kinds)
            layers = slice(segment.start, segment.start + R * period)
            numbers_Rp = jnp.arange(self.model.num_layers)[layers].reshape(R, period)
            keys_RpB = keys_LB[layers].reshape(R, period, -1) if keys_LB is not None else None

            def repeat(x, xs, kinds=segment.kinds):
                blocks, numbers_p, keys_pB, caches_p = xs
                metrics, caches_out = [], []
                for p, parts in enumerate(blocks):
                    block = self._whole(parts, kinds[p], dtype, axes)
                    k = keys_pB[p] if keys_pB is not None else None
                    c = caches_p[p] if caches_p is not None else None
                    x, m, c = block(x, segments_BT, positions_BT, mode, numbers_p[p], k, c, written_BT, axes)
                    metrics.append(m)
                    caches_out.append(c)
                return x, (metrics, caches_out)

            keeps_all = remat == "none" and not axes.live(GATHERED_OVER)
            body = repeat if keeps_all else jax.checkpoint(repeat, policy=REMAT[remat])
            xs = (list(stacked), numbers_Rp, keys_RpB, caches[number] if caches is not None else None)
            few = R <= UNROLLED and keeps_all  # which outside of a loop XLA would recompute early, and keep
            unroll = R if mode.training and few and target_platform() == "cpu" else 1
            x_BTD, (metrics, caches_out) = jax.lax.scan(body, x_BTD, xs, unroll=unroll)
            collected += [(segment.layers(p), metrics[p]) for p in range(period)]
            new_caches.append(caches_out)
        return self.final_norm(x_BTD), _in_layer_order(collected), (new_caches if caches is not None else None)

    def _embed(self, inputs_BT, dtype, axes: Axes):
        """Embeddings of the tokens [B, T, D]; over `tensor`, where each device has some of the vocabulary, its part of T."""
        table_VD = axes.whole(self.embedding[...], embedding_tensor(self.model), dtype).astype(dtype)
        if not axes.live(("tensor",)):
            return table_VD.at[inputs_BT].get(mode="clip")  # ids are checked where rows are made
        own_BT = inputs_BT - axes.place("tensor") * table_VD.shape[0]
        own_BT = jnp.where(own_BT >= 0, own_BT, table_VD.shape[0])  # out of range, as a negative one would count from the end
        return axes.scatter(table_VD.at[own_BT].get(mode="fill", fill_value=0), ("tensor",), 1)

    def _whole(self, block: Block, kind: str, dtype, axes: Axes) -> Block:
        """The layer with the weights that it computes with, gathered from the devices that keep parts; routers in float32."""
        if not axes.live(GATHERED_OVER):
            return block

        tensors = {tensor.name: tensor for tensor in block_tensors(self.model, kind)}

        def gathered(path: Any, part: jax.Array) -> jax.Array:
            name = ".".join(key.name for key in path[:-1])
            wide = "router" in name or "predictor" in name
            return axes.whole(part, tensors[name], jnp.promote_types(dtype, jnp.float32) if wide else dtype)

        return jax.tree_util.tree_map_with_path(gathered, block)

    def head_DV(self, dtype, axes: Axes = ALONE) -> jax.Array:
        """The output projection [D, V], over `tensor` some of its columns."""
        if self.model.tie_embeddings:
            return axes.whole(self.embedding[...], embedding_tensor(self.model), dtype).T.astype(dtype)
        return axes.whole(self.head[...], head_tensor(self.model), dtype).astype(dtype)


def split_keys(key_B, count: int):
    """`count` keys for each row, [count, B]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(key_B)


def _in_layer_order(collected: list[tuple[range, Metrics]]) -> Metrics:
    """Join the segments' stacked metrics into one array a name, in the order of the layers."""
    joined: Metrics = {}
    for group in ("moe", "mod"):
        parts = [(layers, metrics[group]) for layers, metrics in collected if group in metrics]
        if parts:
            order = np.argsort(np.concatenate([list(layers) for layers, _ in parts]))
            together = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *[metrics for _, metrics in parts])
            joined[group] = {name: array[order] for name, array in together.items()}
    return joined


def make_caches(model: ModelConfig, batch: int, length: int, dtype) -> list:
    """Empty key/value caches for `length` tokens, shaped as the segments are scanned. See also `fit_caches`."""

    def empty(R: int) -> Cache:
        shape = (R, batch, length, model.num_kv_heads, model.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((R, batch), jnp.int32))

    return [[empty(s.repeats) for _ in s.kinds] for s in layer_plan(layer_kinds(model))]


def routed_caches(model: ModelConfig, caches: list) -> list[Cache]:
    """The caches of layers that only some tokens take."""
    if model.mod.scope != "block":
        return []
    plan = layer_plan(layer_kinds(model))
    return [
        c
        for s, of_segment in zip(plan, caches, strict=True)
        for kind, c in zip(s.kinds, of_segment, strict=True)
        if kind.endswith("+mod")
    ]


def fit_caches(model: ModelConfig, caches: list, length: int) -> list:
    """The caches, those of layers that only some tokens take cut or grown to `length` places: memory for what is there."""

    def fit(cache: Cache) -> Cache:
        def resize(a: jax.Array) -> jax.Array:
            more = length - a.shape[2]
            return a[:, :, :length] if more <= 0 else jnp.pad(a, [(0, 0), (0, 0), (0, more), (0, 0), (0, 0)])

        return Cache(resize(cache.keys), resize(cache.values), cache.length)

    routed = {id(cache) for cache in routed_caches(model, caches)}
    return [[fit(cache) if id(cache) in routed else cache for cache in of_segment] for of_segment in caches]


def create(model: ModelConfig, seed: int) -> tuple[nnx.GraphDef, Variables]:
    """Initialise. A tensor's values depend on the seed and its canonical name, not on how layers are grouped."""
    key = jax.random.key(seed)

    def initial(tensor: Tensor) -> jax.Array:
        if tensor.std is None:
            return jnp.full(tensor.shape, tensor.constant, jnp.float32)
        own_key = jax.random.fold_in(key, zlib.crc32(tensor.name.encode()))
        return tensor.std * jax.random.normal(own_key, tensor.shape, jnp.float32)

    def make(rows: list[Tensor]) -> nnx.Variable:
        values = [initial(tensor) for tensor in rows]
        value = jnp.stack(values) if rows[0].name.startswith("blocks.") else values[0]
        return nnx.Param(value) if rows[0].trained else RouterBias(value)

    graphdef, *parts = nnx.split(Transformer(model, make), nnx.Param, RouterBias)
    return graphdef, Variables(*parts)


def merge(graphdef: nnx.GraphDef, variables: Variables) -> Transformer:
    """The callable model around these arrays."""
    return nnx.merge(graphdef, variables.params, variables.biases)


def canonical_names(plan: list[Segment], path: Any) -> list[str]:
    """The names of the tensors in the leaf at `path` of a params-shaped tree: one, or one for each repeat it stacks."""
    keys = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey | jax.tree_util.SequenceKey)]
    return architecture.canonical_names(plan, keys)


def by_canonical_name(model: ModelConfig, tree: nnx.State) -> dict[str, jax.Array]:
    """The arrays of a params-shaped (or biases-shaped) tree under their canonical names, a layer at a time."""
    plan = layer_plan(layer_kinds(model))
    named: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = canonical_names(plan, path)
        named.update(zip(names, leaf if names[0].startswith("blocks.") else [leaf], strict=True))
    return {t.name: named[t.name] for t in tensor_table(model) if t.name in named}


def from_canonical_names(model: ModelConfig, like: nnx.State, named: dict[str, Any]) -> nnx.State:
    """The inverse of `by_canonical_name`: a tree shaped as `like`."""
    plan = layer_plan(layer_kinds(model))

    def leaf(path: Any, _: Any) -> jax.Array:
        names = canonical_names(plan, path)
        return jnp.stack([named[n] for n in names]) if names[0].startswith("blocks.") else jnp.asarray(named[names[0]])

    return jax.tree_util.tree_map_with_path(leaf, like)
