"""One optimizer step: against numpy, in parts and whole, and what it must not depend on.

B rows, T positions, M micro-batches, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina.config import MoEConfig
from lumina.data.rows import Batches, Rows
from lumina_jax.model import Variables, by_canonical_name, merge
from lumina_jax.step import Controls, TrainState, controls, init_state, make_train_step, state_shapes, update_biases
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import KINDS, T, V, random_batch, tiny

NO_CONTROLS = Controls(1.0, 0.0, 0.0, 0.0)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    assert pairs
    for x, y in pairs:
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()


def differ(a, b):
    return any(x.tobytes() != y.tobytes() for x, y in zip(leaves(a), leaves(b), strict=True))


def initial(config):
    return jax.jit(lambda: init_state(config)[1])()


def compiled(config):
    """The compiled step, which does not consume its state."""
    return jax.jit(make_train_step(config, state_shapes(config)[1]))


def train(step, state, batch, steps, knobs):
    """Returns (state, the metrics of each step)."""
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch, knobs)
        history.append(jax.device_get(metrics))
    return state, history


# ------------------------------------------------------------------------------------- in float64, against an oracle

STEPS = 3
# Rows and tokens of very different weight: the mean of the micro-batches' means would be far off.
UNEVEN = np.random.default_rng(3).uniform(0, 1, (4, T)).astype(np.float32) * np.array([[8], [1], [0.1], [3]], np.float32)


def double(M):
    """A hybrid whose experts' capacity drops choices, with every auxiliary loss, clipping and the bias at work."""
    moe = {"bias_rate": 0.05, "balance_weight": 0.3, "z_weight": 0.2}
    optim = {"clip_norm": 0.5, "weight_decay": 0.2, "eps": 1e-4}
    return tiny(moe=moe, mod={"predictor_weight": 0.4}, optim=optim, micro_batches=M)


def plain_loss(config, graphdef, variables, batch):
    """The loss as the paper has it: a full softmax, then a weighted mean over the batch; and the weighted router losses."""
    model = merge(graphdef, variables)
    hidden, metrics, _ = model(batch["inputs"], batch["segments"], batch["positions"], dtype=jnp.float64, training=True)
    log_p = jax.nn.log_softmax(hidden @ model.head_DV(jnp.float64))
    picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    language = -jnp.sum(batch["weights"] * picked) / jnp.sum(batch["weights"])
    moe, mod = config.model.moe, config.model.mod
    auxiliary = (
        moe.balance_weight * jnp.mean(metrics["moe"]["balance_loss"])
        + moe.z_weight * jnp.mean(metrics["moe"]["z_loss"])
        + mod.predictor_weight * jnp.mean(metrics["mod"]["predictor_loss"])
    )
    return language + auxiliary, metrics


@pytest.fixture(scope="module")
def exact():
    """Numpy results of STEPS steps in float64 with 1 and 4 micro-batches, and the gradient of the plain loss before them."""
    with jax.enable_x64(True):
        batch = random_batch() | {"weights": UNEVEN.astype(np.float64)}
        found = {"batch": batch}
        for M in (1, 4):
            config = double(M)
            graphdef, state = init_state(config)
            state = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)
            if M == 1:
                slope = jax.grad(
                    lambda p, s=state, g=graphdef, c=config: plain_loss(c, g, Variables(p, s.variables.biases), batch),
                    has_aux=True,
                )
                found["gradient"], found["metrics"] = jax.device_get(jax.jit(slope)(state.variables.params))
            found["start"] = jax.device_get(state)
            step = jax.jit(make_train_step(config, graphdef, dtype=jnp.float64))
            states, history = [], []
            for _ in range(STEPS):
                state, metrics = step(state, batch, controls(config))
                states.append(jax.device_get(state))
                history.append(jax.device_get(metrics))
            found[M] = states, history
    return found


def test_float64_stays_float64(exact):
    assert {leaf.dtype for leaf in leaves(exact[4][0][-1].variables)} == {np.dtype(np.float64)}


def test_four_micro_batches_of_uneven_weight_equal_one(exact):
    one, four = (exact[M][0][-1] for M in (1, 4))
    for a, b in zip(leaves(one), leaves(four), strict=True):
        assert_close(b, a, 1e-12)


