"""One optimizer step: against numpy, in parts and whole, and what it must not depend on.

B rows, T positions, M micro-batches, N devices, V vocabulary, W losses remembered.
"""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina.config import GuardConfig, MoEConfig
from lumina.data.rows import Batches, Rows
from lumina.mesh import Sizes
from lumina_jax import step as steps
from lumina_jax.mesh import mesh_of, one_device, whole
from lumina_jax.model import TRAINING, Variables, by_canonical_name, merge
from lumina_jax.step import (
    Controls,
    Guard,
    TrainState,
    controls,
    init_state,
    is_good,
    make_train_step,
    state_shapes,
    update_biases,
)
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, equations
from tests.lumina_jax.tiny import FILLED, KINDS, T, V, packed_batch, random_batch, tiny

ONE_DEVICE = np.zeros(1, np.int32)
NO_CONTROLS = Controls(1.0, 0.0, 0.0, 0.0, True, ONE_DEVICE)


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


def placed(tree, mesh=None):
    """As a step returns it: what lies elsewhere compiles the step anew."""
    return jax.device_put(tree, whole(mesh or one_device()))


def initial(config, mesh=None):
    return jax.jit(lambda: init_state(config)[1], out_shardings=whole(mesh or one_device()))()


def doubled(config):
    """The initial state in float64."""
    state = jax.device_get(initial(config))
    return placed(jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, state))


def assert_states_close(actual, expected):
    """To the last digits of float64. The window of the guard has NaNs where there is no loss yet."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(expected)[0]]
    for name, a, b in zip(names, leaves(actual), leaves(expected), strict=True):
        assert a.dtype == b.dtype, name
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        assert_close(a[~np.isnan(a)], b[~np.isnan(b)], 1e-12)


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
UNEVEN *= packed_batch()["weights"]
SELECTED = sum(min(length, 10) for length in FILLED)  # by depth routers, with 10 slots a row


def double(M, over="row"):
    """A hybrid whose experts' capacity drops choices, with every auxiliary loss, clipping and the bias at work."""
    moe = {"bias_rate": 0.05, "balance_weight": 0.3, "z_weight": 0.2, "noop_experts": 1, "balance_over": over}
    optim = {"clip_norm": 0.5, "weight_decay": 0.2, "eps": 1e-4}
    return tiny(moe=moe, mod={"predictor_weight": 0.4}, optim=optim, micro_batches=M)


EXACT = (("row", 1), ("row", 2), ("batch", 1), ("batch", 2), ("batch", 4), ("micro_batch", 2))
PARTS = {"row": [[0], [1], [2], [3]], "micro_batch": [[0, 2], [1, 3]], "batch": [[0, 1, 2, 3]]}  # rows counted together


def plain_loss(config, graphdef, variables, batch, together_BB):
    """The loss as the paper has it: a full softmax, then a weighted mean over the batch; and the weighted router losses,
    the loads of the rows that are together added up."""
    model = merge(graphdef, variables)
    hidden, metrics, _ = model(batch["inputs"], batch["segments"], batch["positions"], dtype=jnp.float64, mode=TRAINING)
    log_p = jax.nn.log_softmax(hidden @ model.head_DV(jnp.float64))
    picked = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    language = -jnp.sum(batch["weights"] * picked) / jnp.sum(batch["weights"])
    moe, mod = config.model.moe, config.model.mod
    load_LBA = jnp.einsum("bc,lca->lba", together_BB, metrics["moe"]["load_BA"])
    load_LBA /= jnp.maximum(jnp.sum(load_LBA, axis=-1, keepdims=True), 1)
    balance = load_LBA.shape[-1] * jnp.mean(jnp.sum(load_LBA * metrics["moe"]["share_BA"], axis=(1, 2)))
    auxiliary = (
        moe.balance_weight * balance / SELECTED
        + moe.z_weight * jnp.mean(metrics["moe"]["z_loss"]) / SELECTED
        + mod.predictor_weight * jnp.mean(metrics["mod"]["predictor_loss"]) / sum(FILLED)
    )
    return language + auxiliary, metrics


