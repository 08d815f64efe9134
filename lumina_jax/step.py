"""One optimizer step and one evaluation step, as pure functions of arrays.

B rows, T positions, M micro-batches, N devices, W losses remembered.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from lumina.architecture import capacity, layer_kinds, layer_plan, tensor_table
from lumina.config import Config, GuardConfig, ModelConfig
from lumina.mesh import AXES, SEQUENCE
from lumina.mesh import ROWS as ROW_AXES
from lumina_jax.context import Row
from lumina_jax.loss import TokenSums, cross_entropy
from lumina_jax.mesh import EACH, ROWS, WHOLE, axes_of, one_device, shardings, specs, tensor_at
from lumina_jax.model import CAUSAL, TRAINING, Metrics, Mode, Transformer, Variables, canonical_names, create, merge
from lumina_jax.moe import balance_loss
from lumina_jax.optimizer import make_optimizer, schedule
from lumina_jax.sharding import Axes

Batch = dict[str, jax.Array]  # inputs, targets, weights, segments, positions, each [B, T]


class Guard(NamedTuple):
    """What tells a good update from a bad one. Part of the state, so that a resumed run decides as it would have."""

    losses_W: jax.Array  # float32: of the last updates that were made, all finite; NaN where there is none yet
    skipped: jax.Array  # int32: updates skipped in a row


class TrainState(NamedTuple):
    """All that a step changes. Random numbers derive from (seed, step); none are stored."""

    step: jax.Array  # int32: batches consumed
    variables: Variables
    optimizer: optax.OptState
    guard: Guard


class Controls(NamedTuple):
    """What may be turned while running: traced, so that turning it compiles nothing."""

    learning_rate_scale: float
    balance_weight: float
    z_weight: float
    predictor_weight: float
    update: bool  # False passes over the batch
    stop_N: Any  # int32, by device: its process was asked to stop; each learns of all


def controls(config: Config, update: bool = True, stop_N: Any = None) -> Controls:
    """The controls as the config sets them."""
    moe, mod = config.model.moe, config.model.mod
    stop_N = np.zeros(1, np.int32) if stop_N is None else stop_N
    return Controls(1.0, moe.balance_weight, moe.z_weight, mod.predictor_weight, update, stop_N)


def init_state(config: Config) -> tuple[nnx.GraphDef, TrainState]:
    """The graph definition and a fresh state, which may be traced."""
    graphdef, variables = create(config.model, config.train.seed)
    guard = Guard(jnp.full(config.guard.spike_window, jnp.nan, jnp.float32), jnp.zeros((), jnp.int32))
    optimizer = make_optimizer(config).init(variables.params)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), variables, optimizer, guard)


def state_shapes(config: Config) -> tuple[TrainState, nnx.GraphDef]:
    """The state as shapes and dtypes, nothing computed, and the graph definition."""
    graphdefs = []

    def state() -> TrainState:
        graphdef, fresh = init_state(config)
        graphdefs.append(graphdef)
        return fresh

    return jax.eval_shape(state), graphdefs[0]


def _auxiliary(metrics: Metrics, knobs: Controls) -> jax.Array:
    """The router losses, each the mean over the layers that have it, weighted."""
    total: Any = 0.0
    if "moe" in metrics:
        total += knobs.balance_weight * jnp.mean(metrics["moe"]["balance_loss"])
        total += knobs.z_weight * jnp.mean(metrics["moe"]["z_loss"])
    if "mod" in metrics:
        total += knobs.predictor_weight * jnp.mean(metrics["mod"]["predictor_loss"])
    return total


class Tokens(NamedTuple):
    """How many tokens of the whole batch each router sees, float32; at least 1, as they divide sums."""

    experts_L: jax.Array  # of the layers that have experts
    depth: jax.Array  # of every layer that has a depth router


def _tokens(model: ModelConfig, segments_BT: jax.Array, axes: Axes) -> Tokens:
    """From a device's rows. Only positions in a segment count; of those that a depth router selects the number is fixed.

    Summed in float32, as a batch may have more than 2^31; a device has fewer.
    """
    T = segments_BT.shape[1]
    real_B = jnp.sum(segments_BT >= 0, axis=1, dtype=jnp.int32)
    selected_B = jnp.minimum(real_B, capacity(T, model.mod.capacity))
    kinds = [kind for kind in layer_kinds(model) if kind.startswith("moe")]
    real, selected = jnp.maximum(axes.sum(jnp.stack([jnp.sum(real_B), jnp.sum(selected_B)]).astype(jnp.float32), ROW_AXES), 1)
    return Tokens(jnp.array([selected if kind.endswith("+mod") else real for kind in kinds]), real)


def _summarise(
    metrics: Metrics, segments_BT: jax.Array, tokens: Tokens, axes: Axes, balance_over: str, batch_load_LA: jax.Array | None
) -> Metrics:
    """Metrics by layer from what the layers tell: counts, and parts of means over all tokens of the batch, of these rows.

    Loads are counted over `balance_over` for the balance loss.
    """
    summary: Metrics = {}
    if "moe" in metrics:
        experts = dict(metrics["moe"])
        load_LBA, share_LBA = experts.pop("load_BA"), experts.pop("share_BA")
        load_LA = jnp.sum(load_LBA, axis=1)
        if balance_over == "micro_batch":
            load_LBA = axes.sum(load_LA, ROW_AXES)[:, None]
        elif balance_over == "batch" and batch_load_LA is not None:
            load_LBA = batch_load_LA[:, None]
        experts["balance_loss"] = balance_loss(load_LBA, share_LBA)
        summary["moe"] = {name: sum_L / tokens.experts_L for name, sum_L in experts.items()} | {"load_A": load_LA}
    if "mod" in metrics:
        depth, real_BT = metrics["mod"], segments_BT >= 0
        decided_LBT = depth["logit_BT"] > 0
        summary["mod"] = {
            "predictor_loss": depth["predictor_loss"] / tokens.depth,
            "causal_capacity": jnp.sum(decided_LBT & real_BT, axis=(1, 2), dtype=jnp.float32) / tokens.depth,
            "agreement": jnp.sum((decided_LBT == depth["taken_BT"]) & real_BT, axis=(1, 2), dtype=jnp.float32) / tokens.depth,
        }
    return summary


def make_train_step(
    config: Config, graphdef: nnx.GraphDef, mesh: Mesh | None = None, token_bytes: Any = None, dtype: Any = None
) -> Callable:
    """train_step(state, batch, controls) -> (state, metrics).

    The loss is the weighted sum over the whole batch divided by its weight, whatever the micro-batches and devices; router
    losses are means over the tokens that a router sees, empty positions left out. Both are sums of parts that already carry
    their share, so gradients simply add.

    A loss or gradient that is not finite, or a spike (`config.guard`), makes no update: of the state only `step` and the
    guard's count change. `metrics` has `skipped`, how many in a row, and `stop`, how many devices' processes asked to.

    Args:
        mesh: of the devices that share each batch; the first device when None.
        token_bytes: int [V], bytes of text a token stands for; `metrics` then has `text_bytes` of the targets, and
            `text_tokens`, how many there are.
        dtype: overrides the config's compute dtype.
    """
    optimizer, rate = make_optimizer(config), schedule(config.optim, config.train.steps)
    dtype, M = dtype or jnp.dtype(config.train.compute_dtype), config.train.micro_batches
    mesh = mesh or one_device()
    axes = axes_of(mesh)
    kinds = " ".join(layer_kinds(config.model))
    random = config.model.dropout > 0 or config.model.moe.jitter > 0

    balance_over = config.model.moe.balance_over
    if balance_over == "batch" and M == 1:
        balance_over = "micro_batch"

    def hidden(variables: Variables, micro: Batch, key_B: Any):
        model = merge(graphdef, variables)
        rows = (micro["inputs"], micro["segments"], micro["positions"])
        hidden_BtD, metrics, _ = model(*rows, dtype=dtype, mode=TRAINING, remat=config.train.remat, key_B=key_B, axes=axes)
        return model, hidden_BtD, metrics

    def micro_loss(params: nnx.State, biases: nnx.State, micro: Batch, of_batch: Any, knobs: Controls, key_B: Any, load_LA):
        weight, tokens = of_batch
        model, hidden_BtD, by_row = hidden(Variables(params, biases), micro, key_B)
        metrics = _summarise(by_row, micro["segments"], tokens, axes, balance_over, load_LA)
        sums = _loss(model, hidden_BtD, micro, dtype, axes)
        loss = sums.loss / weight
        # Each of the devices that work on the same rows has all of their metrics. Counts are summed over rows alone.
        same = axes.along(SEQUENCE)
        metrics = jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.integer) else a / same, metrics)
        return loss + _auxiliary(metrics, knobs), {"loss": loss, "accuracy": sums.correct / weight, **metrics}

    def of_own_rows(variables: Variables, batch: Batch, row_B: jax.Array, knobs: Controls, step: jax.Array):
        """From one device's parts of weights and rows: the sums over all devices, of gradients the parts that it keeps."""
        of_batch = axes.sum(jnp.sum(batch["weights"]), ROW_AXES), _tokens(config.model, batch["segments"], axes)
        # Every M-th row: so a micro-batch has the same rows on any number of devices.
        micros = jax.tree.map(lambda a: a.reshape(a.shape[0] // M, M, *a.shape[1:]).swapaxes(0, 1), (batch, row_B))
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), step) if random else None

        def part(index: Any):
            micro, row_b = jax.tree.map(lambda a: a[index], micros)
            key_b = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(row_b) if step_key is not None else None
            return micro, key_b

        def load_LA(index: Any) -> jax.Array:
            return jnp.sum(hidden(variables, *part(index))[2]["moe"]["load_BA"], axis=1)

        batch_load_LA = None
        if balance_over == "batch" and "moe" in kinds:  # known only when every row has been routed once
            batch_load_LA = axes.sum(_sum_over(M, load_LA), ROW_AXES)

        def gradients_of(index: Any):
            micro, key_b = part(index)
            (_, metrics), grads = jax.value_and_grad(micro_loss, has_aux=True)(
                variables.params, variables.biases, micro, of_batch, knobs, key_b, batch_load_LA
            )
            return grads, metrics

        grads, metrics = _sum_over(M, gradients_of)
        if token_bytes is not None:
            metrics["text_bytes"] = _text_bytes(token_bytes, batch)
            metrics["text_tokens"] = jnp.sum(batch["weights"] > 0, dtype=jnp.int32)
        # Counts are of whole rows, on each of a row's devices; all else is a device's share.
        metrics = jax.tree.map(lambda a: axes.sum(a, ROW_AXES if jnp.issubdtype(a.dtype, jnp.integer) else AXES), metrics)
        metrics["stop"] = axes.sum(jnp.sum(knobs.stop_N))
        return jax.tree_util.tree_map_with_path(summed, grads), metrics

    plan, table = layer_plan(layer_kinds(config.model)), {tensor.name: tensor for tensor in tensor_table(config.model)}

    def summed(path: Any, gradient: jax.Array) -> jax.Array:
        tensor = tensor_at(plan, table, path)
        assert tensor is not None  # noqa: S101, parameters all are
        return axes.sum(gradient, axes.not_splitting(tensor))

    same: Any = WHOLE
    of_controls = Controls(same, same, same, same, same, stop_N=EACH)
    shapes = state_shapes(config)[0]
    of_variables, lie = specs(config, shapes.variables), shardings(config, mesh, shapes)
    at_hand = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), lie.optimizer)
    gradients = jax.shard_map(
        of_own_rows,
        mesh=mesh,
        in_specs=(of_variables, ROWS, ROWS, of_controls, WHOLE),
        out_specs=(of_variables.params, WHOLE),
        check_vma=False,
    )

    def train_step(state: TrainState, batch: Batch, knobs: Controls):
        row_B = jnp.arange(batch["inputs"].shape[0], dtype=jnp.int32)
        grads, metrics = gradients(state.variables, batch, row_B, knobs, state.step)
        with jax.named_scope("optimizer"):
            learning_rate = rate(state.step) * knobs.learning_rate_scale
            before = jax.device_put(state.optimizer, at_hand) if config.optim.offload else state.optimizer
            direction, optimizer_state = optimizer.update(grads, before, state.variables.params)
            params = jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), state.variables.params, direction)
            biases = update_biases(config.model, state.variables.biases, metrics)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = learning_rate
        with jax.named_scope("guard"):
            good = is_good(config.guard, state.guard, metrics["loss"], metrics["gradient_norm"])
            made = good & knobs.update
            new = (Variables(params, biases), optimizer_state)
            variables, optimizer_state = jax.tree.map(
                lambda after, before: jnp.where(made, after, before), new, (state.variables, before)
            )
            guard = remember(state.guard, metrics["loss"], made, skipped=~good & knobs.update)
        metrics["skipped"] = guard.skipped
        if config.optim.offload:
            optimizer_state = jax.device_put(optimizer_state, lie.optimizer)
        else:
            optimizer_state = jax.lax.with_sharding_constraint(optimizer_state, lie.optimizer)
        variables = jax.lax.with_sharding_constraint(variables, lie.variables)
        return TrainState(state.step + 1, variables, optimizer_state, guard), metrics

    return train_step