def test_four_micro_batches_report_what_one_does(exact):
    for one, four in zip(exact[1][1], exact[4][1], strict=True):
        for a, b in zip(leaves(one), leaves(four), strict=True):
            assert_close(b, a, 1e-6 if a.dtype == np.float32 else 1e-12)  # shares of choices are float32 in any case


@pytest.mark.parametrize("M", [1, 4])
def test_the_reported_loss_is_the_language_model_loss_alone_weighted_over_the_whole_batch(exact, M):
    named = by_canonical_name(double(1).model, exact["start"].variables.params) | by_canonical_name(
        double(1).model, exact["start"].variables.biases
    )
    batch = exact["batch"]
    logits, _ = oracles.transformer(
        double(1).model, named, batch["inputs"], batch["segments"], batch["positions"], training=True
    )
    nats = np.zeros((4, T))
    for b in range(4):
        for t in range(T):
            nats[b, t] = -np.log(oracles.softmax(logits[b, t])[batch["targets"][b, t]])
    assert_close(exact[M][1][0]["loss"], np.sum(UNEVEN * nats, dtype=np.float64) / np.sum(UNEVEN, dtype=np.float64), 1e-12)
    assert abs(np.mean(nats) - exact[M][1][0]["loss"]) > 1e-4  # the weights matter


def test_accuracy_is_the_weighted_share_of_targets_that_are_most_likely(exact):
    config, batch = double(1), exact["batch"]
    named = by_canonical_name(config.model, exact["start"].variables.params) | by_canonical_name(
        config.model, exact["start"].variables.biases
    )
    logits, _ = oracles.transformer(config.model, named, batch["inputs"], batch["segments"], batch["positions"], training=True)
    right = np.argmax(logits, axis=-1) == batch["targets"]
    assert_close(exact[4][1][0]["accuracy"], np.sum(UNEVEN[right], dtype=np.float64) / np.sum(UNEVEN, dtype=np.float64), 1e-12)


def test_a_step_is_adamw_on_the_gradient_of_the_plain_loss(exact):
    config = double(1)
    optim, model = config.optim, config.model
    before, after, gradient = (
        by_canonical_name(model, tree)
        for tree in (exact["start"].variables.params, exact[1][0][0].variables.params, exact["gradient"])
    )
    norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    assert norm > optim.clip_norm
    assert_close(exact[1][1][0]["gradient_norm"], norm, 1e-12)
    rate = optim.learning_rate / optim.warmup_steps
    for name, g in gradient.items():
        g = g * optim.clip_norm / norm
        # The first moments, corrected, are the gradient and its square.
        decay = 0.0 if name.endswith(("scale", "bias", "embedding.weight")) else optim.weight_decay
        expected = before[name] - rate * (g / (np.abs(g) + optim.eps) + decay * before[name])
        assert_close(after[name] - before[name], expected - before[name], 1e-9)


def test_every_learning_rate_of_the_warm_up_is_used(exact):
    found = [metrics["learning_rate"] for metrics in exact[1][1]]
    assert_close(found, [1e-2 * n / 4 for n in (1, 2, 3)], 1e-6)


def test_expert_loads_are_counted_over_all_micro_batches(exact):
    for M in (1, 4):
        load_LE = exact[M][1][0]["moe"]["load_E"]
        assert np.array_equal(load_LE, exact["metrics"]["moe"]["load_E"])
        assert (load_LE.sum(axis=-1) == 4 * 10 * 2).all()  # rows, tokens that MoD selects of 16, choices


def test_router_biases_move_once_a_step_against_the_load_and_stay_centred(exact):
    for M in (1, 4):
        bias_LE = np.zeros((2, 4))
        for state, metrics in zip(*exact[M], strict=True):
            load_LE = metrics["moe"]["load_E"].astype(float)
            sign_LE = np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
            bias_LE += 0.05 * (sign_LE - sign_LE.mean(axis=1, keepdims=True))
            (found,) = leaves(state.variables.biases)
            assert_close(found, bias_LE, 1e-6)
            assert_close(found.sum(axis=1) + 1, [1, 1], 1e-6)
        assert np.abs(bias_LE).max() > 0