@pytest.fixture(scope="module")
def exact():
    """Numpy results in float64 of STEPS steps for each of EXACT, and the gradients of the plain losses before them."""
    with jax.enable_x64(True):
        batch = packed_batch() | {"weights": UNEVEN.astype(np.float64)}
        config = double(1)
        graphdef, start = state_shapes(config)[1], doubled(config)
        found = {"batch": batch, "start": jax.device_get(start), "gradient": {}}
        slope = jax.grad(
            lambda p, together_BB: plain_loss(config, graphdef, Variables(p, start.variables.biases), batch, together_BB),
            has_aux=True,
        )
        slope = jax.jit(slope)
        for over, parts in PARTS.items():
            together_BB = np.array([[any({a, b} <= {*part} for part in parts) for b in range(4)] for a in range(4)], float)
            found["gradient"][over], found["metrics"] = jax.device_get(slope(start.variables.params, together_BB))
        for over, M in EXACT:
            config, state, states, history = double(M, over), start, [], []
            step = jax.jit(make_train_step(config, graphdef, dtype=jnp.float64))
            for _ in range(STEPS):
                state, metrics = step(state, batch, controls(config))
                states.append(jax.device_get(state))
                history.append(jax.device_get(metrics))
            found[over, M] = states, history
    return found


def named_start(exact):
    model, variables = double(1).model, exact["start"].variables
    return by_canonical_name(model, variables.params) | by_canonical_name(model, variables.biases)


def slow(exact):
    """(logits, metrics by row) of the slow transformer, before the first step."""
    batch = exact["batch"]
    return oracles.transformer(
        double(1).model, named_start(exact), batch["inputs"], batch["segments"], batch["positions"], training=True
    )


def test_float64_stays_float64(exact):
    assert {leaf.dtype for leaf in leaves(exact["row", 2][0][-1].variables)} == {np.dtype(np.float64)}


@pytest.mark.parametrize(("over", "M"), [("row", 2), ("batch", 2), ("batch", 4)])
def test_micro_batches_of_uneven_weight_change_no_parameter_moment_or_bias(exact, over, M):
    assert_states_close(exact[over, M][0][-1], exact[over, 1][0][-1])


