"""One optimizer step and one evaluation step, as pure functions of arrays.

B rows, T positions, M micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lumina.architecture import layer_kinds, layer_plan
from lumina.config import Config, ModelConfig
from lumina_jax.loss import cross_entropy
from lumina_jax.model import Metrics, Variables, canonical_names, create, merge
from lumina_jax.optimizer import make_optimizer, schedule

Batch = dict[str, jax.Array]  # inputs, targets, weights, segments, positions, each [B, T]


class TrainState(NamedTuple):
    """All that a step changes. Random numbers derive from (seed, step); none are stored."""

    step: jax.Array  # int32: updates done
    variables: Variables
    optimizer: optax.OptState


class Controls(NamedTuple):
    """What may be turned while running: traced, so that turning it compiles nothing."""

    learning_rate_scale: float
    balance_weight: float
    z_weight: float
    predictor_weight: float


def controls(config: Config) -> Controls:
    """The controls as the config sets them."""
    return Controls(1.0, config.model.moe.balance_weight, config.model.moe.z_weight, config.model.mod.predictor_weight)


def init_state(config: Config) -> tuple[nnx.GraphDef, TrainState]:
    """The graph definition and a fresh state, which may be traced."""
    graphdef, variables = create(config.model, config.train.seed)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), variables, make_optimizer(config).init(variables.params))


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


def make_train_step(config: Config, graphdef: nnx.GraphDef, dtype: Any = None) -> Callable:
    """train_step(state, batch, controls) -> (state, metrics); `dtype` overrides the config's compute dtype.

    The loss is the weighted sum over the whole batch divided by its weight, whatever the micro-batches; router losses are
    means over rows. Both are sums over micro-batches of parts that already carry their share, so gradients simply add.
    """
    optimizer, rate = make_optimizer(config), schedule(config.optim, config.train.steps)
    dtype, M = dtype or jnp.dtype(config.train.compute_dtype), config.train.micro_batches
    random = config.model.dropout > 0 or config.model.moe.jitter > 0

    def micro_loss(params: nnx.State, biases: nnx.State, micro: Batch, weight: jax.Array, knobs: Controls, key: Any):
        model = merge(graphdef, Variables(params, biases))
        hidden_BTD, metrics, _ = model(
            micro["inputs"],
            micro["segments"],
            micro["positions"],
            dtype=dtype,
            training=True,
            remat=config.train.remat,
            key=key,
        )
        with jax.named_scope("loss"):
            flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
            sums = cross_entropy(flat, model.head_DV(dtype), micro["targets"].reshape(-1), micro["weights"].reshape(-1))
        loss = sums.loss / weight
        # Counts add up over micro-batches; every other metric is a mean over rows and carries its share.
        metrics = jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.integer) else a / M, metrics)
        return loss + _auxiliary(metrics, knobs), {"loss": loss, "accuracy": sums.correct / weight, **metrics}

    def train_step(state: TrainState, batch: Batch, knobs: Controls):
        weight = jnp.sum(batch["weights"])
        micros = jax.tree.map(lambda a: a.reshape(M, a.shape[0] // M, *a.shape[1:]), batch)
        step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step) if random else None

        def accumulate(index: Any):
            micro = jax.tree.map(lambda a: a[index], micros)
            key = jax.random.fold_in(step_key, index) if step_key is not None else None
            (_, metrics), grads = jax.value_and_grad(micro_loss, has_aux=True)(
                state.variables.params, state.variables.biases, micro, weight, knobs, key
            )
            return grads, metrics

        if M == 1:
            grads, metrics = accumulate(0)
        else:

            def add(index: Any, total: Any) -> Any:
                return jax.tree.map(jnp.add, total, accumulate(index))

            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(accumulate, 0))
            grads, metrics = jax.lax.fori_loop(0, M, add, zeros)

        with jax.named_scope("optimizer"):
            learning_rate = rate(state.step) * knobs.learning_rate_scale
            direction, optimizer_state = optimizer.update(grads, state.optimizer, state.variables.params)
            params = jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), state.variables.params, direction)
            biases = update_biases(config.model, state.variables.biases, metrics)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = learning_rate
        return TrainState(state.step + 1, Variables(params, biases), optimizer_state), metrics

    return train_step


def update_biases(model: ModelConfig, biases: nnx.State, metrics: Metrics) -> nnx.State:
    """Loss-free balancing (Wang et al., 2024): bias += rate * sign(mean load - load), centred; load is the whole batch's."""
    if not model.moe.bias_rate or "moe" not in metrics:
        return biases
    load_LE = metrics["moe"]["load_E"].astype(jnp.float32)  # the layers that have experts, in order
    change_LE = model.moe.bias_rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
    change_LE -= jnp.mean(change_LE, axis=-1, keepdims=True)
    kinds = layer_kinds(model)
    plan, moe_layers = layer_plan(kinds), [i for i, kind in enumerate(kinds) if kind.startswith("moe")]

    def update(path: Any, bias_RE: jax.Array) -> jax.Array:
        layers = [int(name.split(".")[1]) for name in canonical_names(plan, path)]
        return bias_RE + change_LE[jnp.array([moe_layers.index(layer) for layer in layers])]

    return jax.tree_util.tree_map_with_path(update, biases)


def make_eval_step(config: Config, graphdef: nnx.GraphDef, dtype: Any = None) -> Callable:
    """eval_step(variables, batch) -> sums over tokens of loss, correct, weight, and of those that each MoD layer takes.

    Routing is causal and nothing is dropped, as in generation.
    """
    dtype = dtype or jnp.dtype(config.train.compute_dtype)

    def eval_step(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        model = merge(graphdef, variables)
        hidden_BTD, metrics, _ = model(batch["inputs"], batch["segments"], batch["positions"], dtype=dtype)
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        sums = cross_entropy(flat, model.head_DV(dtype), batch["targets"].reshape(-1), batch["weights"].reshape(-1))
        capacity_LB = metrics["mod"]["causal_capacity"] if "mod" in metrics else jnp.zeros((0, batch["inputs"].shape[0]))
        return {
            "loss": sums.loss,
            "correct": sums.correct,
            "weight": jnp.sum(batch["weights"]),
            "taken_L": capacity_LB @ jnp.sum(batch["weights"], axis=1),
        }

    return eval_step