# ------------------------------------------------------------------------------------------------- controls and seeds


@pytest.fixture(scope="module")
def hybrid():
    """(config, compiled step, state) of a hybrid in float32."""
    config = tiny()
    return config, compiled(config), initial(config)


@pytest.fixture(scope="module")
def dense():
    """The same of a dense model."""
    config = tiny("dense", steps=60)
    return config, compiled(config), initial(config)


def test_turning_the_controls_compiles_nothing(hybrid):
    config, step, state = hybrid
    for knobs in (controls(config), Controls(0.5, 0.0, 0.0, 0.0), Controls(0.0, 1.0, 2.0, 3.0)):
        state, _ = step(state, random_batch(seed=1), knobs)
    assert step._cache_size() == 1


def test_auxiliary_weights_change_the_update_and_not_the_reported_loss(hybrid):
    _, step, state = hybrid
    quiet, quiet_metrics = step(state, random_batch(), NO_CONTROLS)
    for i in (1, 2, 3):
        loud, metrics = step(state, random_batch(), NO_CONTROLS._replace(**{Controls._fields[i]: 10.0}))
        assert_same_bits(metrics["loss"], quiet_metrics["loss"])
        assert differ(loud.variables.params, quiet.variables.params)


def test_the_learning_rate_scale_scales_the_whole_update_decay_included(hybrid):
    config, step, state = hybrid
    updates = {}
    for scale in (0.0, 1.0, 3.0):
        after, metrics = step(state, random_batch(), controls(config)._replace(learning_rate_scale=scale))
        assert float(metrics["learning_rate"]) == pytest.approx(scale * 1e-2 / 4, rel=1e-6)
        updates[scale] = [a - b for a, b in zip(leaves(after.variables.params), leaves(state.variables.params), strict=True)]
    for none, once, thrice in zip(*updates.values(), strict=True):
        assert not none.any()
        assert_close(thrice, 3 * once, 1e-3)  # of differences of float32


def test_without_a_bias_rate_router_biases_stay(hybrid):
    config, step, state = hybrid
    after, metrics = step(state, random_batch(), controls(config))
    assert (np.ptp(metrics["moe"]["load_E"], axis=1) > 0).all()
    assert_same_bits(after.variables.biases, state.variables.biases)


def test_the_step_counts_up(hybrid):
    config, step, state = hybrid
    after, history = train(step, state, random_batch(), 6, controls(config))
    assert int(after.step) == 6
    assert_close(
        [m["learning_rate"] for m in history], [1e-2 * n / 4 for n in (1, 2, 3, 4, 4)] + [history[5]["learning_rate"]], 1e-6
    )
    assert history[5]["learning_rate"] < 1e-2


def test_the_same_seed_gives_the_same_bits(hybrid):
    config, step, _ = hybrid
    runs = [train(step, initial(config), random_batch(), 3, controls(config)) for _ in range(2)]
    assert_same_bits(*runs)


def test_another_seed_gives_another_model(hybrid):
    other = initial(tiny(seed=1))
    for a, b in zip(*(by_canonical_name(tiny().model, s.variables.params).items() for s in (hybrid[2], other)), strict=True):
        constant = a[0].endswith(("scale", "bias"))
        assert np.array_equal(a[1], b[1]) == constant


def test_router_biases_of_interleaved_layers_follow_their_own_loads():
    config = tiny(model={"num_layers": 4}, moe={"pattern": "0,2,3", "bias_rate": 0.1}, mod={"pattern": "2"})
    biases = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state_shapes(config)[0].variables.biases)
    load_LE = jnp.array([[9, 1, 1, 1], [1, 9, 1, 1], [2, 2, 2, 6]], jnp.int32)  # of layers 0, 2 and 3
    found = by_canonical_name(config.model, update_biases(config.model, biases, {"moe": {"load_E": load_LE}}))
    for layer, heavy in ((0, 0), (2, 1), (3, 3)):
        expected = np.where(np.arange(4) == heavy, -0.15, 0.05)  # signs -1 and +1, less their mean of 0.5, times the rate
        assert_close(found[f"blocks.{layer}.moe.bias"], expected, 1e-6)