@pytest.mark.parametrize(("over", "M"), [("row", 2), ("batch", 2), ("batch", 4)])
def test_micro_batches_report_what_the_whole_batch_does(exact, over, M):
    for one, several in zip(exact[over, 1][1], exact[over, M][1], strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(several)
        for a, b in zip(leaves(one), leaves(several), strict=True):
            assert_close(b, a, 1e-6 if a.dtype == np.float32 else 1e-12)  # shares of choices are float32 in any case


def test_what_the_balance_is_taken_over_matters(exact):
    balances = [exact[of][1][0]["moe"]["balance_loss"] for of in (("row", 1), ("micro_batch", 2), ("batch", 1))]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.all(np.abs(balances[a] - balances[b]) > 1e-3)
    states = [exact[of][0][0].variables.params for of in (("row", 1), ("micro_batch", 2), ("batch", 1))]
    assert differ(states[0], states[1])
    assert differ(states[1], states[2])


@pytest.mark.parametrize(("over", "M"), EXACT)
def test_router_metrics_equal_the_slow_ones_summarised(exact, over, M):
    _, metrics = slow(exact)
    found = exact[over, M][1][0]
    experts, depth = metrics["moe"], metrics["mod"]
    assert np.array_equal(found["moe"]["load_A"], experts["load_BA"].sum(axis=1))
    shares_of_layers = zip(experts["load_BA"], experts["share_BA"], strict=True)
    real_BT = exact["batch"]["segments"] >= 0
    balance_L = np.array([oracles.balance_loss(*layer, PARTS[over]) for layer in shares_of_layers])
    assert_close(found["moe"]["balance_loss"], balance_L / SELECTED, 1e-12)
    decided_LBT = depth["logit_BT"] > 0
    expected = {
        "moe": {name: experts[name] / SELECTED for name in ("z_loss", "entropy", "dropped")},
        "mod": {
            "predictor_loss": depth["predictor_loss"] / sum(FILLED),
            "causal_capacity": decided_LBT[:, real_BT].mean(axis=1),
            "agreement": (decided_LBT == depth["taken_BT"])[:, real_BT].mean(axis=1),
        },
    }
    assert {*found["moe"]} == {*expected["moe"], "load_A", "balance_loss"}
    assert {*found["mod"]} == {*expected["mod"]}
    for group, names in expected.items():
        for name, values in names.items():
            assert_close(found[group][name], values, 1e-6 if found[group][name].dtype == np.float32 else 1e-12)


@pytest.mark.parametrize(("over", "M"), EXACT)
def test_the_reported_loss_is_the_language_model_loss_alone_weighted_over_the_whole_batch(exact, over, M):
    logits, _ = slow(exact)
    nats = np.zeros((4, T))
    for b in range(4):
        for t in range(T):
            nats[b, t] = -np.log(oracles.softmax(logits[b, t])[exact["batch"]["targets"][b, t]])
    loss = exact[over, M][1][0]["loss"]
    assert_close(loss, np.sum(UNEVEN * nats, dtype=np.float64) / np.sum(UNEVEN, dtype=np.float64), 1e-12)
    assert abs(np.mean(nats) - loss) > 1e-4  # the weights matter


def test_accuracy_is_the_weighted_share_of_targets_that_are_most_likely(exact):
    right = np.argmax(slow(exact)[0], axis=-1) == exact["batch"]["targets"]
    expected = np.sum(UNEVEN[right], dtype=np.float64) / np.sum(UNEVEN, dtype=np.float64)
    assert_close(exact["row", 2][1][0]["accuracy"], expected, 1e-12)


@pytest.mark.parametrize(("over", "M"), [("row", 1), ("batch", 4), ("micro_batch", 2)])
def test_a_step_is_adamw_on_the_gradient_of_the_plain_loss(exact, over, M):
    config = double(1)
    optim, model = config.optim, config.model
    before, after, gradient = (
        by_canonical_name(model, tree)
        for tree in (exact["start"].variables.params, exact[over, M][0][0].variables.params, exact["gradient"][over])
    )
    norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    assert norm > optim.clip_norm
    assert_close(exact[over, M][1][0]["gradient_norm"], norm, 1e-12)
    rate = optim.learning_rate / optim.warmup_steps
    for name, g in gradient.items():
        g = g * optim.clip_norm / norm
        # The first moments, corrected, are the gradient and its square.
        decay = 0.0 if name.endswith(("scale", "bias", "embedding.weight")) else optim.weight_decay
        expected = before[name] - rate * (g / (np.abs(g) + optim.eps) + decay * before[name])
        assert_close(after[name] - before[name], expected - before[name], 1e-9)


def test_every_learning_rate_of_the_warm_up_is_used(exact):
    found = [metrics["learning_rate"] for metrics in exact["row", 1][1]]
    assert_close(found, [1e-2 * n / 4 for n in (1, 2, 3)], 1e-6)


def test_expert_loads_are_counted_over_all_micro_batches(exact):
    for of in EXACT:
        load_LA = exact[of][1][0]["moe"]["load_A"]
        assert np.array_equal(load_LA, exact["metrics"]["moe"]["load_BA"].sum(axis=1))
        assert (load_LA.sum(axis=-1) == SELECTED * 2).all()  # choices of each


def test_router_biases_move_once_a_step_against_the_load_and_stay_centred(exact):
    for of in EXACT:
        bias_LA = np.zeros((2, 5))  # four experts and a choice of nothing
        for state, metrics in zip(*exact[of], strict=True):
            load_LA = metrics["moe"]["load_A"].astype(float)
            sign_LA = np.sign(load_LA.mean(axis=1, keepdims=True) - load_LA)
            bias_LA += 0.05 * (sign_LA - sign_LA.mean(axis=1, keepdims=True))
            (found,) = leaves(state.variables.biases)
            assert_close(found, bias_LA, 1e-6)
            assert_close(found.sum(axis=1) + 1, [1, 1], 1e-6)
        assert np.all(np.abs(bias_LA).max(axis=0) > 0)


# ---------------------------------------------------------------------------------------------------- several devices

# What the balance is taken over, devices, micro-batches; each as the first of its kind.
SPREAD = (
    *(("batch", 1, 1), ("batch", 2, 4), ("batch", 8, 1)),
    *(("row", 1, 1), ("row", 4, 2)),
    *(("micro_batch", 1, 2), ("micro_batch", 4, 2)),
)
FIRST = {over: (over, N, M) for over, N, M in SPREAD[::-1]}
SEVERAL = [of for of in SPREAD if of not in FIRST.values()]
TOKEN_BYTES = np.random.default_rng(4).integers(0, 9, V).astype(np.int32)
# Rows of very different weight, and some of none: alone on their device where there are eight.
UNEVEN_8 = np.concatenate([UNEVEN, np.zeros((1, T)), 5 * UNEVEN[1:]])


def both_kinds(over, M):
    """A dense layer and a moe+mod, and all that training has: dropout, jitter, drops, router losses, biases and clipping."""
    moe = {"pattern": "1", "bias_rate": 0.05, "balance_weight": 0.3, "z_weight": 0.2, "jitter": 0.2, "balance_over": over}
    mod = {"pattern": "1", "predictor_weight": 0.4}
    optim = {"clip_norm": 0.5, "weight_decay": 0.2, "eps": 1e-4}
    return tiny("dense", {"dropout": 0.2}, moe, mod, optim, batch_size=8, micro_batches=M)


@pytest.fixture(scope="module")
def spread():
    """What SPREAD names -> numpy results of two steps in float64 and, last, of a batch that has a NaN in one row."""
    with jax.enable_x64(True):
        batch, found, start = packed_batch(8) | {"weights": UNEVEN_8}, {}, doubled(both_kinds("batch", 1))
        bad = UNEVEN_8.copy()
        bad[6, 3] = np.nan
        for over, N, M in SPREAD:
            config = both_kinds(over, M)
            mesh = mesh_of(Sizes(data=N), jax.devices()[:N])
            state = placed(start, mesh)
            step = jax.jit(make_train_step(config, state_shapes(config)[1], mesh, TOKEN_BYTES, jnp.float64))
            knobs, history = controls(config, stop_N=np.arange(N, dtype=np.int32)), []
            for weights in (UNEVEN_8, UNEVEN_8, bad):
                state, metrics = step(state, batch | {"weights": weights}, knobs)
                history.append(jax.device_get((state, metrics)))
            found[over, N, M] = history
    return found


@pytest.mark.parametrize("of", SEVERAL)
def test_devices_and_micro_batches_change_no_parameter_moment_or_bias(spread, of):
    for (one, _), (several, _) in zip(spread[FIRST[of[0]]], spread[of], strict=True):
        assert_states_close(several, one)


@pytest.mark.parametrize("of", SEVERAL)
def test_devices_and_micro_batches_change_no_metric(spread, of):
    for (_, one), (_, several) in zip(spread[FIRST[of[0]]][:2], spread[of][:2], strict=True):
        assert set(one) == set(several) >= {"loss", "accuracy", "moe", "mod", "gradient_norm", "skipped", "text_bytes"}
        for a, b in zip(leaves(one | {"stop": 0}), leaves(several | {"stop": 0}), strict=True):
            assert a.shape == b.shape
            assert_close(b, a, 1e-6 if a.dtype == np.float32 else 1e-12)  # shares of choices are float32 in any case


@pytest.mark.parametrize("of", SPREAD)
def test_a_nan_in_one_row_skips_the_update_on_every_device(spread, of):
    (before, _), (after, metrics) = spread[of][1:]
    assert not np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    assert_same_bits(after._replace(step=0, guard=after.guard.losses_W), before._replace(step=0, guard=before.guard.losses_W))


@pytest.mark.parametrize("of", SPREAD)
def test_every_device_learns_how_many_were_asked_to_stop(spread, of):
    assert [metrics["stop"] for _, metrics in spread[of]] == [sum(range(of[1]))] * 3


def test_bytes_of_text_are_those_of_targets_that_count(spread):
    counted = packed_batch(8)["targets"][UNEVEN_8 > 0]
    assert {int(history[0][1]["text_bytes"]) for history in spread.values()} == {int(TOKEN_BYTES[counted].sum())}


# ------------------------------------------------------------------------------------------------------------- guard

WINDOW = 4


@pytest.fixture(scope="module")
def guarded():
    """(config, compiled step, a state after one step) of a model with router biases that move and a window of four losses."""
    config = tiny("moe", moe={"bias_rate": 0.05}, guard={"spike_sigmas": 3.0, "spike_window": WINDOW})
    step = compiled(config)
    state, _ = step(initial(config), random_batch(seed=7), controls(config))
    return config, step, state


def nan_batch(seed=0):
    batch = random_batch(seed=seed)
    batch["weights"][2, 5] = np.nan
    return batch


# Name -> (batch, what becomes of the controls): the loss is not finite, or only the gradient is.
BAD = {
    "loss": (nan_batch(), {}),
    "gradient": (random_batch(), {"z_weight": 3e38}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_step_changes_the_step_and_the_count_and_no_other_bit(guarded, name):
    config, step, state = guarded
    batch, turned = BAD[name]
    after, metrics = step(state, batch, controls(config)._replace(**turned))
    assert np.isfinite(metrics["loss"]) == (name == "gradient")
    assert not np.isfinite(metrics["gradient_norm"])
    assert (int(after.step), int(after.guard.skipped), int(metrics["skipped"])) == (2, 1, 1)
    rest = after._replace(step=state.step, guard=after.guard._replace(skipped=state.guard.skipped))
    assert_same_bits(rest, state)
    good, _ = step(state, random_batch(), controls(config))
    assert differ(good.variables.biases, state.variables.biases)  # they do move, and did not


def test_skips_are_counted_in_a_row(guarded):
    config, step, state = guarded
    counts = []
    for bad in (True, True, False, True, False, False):
        state, metrics = step(state, nan_batch() if bad else random_batch(), controls(config))
        counts.append(int(metrics["skipped"]))
    assert counts == [1, 2, 0, 1, 0, 0]


def test_the_window_holds_the_last_losses_of_updates_that_were_made(guarded):
    config, step, _ = guarded
    state, made = initial(config), []
    for number, (bad, update) in enumerate([(0, 1), (1, 1), (0, 0), (0, 1), (0, 1), (1, 0), (0, 1), (0, 1)]):
        before = state.guard.losses_W
        assert np.array_equal(before, np.float32([np.nan] * WINDOW + made)[-WINDOW:], equal_nan=True)
        batch = nan_batch(number) if bad else random_batch(seed=number)
        state, metrics = step(state, batch, controls(config, bool(update)))
        if update and not bad:
            made.append(float(metrics["loss"]))
    assert len(made) == 5


def test_passing_over_a_batch_leaves_all_but_the_step(guarded):
    config, step, state = guarded
    for batch in (random_batch(), nan_batch()):
        after, metrics = step(state, batch, controls(config, update=False))
        assert int(after.step) == 2
        assert_same_bits(after._replace(step=state.step), state)
        assert np.array_equal(metrics["skipped"], 0)


def test_passing_over_a_batch_ends_no_count_of_skips(guarded):
    config, step, state = guarded
    state, _ = step(state, nan_batch(), controls(config))
    state, _ = step(state, random_batch(), controls(config, update=False))
    state, metrics = step(state, nan_batch(), controls(config))
    assert int(metrics["skipped"]) == 2


def test_after_the_next_good_update_skipping_and_passing_over_are_the_same_bits(guarded):
    config, step, state = guarded
    skipped, _ = step(state, nan_batch(), controls(config))
    passed, _ = step(state, nan_batch(), controls(config, update=False))
    ends = [step(each, random_batch(seed=3), controls(config))[0] for each in (skipped, passed)]
    assert differ(ends[0].variables, state.variables)
    assert_same_bits(*ends)


def test_a_skipped_batch_still_uses_up_its_learning_rate(guarded):
    config, step, state = guarded
    skipped, _ = step(state, nan_batch(), controls(config))
    assert float(step(skipped, random_batch(), controls(config))[1]["learning_rate"]) == pytest.approx(1e-2 * 3 / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "is_skipped"),
    [([2.0, 2.1, 2.0, 2.1], True), ([np.nan, 2.1, 2.0, 2.1], False), ([2.0, 9.0, 2.0, 9.0], False)],
    ids=["far_above", "window_not_full", "within_the_spread"],
)
def test_a_spike_is_skipped_when_the_window_is_full(guarded, losses, is_skipped):
    config, step, state = guarded
    state = state._replace(guard=state.guard._replace(losses_W=placed(jnp.float32(losses))))
    after, metrics = step(state, random_batch(), controls(config))
    assert 5 < metrics["loss"] < 6
    assert int(metrics["skipped"]) == is_skipped
    assert differ(after.variables, state.variables) != is_skipped
    assert_same_bits(after.guard.losses_W, jnp.float32(losses if is_skipped else [*losses[1:], metrics["loss"]]))


def test_a_spike_is_a_loss_above_the_mean_by_so_many_standard_deviations():
    losses_W = np.random.default_rng(0).uniform(2, 3, 16).astype(np.float32)
    guard = Guard(jnp.asarray(losses_W), jnp.int32(0))
    for sigmas in (1.0, 4.0):
        limit = np.mean(losses_W, dtype=np.float64) + sigmas * np.std(losses_W, dtype=np.float64)
        for loss, good in ((limit - 1e-5, True), (limit + 1e-5, False), (0.0, True), (np.inf, False)):
            assert is_good(GuardConfig(spike_sigmas=sigmas), guard, jnp.float32(loss), jnp.float32(1)) == good


def test_without_sigmas_no_finite_loss_is_a_spike():
    guard = Guard(jnp.ones(4), jnp.int32(0))
    for loss, norm, good in ((1e9, 1e9, True), (np.nan, 1.0, False), (1.0, np.inf, False), (1.0, np.nan, False)):
        assert is_good(GuardConfig(), guard, jnp.float32(loss), jnp.float32(norm)) == good


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
    turned = Controls(0.5, 0.0, 0.0, 0.0, False, ONE_DEVICE), Controls(0.0, 1.0, 2.0, 3.0, True, ONE_DEVICE + 1)
    for knobs in (controls(config), *turned):
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
    assert (np.ptp(metrics["moe"]["load_A"], axis=1) > 0).all()
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
    load_LA = jnp.array([[9, 1, 1, 1], [1, 9, 1, 1], [2, 2, 2, 6]], jnp.int32)  # of layers 0, 2 and 3
    found = by_canonical_name(config.model, update_biases(config.model, biases, {"moe": {"load_A": load_LA}}))
    for layer, heavy in ((0, 0), (2, 1), (3, 3)):
        expected = np.where(np.arange(4) == heavy, -0.15, 0.05)  # signs -1 and +1, less their mean of 0.5, times the rate
        assert_close(found[f"blocks.{layer}.moe.bias"], expected, 1e-6)


def test_the_bias_of_a_choice_of_nothing_follows_its_load_like_any_other():
    config = tiny("moe", moe={"bias_rate": 0.1, "noop_experts": 2}, model={"num_layers": 1})
    biases = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state_shapes(config)[0].variables.biases)
    load_LA = jnp.array([[5, 5, 5, 5, 0, 10]], jnp.int32)
    found = by_canonical_name(config.model, update_biases(config.model, biases, {"moe": {"load_A": load_LA}}))
    assert_close(found["blocks.0.moe.bias"], [0, 0, 0, 0, 0.1, -0.1], 1e-6)


def test_an_evenly_loaded_router_keeps_its_bias():
    config = tiny(moe={"bias_rate": 0.1})
    biases = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), state_shapes(config)[0].variables.biases)
    assert_same_bits(update_biases(config.model, biases, {"moe": {"load_A": jnp.full((2, 4), 5)}}), biases)