def _loss(model: Transformer, hidden_BtD: jax.Array, batch: Batch, dtype: Any, axes: Axes) -> TokenSums:
    """A device's share of the sums over its rows."""
    row = Row(batch["targets"].shape[1], axes.context)
    with jax.named_scope("loss"):
        hidden_BTD = axes.gather(hidden_BtD, ("tensor",), 1)
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        targets_N, weights_N = (row.own(batch[name], 0).reshape(-1) for name in ("targets", "weights"))
        return cross_entropy(flat, model.head_DV(dtype, axes), targets_N, weights_N, axes)


def _sum_over(count: int, part: Callable[[Any], Any]) -> Any:
    """part(0) + ... + part(count - 1), one at a time, compiled once."""
    if count == 1:
        return part(0)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, 0))
    return jax.lax.fori_loop(0, count, lambda index, total: jax.tree.map(jnp.add, total, part(index)), zeros)


def is_good(config: GuardConfig, guard: Guard, loss: jax.Array, gradient_norm: jax.Array) -> jax.Array:
    """Whether an update with this loss and gradient is to be made: both finite, and the loss no spike over a full window."""
    good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if config.spike_sigmas:  # comparisons with NaN are false: before the window is full there are no spikes
        limit = jnp.mean(guard.losses_W) + config.spike_sigmas * jnp.std(guard.losses_W)
        good &= ~(loss > limit)
    return good