def test_an_evenly_loaded_router_keeps_its_bias():
    config = tiny(moe={"bias_rate": 0.1})
    biases = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), state_shapes(config)[0].variables.biases)
    assert_same_bits(update_biases(config.model, biases, {"moe": {"load_E": jnp.full((2, 4), 5)}}), biases)


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_on_one_repeated_batch_falls(kind, hybrid, dense):
    shared = {"moe+mod": hybrid, "dense": dense}
    config, step, state = shared.get(kind) or (tiny(kind), compiled(tiny(kind)), initial(tiny(kind)))
    _, history = train(step, state, random_batch(), 30, controls(config))
    assert abs(history[0]["loss"] - math.log(V)) < 0.1
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_bfloat16_trains_and_keeps_float32_state(hybrid):
    config, state = tiny(compute_dtype="bfloat16"), hybrid[2]
    after, history = train(compiled(config), state, random_batch(), 30, controls(config))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert {leaf.dtype for leaf in leaves(after.variables)} == {np.dtype(np.float32)}
    assert [leaf.dtype for leaf in leaves(after)] == [leaf.dtype for leaf in leaves(state)]


@pytest.fixture(scope="module")
def dropping(dense):
    """(compiled step, state) of a dense model with dropout, in two micro-batches of a row."""
    return compiled(tiny("dense", model={"dropout": 0.5}, batch_size=2, micro_batches=2)), dense[2]


def test_dropout_depends_on_the_step_and_on_nothing_else(dropping):
    step, state = dropping
    (_, first), (_, again) = (step(state, random_batch(2), NO_CONTROLS) for _ in range(2))
    later = [step(state._replace(step=jnp.int32(n)), random_batch(2), NO_CONTROLS)[1] for n in (1, 2)]
    assert_same_bits({**first, "learning_rate": 0}, {**again, "learning_rate": 0})
    assert len({float(metrics["loss"]) for metrics in (first, *later)}) == 3


def test_micro_batches_do_not_share_their_dropout(dropping):
    # Two equal micro-batches: were their masks equal too, the mean of both would be the loss of the first.
    step, state = dropping
    equal = jax.tree.map(lambda a: np.concatenate([a, a]), random_batch(1))
    first = equal | {"weights": np.repeat([[1], [0]], T, axis=1).astype(np.float32)}
    both, one = (float(step(state, batch, NO_CONTROLS)[1]["loss"]) for batch in (equal, first))
    assert abs(both - one) > 1e-5 * one


class Cycle:
    """A token stream that repeats 5, 6, 7."""

    name, num_tokens = "train", 3 * 4 * T + 1

    def read(self, start, stop):
        return (5 + np.arange(start, stop) % 3).astype(np.int32)


def test_a_trained_model_predicts_the_next_token_and_not_the_one_after(dense):
    config, step, state = dense
    batches = Batches(Rows(Cycle(), T, document_end_id=0), 4, seed=0)
    for n in range(60):
        state, _ = step(state, batches.batch(n), controls(config))
    tokens = Cycle().read(1, T + 1)[None]  # a row that begins within the cycle
    model = merge(state_shapes(config)[1], state.variables)
    hidden, _, _ = model(tokens, np.zeros_like(tokens), np.arange(T)[None], dtype=jnp.float32)
    predicted = np.argmax(hidden @ model.head_DV(jnp.float32), axis=-1)
    assert np.mean(predicted == Cycle().read(2, T + 2)) > 0.9
    assert np.mean(predicted == Cycle().read(3, T + 3)) < 0.1


def test_the_default_controls_are_those_of_the_config():
    config = tiny(moe={"balance_weight": 0.25, "z_weight": 0.125}, mod={"predictor_weight": 0.5})
    assert controls(config) == Controls(1.0, 0.25, 0.125, 0.5)
    assert MoEConfig().balance_weight == 0.01


def test_state_holds_no_random_numbers(hybrid):
    state = hybrid[2]
    assert TrainState._fields == ("step", "variables", "optimizer")
    assert not [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