def test_a_batch_may_have_more_tokens_than_int32_counts():
    each = SimpleNamespace(sum=lambda of_one, axes: of_one * 2**20)  # of 1,048,576 devices
    tokens = steps._tokens(tiny("moe", mod={"capacity": 0.5}).model, jnp.zeros((4, 1024), jnp.int32), each)
    assert float(tokens.depth) == 2.0**32
    assert tokens.experts_L.tolist() == [2.0**32] * len(tokens.experts_L)


def test_a_tie_is_one_however_many_alternatives_there_are():
    """A mean as a sum times 1 / 5 would be another number than each of the loads that it is the mean of."""
    config = tiny(moe={"bias_rate": 0.1, "num_experts": 5})
    biases = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), state_shapes(config)[0].variables.biases)
    update = jax.jit(lambda load_LA: update_biases(config.model, biases, {"moe": {"load_A": load_LA}}))
    for load in (*range(1, 40), 16_777_217, 1_000_000_007):  # beyond what float32 counts, and five times it beyond int32
        assert_same_bits(update(jnp.full((2, 5), load, jnp.int32)), biases)
        (found_LA,) = leaves(update(jnp.array([[load] * 5, [load + 1] + [load] * 4], jnp.int32)))
        assert_close(found_LA, [[1] * 5, [1 - 0.16] + [1 + 0.04] * 4], 1e-6)


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
    later = [step(state._replace(step=placed(jnp.int32(n))), random_batch(2), NO_CONTROLS)[1] for n in (1, 2)]
    assert_same_bits({**first, "learning_rate": 0}, {**again, "learning_rate": 0})
    assert len({float(metrics["loss"]) for metrics in (first, *later)}) == 3