def remember(guard: Guard, loss: jax.Array, made: jax.Array, skipped: jax.Array) -> Guard:
    """The guard after an update that was made, skipped, or (neither) passed over."""
    losses_W = jnp.concatenate([guard.losses_W[1:], loss.astype(jnp.float32)[None]])
    return Guard(
        jnp.where(made, losses_W, guard.losses_W), jnp.where(made, 0, guard.skipped + skipped.astype(guard.skipped.dtype))
    )


def _text_bytes(token_bytes_V: Any, batch: Batch) -> jax.Array:
    return jnp.sum(jnp.asarray(token_bytes_V, jnp.int32)[batch["targets"]] * (batch["weights"] > 0))


def update_biases(model: ModelConfig, biases: nnx.State, metrics: Metrics) -> nnx.State:
    """Loss-free balancing (Wang et al., 2024): bias += rate * sign(mean load - load), centred; load is the whole batch's."""
    if not model.moe.bias_rate or "moe" not in metrics:
        return biases
    load_LA = metrics["moe"]["load_A"]  # the layers that have experts, in order
    # Whole numbers, so that a tie is one on any machine: a mean is load or not, whatever a division would make of it.
    whole_LA, part_LA = jnp.divmod(load_LA, load_LA.shape[-1])  # their sum may be beyond int32
    more_L1, rest_L1 = jnp.divmod(jnp.sum(part_LA, axis=-1, keepdims=True), load_LA.shape[-1])
    mean_L1 = jnp.sum(whole_LA, axis=-1, keepdims=True) + more_L1
    below_LA = (load_LA < mean_L1) | ((load_LA == mean_L1) & (rest_L1 > 0))
    change_LA = model.moe.bias_rate * (below_LA.astype(jnp.float32) - (load_LA > mean_L1))
    change_LA -= jnp.mean(change_LA, axis=-1, keepdims=True)
    kinds = layer_kinds(model)
    plan, moe_layers = layer_plan(kinds), [i for i, kind in enumerate(kinds) if kind.startswith("moe")]

    def update(path: Any, bias_RA: jax.Array) -> jax.Array:
        layers = [int(name.split(".")[1]) for name in canonical_names(plan, path)]
        return bias_RA + change_LA[jnp.array([moe_layers.index(layer) for layer in layers])]

    return jax.tree_util.tree_map_with_path(update, biases)


def make_eval_step(
    config: Config, graphdef: nnx.GraphDef, token_bytes: Any, mesh: Mesh | None = None, dtype: Any = None, mode: Mode = CAUSAL
) -> Callable:
    """eval_step(variables, batch) -> sums over tokens: loss, correct, weight, text_bytes and those that each MoD layer takes.

    Routing is causal and nothing is dropped, as in generation. Arguments as in `make_train_step`.
    """
    dtype, mesh = dtype or jnp.dtype(config.train.compute_dtype), mesh or one_device()
    axes = axes_of(mesh)

    def of_own_rows(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        model = merge(graphdef, variables)
        rows = (batch["inputs"], batch["segments"], batch["positions"])
        hidden_BtD, metrics, _ = model(*rows, dtype=dtype, mode=mode, axes=axes)
        sums = _loss(model, hidden_BtD, batch, dtype, axes)
        taken_LBT = metrics["mod"]["taken_BT"] if "mod" in metrics else jnp.zeros((0, *batch["inputs"].shape))
        of_rows = {
            "weight": jnp.sum(batch["weights"]),
            "taken_L": jnp.sum(taken_LBT * batch["weights"], axis=(1, 2)),
            "text_bytes": _text_bytes(token_bytes, batch),
        }
        return axes.sum({"loss": sums.loss, "correct": sums.correct}) | axes.sum(of_rows, ROW_AXES)

    in_specs = (specs(config, state_shapes(config)[0].variables), ROWS)
    return jax.shard_map(of_own_rows, mesh=mesh, in_specs=in_specs, out_specs=WHOLE, check_vma=False)