def test_micro_batches_do_not_share_their_dropout(dropping):
    # Two equal micro-batches: were their masks equal too, the mean of both would be the loss of the first.
    step, state = dropping
    equal = jax.tree.map(lambda a: np.concatenate([a, a]), random_batch(1))
    first = equal | {"weights": np.repeat([[1], [0]], T, axis=1).astype(np.float32)}
    both, one = (float(step(state, batch, NO_CONTROLS)[1]["loss"]) for batch in (equal, first))
    assert abs(both - one) > 1e-5 * one


def test_rows_do_not_share_their_dropout(dropping):
    # Two equal rows of one batch: were their masks equal too, swapping them would change nothing at all.
    step, state = dropping
    equal = jax.tree.map(lambda a: np.concatenate([a, a]), random_batch(1))
    weights = np.repeat([[1], [0]], T, axis=1).astype(np.float32)
    losses = [float(step(state, equal | {"weights": w}, NO_CONTROLS)[1]["loss"]) for w in (weights, weights[::-1])]
    assert abs(losses[0] - losses[1]) > 1e-5 * losses[0]


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
    found = controls(config)
    assert found._replace(stop_N=None) == Controls(1.0, 0.25, 0.125, 0.5, True, None)
    assert found.stop_N.tolist() == [0]
    assert MoEConfig().balance_weight == 0.01


def test_state_holds_no_random_numbers(hybrid):
    state = hybrid[2]
    assert TrainState._fields == ("step", "variables", "optimizer", "guard")
    assert not [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("n", [1, 2], ids=["one_device", "a_row_over_two"])
def test_no_masks_are_made_ahead_of_a_loop_over_layers_and_kept_for_it(n, remat):
    config = tiny("dense", {"num_layers": 10, "attention_form": "chunked"}, batch_size=2)
    config.train.remat, config.data.sequence_length = remat, 256
    batch = {name: jax.ShapeDtypeStruct((2, 256), array.dtype) for name, array in random_batch().items()}
    step = make_train_step(config, state_shapes(config)[1], mesh_of(Sizes(context=n), jax.devices()[:n]))
    knobs = controls(config, stop_N=np.zeros(n, np.int32))
    traced = list(equations(jax.make_jaxpr(step)(initial(config), batch, knobs).jaxpr))
    inner = [each.params["jaxpr"] for each in traced if each.primitive.name == "shard_map"]
    loops = [each for jaxpr in inner for each in equations(jaxpr) if each.primitive.name == "scan"]
    assert any(loop.params["length"] == 10 for loop in loops)
    # What one pair of blocks compares is the same for all; T^2 are not.
    masks = [each.aval for loop in loops for each in loop.invars if each.aval.dtype == bool and each.aval.ndim > 1]
    assert max((mask.size for mask in masks), default=0) <= 64 * 64
