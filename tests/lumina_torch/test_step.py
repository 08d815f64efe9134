"""One optimizer step: against plain PyTorch in float64, in parts and whole, and what it must not depend on.

B rows, T positions, L layers, A alternatives, M micro-batches, V vocabulary, W losses remembered.
"""

import copy
import math

import numpy as np
import pytest
import torch

from lumina.config import GuardConfig
from lumina.data.rows import Batches, Rows
from lumina_torch.device import fetch, no_compiler
from lumina_torch.model import TRAINING, state_by_name
from lumina_torch.optimizer import moments
from lumina_torch.step import (
    Controls,
    Guard,
    LossScale,
    Share,
    controls,
    init_state,
    is_good,
    make_gradients,
    make_train_step,
    update_biases,
)
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import FILLED, KINDS, T, V, packed_batch, random_batch, tiny

NO_CONTROLS = Controls(1.0, 0.0, 0.0, 0.0, True, np.zeros(1, np.int32))


def tensors(state):
    """Every tensor of a state by name: parameters, biases, moments and the guard's losses."""
    first, second, _ = moments(state.transformer, state.optimizer)
    named = {**state_by_name(state.transformer)}
    named |= {f"first {name}": m for name, m in first.items()} | {f"second {name}": m for name, m in second.items()}
    return {**{name: t.detach().numpy().copy() for name, t in named.items()}, "losses_W": state.guard.losses_W.copy()}


def bits(state):
    """All of a state but its step and its count of skips, as bytes; moments as they would be saved."""
    named = {name: (array.dtype, array.tobytes()) for name, array in tensors(state).items()}
    return named | {"updates": moments(state.transformer, state.optimizer)[2], "scale": state.loss_scale}


def weights_of(state):
    return {name: tensor.detach().clone() for name, tensor in state_by_name(state.transformer).items()}


def differ(before, after):
    return any(not torch.equal(before[name], after[name]) for name in before)


def doubled(config):
    """The initial state in float64."""
    state = init_state(config)
    state.transformer.double()
    return state


def train(step, state, batch, steps, knobs):
    """Returns (state, the metrics of each step)."""
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch, knobs)
        history.append(fetch(metrics))
    return state, history


# ------------------------------------------------------------------------------------- in float64, against an oracle

STEPS = 3
# Rows and tokens of very different weight: the mean of the micro-batches' means would be far off.
UNEVEN = np.random.default_rng(3).uniform(0, 1, (4, T)) * np.array([[8], [1], [0.1], [3]]) * packed_batch()["weights"]
BATCH, REAL = packed_batch() | {"weights": UNEVEN}, packed_batch()["segments"] >= 0
SELECTED = sum(min(length, 10) for length in FILLED)  # by depth routers, with 10 slots a row


def double(M, over="row", moe=(), mod=()):
    """A hybrid whose experts' capacity drops choices, with every auxiliary loss, clipping and the bias at work."""
    moe = {"bias_rate": 0.05, "balance_weight": 0.3, "z_weight": 0.2, "noop_experts": 1, "balance_over": over} | dict(moe)
    optim = {"clip_norm": 0.5, "weight_decay": 0.2, "eps": 1e-4}
    return tiny(moe=moe, mod={"predictor_weight": 0.4} | dict(mod), optim=optim, micro_batches=M)


EXACT = (("row", 1), ("row", 2), ("row", 4), ("batch", 1), ("batch", 2), ("batch", 4), ("micro_batch", 2))
PARTS = {"row": [[0], [1], [2], [3]], "micro_batch": [[0, 2], [1, 3]], "batch": [[0, 1, 2, 3]]}  # rows counted together


def plain_gradient(config, parts):
    """The loss as the paper has it: a full softmax, then a weighted mean over the batch; and the weighted router losses, the
    loads of the rows that are together added up. Returns (gradients by name, what the layers tell)."""
    transformer = doubled(config).transformer
    rows = [torch.from_numpy(BATCH[name].astype(np.int64)) for name in ("inputs", "segments", "positions", "targets")]
    hidden, metrics, _ = transformer(*rows[:3], dtype=torch.float64, mode=TRAINING)
    nats = torch.nn.functional.cross_entropy((hidden @ transformer.head_DV(torch.float64)).mT, rows[3], reduction="none")
    weights = torch.from_numpy(UNEVEN)
    load_LBA, share_LBA = metrics["moe"]["load_BA"].double(), metrics["moe"]["share_BA"]
    balance = 0.0
    for layer in range(2):
        for part in parts:
            load_A = load_LBA[layer, part].sum(0) / max(load_LBA[layer, part].sum(), 1)
            balance += 5 * sum((load_A * share_LBA[layer, row]).sum() for row in part) / SELECTED / 2
    moe, mod = config.model.moe, config.model.mod
    total = (weights * nats).sum() / weights.sum() + moe.balance_weight * balance
    total = total + moe.z_weight * metrics["moe"]["z_loss"].mean() / SELECTED
    total = total + mod.predictor_weight * metrics["mod"]["predictor_loss"].mean() / sum(FILLED)
    total.backward()
    return {name: p.grad.numpy() for name, p in transformer.named_parameters()}, fetch(metrics)


@pytest.fixture(scope="module")
def exact():
    """Results in float64 of STEPS steps for each of EXACT: the tensors after, and the metrics of, each step."""
    found = {}
    for over, M in EXACT:
        config = double(M, over)
        state, step, history = doubled(config), make_train_step(config, dtype=torch.float64), []
        for _ in range(STEPS):
            state, metrics = step(state, BATCH, controls(config))
            history.append((tensors(state), fetch(metrics)))
        found[over, M] = history
    return found


SPLIT = [("row", 2), ("row", 4), ("batch", 2), ("batch", 4)]


def slow():
    """(logits, metrics by row) of the slow transformer, before the first step."""
    named = {name: t.detach().numpy() for name, t in state_by_name(init_state(double(1)).transformer).items()}
    return oracles.transformer(double(1).model, named, BATCH["inputs"], BATCH["segments"], BATCH["positions"], training=True)


def test_float64_stays_float64(exact):
    arrays = exact["row", 2][-1][0]
    assert {array.dtype for name, array in arrays.items() if name != "losses_W"} == {np.dtype(np.float64)}


@pytest.mark.parametrize(("over", "M"), SPLIT)
def test_micro_batches_of_uneven_weight_change_no_parameter_moment_or_bias(exact, over, M):
    whole, parts = exact[over, 1][-1][0], exact[over, M][-1][0]
    for name, array in whole.items():
        assert_close(parts[name][~np.isnan(array)], array[~np.isnan(array)], 1e-12)


@pytest.mark.parametrize(("over", "M"), SPLIT)
def test_micro_batches_report_what_the_whole_batch_does(exact, over, M):
    for (_, one), (_, several) in zip(exact[over, 1], exact[over, M], strict=True):
        assert one.keys() == several.keys()
        for name, value in one.items():
            for inner in value if isinstance(value, dict) else [()]:
                a, b = (value[inner], several[name][inner]) if inner else (value, several[name])
                assert a.shape == b.shape
                assert_close(b, a, 1e-6 if a.dtype == np.float32 else 1e-12)  # shares of choices are float32 in any case


def test_what_the_balance_is_taken_over_matters(exact):
    found = [exact[of][0] for of in (("row", 1), ("micro_batch", 2), ("batch", 1))]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert np.all(np.abs(found[a][1]["moe"]["balance_loss"] - found[b][1]["moe"]["balance_loss"]) > 1e-3)
        router = "blocks.0.moe.router"
        assert np.any(found[a][0][router] != found[b][0][router])


@pytest.mark.parametrize(("over", "M"), EXACT)
def test_router_metrics_equal_the_slow_ones_summarised(exact, over, M):
    _, metrics = slow()
    found = exact[over, M][0][1]
    experts, depth = metrics["moe"], metrics["mod"]
    assert np.array_equal(found["moe"]["load_A"], experts["load_BA"].sum(axis=1))
    shares_of_layers = zip(experts["load_BA"], experts["share_BA"], strict=True)
    balance_L = np.array([oracles.balance_loss(*layer, PARTS[over]) for layer in shares_of_layers])
    assert_close(found["moe"]["balance_loss"], balance_L / SELECTED, 1e-12)
    decided_LBT = depth["logit_BT"] > 0
    expected = {
        "moe": {name: experts[name] / SELECTED for name in ("z_loss", "entropy", "dropped")},
        "mod": {
            "predictor_loss": depth["predictor_loss"] / sum(FILLED),
            "causal_capacity": decided_LBT[:, REAL].mean(axis=1),
            "agreement": (decided_LBT == depth["taken_BT"])[:, REAL].mean(axis=1),
        },
    }
    assert {*found["moe"]} == {*expected["moe"], "load_A", "balance_loss"}
    assert {*found["mod"]} == {*expected["mod"]}
    for group, names in expected.items():
        for name, values in names.items():
            assert_close(found[group][name], values, 1e-6 if found[group][name].dtype == np.float32 else 1e-12)


@pytest.mark.parametrize(("over", "M"), EXACT)
def test_the_reported_loss_is_the_language_model_loss_alone_weighted_over_the_whole_batch(exact, over, M):
    logits, _ = slow()
    nats = -np.log(np.apply_along_axis(oracles.softmax, -1, logits))
    nats = np.take_along_axis(nats, BATCH["targets"][..., None], axis=-1)[..., 0]
    loss = exact[over, M][0][1]["loss"]
    assert_close(loss, np.sum(UNEVEN * nats) / np.sum(UNEVEN), 1e-12)
    assert abs(np.mean(nats) - loss) > 1e-4  # the weights matter


def test_accuracy_is_the_weighted_share_of_targets_that_are_most_likely(exact):
    right = np.argmax(slow()[0], axis=-1) == BATCH["targets"]
    assert_close(exact["row", 2][0][1]["accuracy"], np.sum(UNEVEN[right]) / np.sum(UNEVEN), 1e-12)


@pytest.mark.parametrize(("over", "M"), [("row", 1), ("batch", 4), ("micro_batch", 2)])
def test_a_step_is_adamw_on_the_gradient_of_the_plain_loss(exact, over, M):
    config = double(1, over)
    optim, before = config.optim, doubled(config).transformer.state_dict()
    gradient, _ = plain_gradient(config, PARTS[over])
    after, metrics = exact[over, M][0]
    norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    assert norm > optim.clip_norm
    assert_close(metrics["gradient_norm"], norm, 1e-12)
    rate = optim.learning_rate / optim.warmup_steps
    for name, g in gradient.items():
        g = g * optim.clip_norm / norm
        # The first moments, corrected, are the gradient and its square.
        decay = 0.0 if name.endswith(("scale", "bias", "embedding.weight")) else optim.weight_decay
        expected = before[name].numpy() - rate * (g / (np.abs(g) + optim.eps) + decay * before[name].numpy())
        assert_close(after[name] - before[name].numpy(), expected - before[name].numpy(), 1e-9)


def test_every_learning_rate_of_the_warm_up_is_used(exact):
    assert_close([metrics["learning_rate"] for _, metrics in exact["row", 1]], [1e-2 * n / 4 for n in (1, 2, 3)], 1e-6)


def test_router_biases_move_once_a_step_against_the_load_of_all_micro_batches_and_stay_centred(exact):
    for of in EXACT:
        bias_LA = np.zeros((2, 5))  # four experts and a choice of nothing
        for arrays, metrics in exact[of]:
            load_LA = metrics["moe"]["load_A"].astype(float)
            assert (load_LA.sum(axis=-1) == SELECTED * 2).all()  # choices of each
            sign_LA = np.sign(load_LA.mean(axis=1, keepdims=True) - load_LA)
            bias_LA += 0.05 * (sign_LA - sign_LA.mean(axis=1, keepdims=True))
            found = np.stack([arrays[f"blocks.{i}.moe.bias"] for i in (0, 1)])
            assert_close(found, bias_LA, 1e-6)
            assert_close(found.sum(axis=1) + 1, [1, 1], 1e-6)
        assert np.all(np.abs(bias_LA).max(axis=0) > 0)


def test_recomputing_layers_changes_nothing():
    after = []
    for remat in (False, True):
        config = tiny("moe+mod", {"dropout": 0.2}, {"jitter": 0.1}, {"scope": "block"}, remat="full" if remat else "none")
        state, _ = make_train_step(config, dtype=torch.float64)(doubled(config), BATCH, controls(config))
        after.append(tensors(state))
    for name, array in after[0].items():
        assert np.array_equal(array, after[1][name], equal_nan=True), name


def test_bytes_of_text_are_those_of_targets_that_count():
    token_bytes, config = np.random.default_rng(4).integers(0, 9, V).astype(np.int32), tiny("dense", micro_batches=2)
    weights = np.where(UNEVEN > 0.5, UNEVEN, 0).astype(np.float32)
    _, metrics = make_train_step(config, token_bytes)(
        init_state(config), random_batch() | {"weights": weights}, controls(config)
    )
    assert int(metrics["text_bytes"]) == token_bytes[random_batch()["targets"][weights > 0]].sum()


def test_every_process_learns_how_many_were_asked_to_stop():
    config = tiny("dense")
    knobs = controls(config, stop_N=np.array([1, 0, 1], np.int32))
    assert int(make_train_step(config)(init_state(config), random_batch(), knobs)[1]["stop"]) == 2


# ------------------------------------------------------------------------------------------------------------- guard

WINDOW = 4


@pytest.fixture
def guarded():
    """(config, step, a state after one step) of a model with router biases that move and a window of four losses."""
    config = tiny("moe", moe={"bias_rate": 0.05}, guard={"spike_sigmas": 3.0, "spike_window": WINDOW})
    step = make_train_step(config)
    state, _ = step(init_state(config), random_batch(seed=7), controls(config))
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
    before, weights = bits(state), weights_of(state)
    state, metrics = step(state, batch, controls(config)._replace(**turned))
    assert bool(metrics["loss"].isfinite()) == (name == "gradient")
    assert not metrics["gradient_norm"].isfinite()
    assert (state.step, state.guard.skipped, int(metrics["skipped"])) == (2, 1, 1)
    assert bits(state) == before
    state, _ = step(state, random_batch(), controls(config))
    assert differ({"bias": weights["blocks.0.moe.bias"]}, {"bias": weights_of(state)["blocks.0.moe.bias"]})  # they do move


def test_a_gradient_of_a_skipped_step_is_not_part_of_the_next(guarded):
    config, step, state = guarded
    other = copy.deepcopy(state.transformer), copy.deepcopy(bits(state))
    step(state, nan_batch(), controls(config))
    assert all(parameter.grad is None for parameter in state.transformer.parameters())
    assert bits(state) == other[1]


def test_skips_are_counted_in_a_row(guarded):
    config, step, state = guarded
    counts = []
    for bad in (True, True, False, True, False, False):
        state, metrics = step(state, nan_batch() if bad else random_batch(), controls(config))
        counts.append(int(metrics["skipped"]))
    assert counts == [1, 2, 0, 1, 0, 0]


def test_the_window_holds_the_last_losses_of_updates_that_were_made(guarded):
    config, step, _ = guarded
    state, made = init_state(config), []
    for number, (bad, update) in enumerate([(0, 1), (1, 1), (0, 0), (0, 1), (0, 1), (1, 0), (0, 1), (0, 1)]):
        assert np.array_equal(state.guard.losses_W, np.float32([np.nan] * WINDOW + made)[-WINDOW:], equal_nan=True)
        assert state.guard.losses_W.dtype == np.float32
        batch = nan_batch(number) if bad else random_batch(seed=number)
        state, metrics = step(state, batch, controls(config, bool(update)))
        if update and not bad:
            made.append(float(metrics["loss"]))
    assert len(made) == 5


def test_passing_over_a_batch_leaves_all_but_the_step_and_ends_no_count_of_skips(guarded):
    config, step, state = guarded
    step(state, nan_batch(), controls(config))
    before = bits(state)
    for number, batch in enumerate((random_batch(), nan_batch())):
        state, metrics = step(state, batch, controls(config, update=False))
        assert (state.step, int(metrics["skipped"])) == (3 + number, 1)
        assert bits(state) == before
    assert int(step(state, nan_batch(), controls(config))[1]["skipped"]) == 2


def test_a_skipped_batch_still_uses_up_its_learning_rate(guarded):
    config, step, state = guarded
    step(state, nan_batch(), controls(config))
    assert float(step(state, random_batch(), controls(config))[1]["learning_rate"]) == pytest.approx(1e-2 * 3 / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "is_skipped"),
    [([2.0, 2.1, 2.0, 2.1], True), ([np.nan, 2.1, 2.0, 2.1], False), ([2.0, 9.0, 2.0, 9.0], False)],
    ids=["far_above", "window_not_full", "within_the_spread"],
)
def test_a_spike_is_skipped_when_the_window_is_full(guarded, losses, is_skipped):
    config, step, state = guarded
    state.guard = Guard(np.float32(losses), 0)
    before = weights_of(state)
    state, metrics = step(state, random_batch(), controls(config))
    assert 5 < metrics["loss"] < 6
    assert int(metrics["skipped"]) == is_skipped
    assert differ(before, weights_of(state)) != is_skipped
    expected = losses if is_skipped else [*losses[1:], float(metrics["loss"])]
    assert np.array_equal(state.guard.losses_W, np.float32(expected))


def test_a_spike_is_a_loss_above_the_mean_by_so_many_standard_deviations():
    losses_W = np.random.default_rng(0).uniform(2, 3, 16).astype(np.float32)
    for sigmas in (1.0, 4.0):
        limit = np.mean(losses_W, dtype=np.float64) + sigmas * np.std(losses_W, dtype=np.float64)
        for loss, good in ((limit - 1e-5, True), (limit + 1e-5, False), (0.0, True), (np.inf, False)):
            assert is_good(GuardConfig(spike_sigmas=sigmas), Guard(losses_W, 0), loss, 1.0) == good


def test_without_sigmas_no_finite_loss_is_a_spike():
    guard = Guard(np.ones(4, np.float32), 0)
    for loss, norm, good in ((1e9, 1e9, True), (np.nan, 1.0, False), (1.0, np.inf, False), (1.0, np.nan, False)):
        assert is_good(GuardConfig(), guard, loss, norm) == good


# --------------------------------------------------------------------------------------------------------- float16


def half(scale, window=3, kind="dense"):
    config = tiny(kind, compute_dtype="float16")
    config.torch.loss_scale, config.torch.loss_scale_window = scale, window
    return config


def test_an_overflow_of_float16_halves_the_scale_until_updates_are_made_and_is_no_skip_of_the_guard():
    config = half(2.0**40)
    state, step = init_state(config), make_train_step(config)
    before, scales = bits(state), [state.loss_scale.scale]
    while True:
        state, metrics = step(state, random_batch(), controls(config))
        assert int(metrics["skipped"]) == 0
        assert metrics["loss"].isfinite()
        assert float(metrics["loss_scale"]) == state.loss_scale.scale
        if metrics["gradient_norm"].isfinite():
            break
        assert bits(state) == before | {"scale": state.loss_scale}
        scales.append(state.loss_scale.scale)
    assert scales == [2.0**n for n in range(40, 40 - len(scales), -1)]
    assert 10 < len(scales) < 40
    assert state.step == len(scales)
    assert state.loss_scale == LossScale(scales[-1], 1)
    assert bits(state) != before | {"scale": state.loss_scale}


def test_the_scale_doubles_after_so_many_updates_without_overflow_and_begins_to_count_anew():
    config = half(256.0)
    state, step, found = init_state(config), make_train_step(config), []
    for _ in range(7):
        state, _ = step(state, random_batch(), controls(config))
        found.append(tuple(state.loss_scale))
    assert found == [(256, 1), (256, 2), (512, 0), (512, 1), (512, 2), (1024, 0), (1024, 1)]


def test_an_overflow_ends_the_count_of_good_steps():
    config = half(256.0)
    state, step = init_state(config), make_train_step(config)
    step(state, random_batch(), controls(config))
    state.loss_scale = LossScale(2.0**40, 2)
    state, _ = step(state, random_batch(), controls(config))
    assert state.loss_scale == LossScale(2.0**39, 0)


def test_an_overflow_at_the_smallest_scale_is_a_skip_of_the_guard():
    for scale, after, skipped in ((2.0, 1.0, 0), (1.0, 1.0, 1)):
        config = half(scale, kind="moe")
        huge = controls(config)._replace(z_weight=3e38)  # a gradient that is not finite at any scale
        state, metrics = make_train_step(config)(init_state(config), random_batch(), huge)
        assert metrics["loss"].isfinite()
        assert not metrics["gradient_norm"].isfinite()
        assert (state.loss_scale, state.guard.skipped) == (LossScale(after, 0), skipped)


def test_a_loss_that_is_not_finite_says_nothing_of_the_scale():
    config = half(256.0)
    state, _ = make_train_step(config)(init_state(config), nan_batch(), controls(config))
    assert (state.loss_scale, state.guard.skipped) == (LossScale(256.0, 0), 1)


def test_a_batch_that_is_passed_over_leaves_the_scale():
    config = half(2.0**40)
    state = make_train_step(config)(init_state(config), random_batch(), controls(config, update=False))[0]
    assert state.loss_scale == LossScale(2.0**40, 0)


@pytest.mark.parametrize("scale", [2.0**4, 2.0**12])
def test_the_scale_is_no_part_of_the_gradient(scale):
    found = {}
    for config in (half(scale), tiny("dense")):
        state, metrics = make_train_step(config)(init_state(config), random_batch(), controls(config))
        found[config.train.compute_dtype] = float(metrics["gradient_norm"]), tensors(state)
    (norm, arrays), (exact_norm, exact_arrays) = found["float16"], found["float32"]
    assert_close(norm, exact_norm, 1e-2)
    for name, array in exact_arrays.items():
        if name.startswith("first "):
            assert_close(arrays[name], array, 2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_and_keeps_float32_state(dtype):
    config = tiny(compute_dtype=dtype)
    state, history = train(make_train_step(config), init_state(config), random_batch(), 30, controls(config))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert {array.dtype for array in tensors(state).values()} == {np.dtype(np.float32)}
    assert ("loss_scale" in history[0]) == (dtype == "float16")


# ------------------------------------------------------------------------------------------------- controls and seeds


def test_auxiliary_weights_change_the_update_and_not_the_reported_loss():
    config = tiny()
    step, after = make_train_step(config), {}
    for i in (0, 1, 2, 3):
        knobs = NO_CONTROLS._replace(**{Controls._fields[i]: 10.0}) if i else NO_CONTROLS
        state, metrics = step(init_state(config), random_batch(), knobs)
        after[i] = float(metrics["loss"]), weights_of(state)
    for i in (1, 2, 3):
        assert after[i][0] == after[0][0]
        assert differ(after[i][1], after[0][1])


def test_the_learning_rate_scale_scales_the_whole_update_decay_included():
    config = tiny()
    start, step, updates = weights_of(init_state(config)), make_train_step(config), {}
    for scale in (0.0, 1.0, 3.0):
        state, metrics = step(init_state(config), random_batch(), controls(config)._replace(learning_rate_scale=scale))
        assert float(metrics["learning_rate"]) == pytest.approx(scale * 1e-2 / 4, rel=1e-6)
        updates[scale] = {name: after - start[name] for name, after in weights_of(state).items()}
    for name in start:
        assert not updates[0.0][name].any()
        assert_close(updates[3.0][name], 3 * updates[1.0][name], 1e-3)  # of differences of float32


def test_without_a_bias_rate_router_biases_stay():
    config = tiny()
    state, metrics = make_train_step(config)(init_state(config), random_batch(), controls(config))
    assert (np.ptp(fetch(metrics)["moe"]["load_A"], axis=1) > 0).all()
    assert not any(buffer.any() for buffer in state.transformer.buffers())


def test_the_step_counts_up_and_the_same_state_is_returned():
    config = tiny()
    state = init_state(config)
    after, history = train(make_train_step(config), state, random_batch(), 6, controls(config))
    assert after is state
    assert after.step == 6
    assert_close([m["learning_rate"] for m in history[:5]], [1e-2 * n / 4 for n in (1, 2, 3, 4, 4)], 1e-6)
    assert history[5]["learning_rate"] < 1e-2


def test_the_same_seed_gives_the_same_bits_and_another_another_model():
    config = tiny(model={"dropout": 0.1}, moe={"jitter": 0.1})
    runs = [train(make_train_step(config), init_state(config), random_batch(), 3, controls(config))[0] for _ in range(2)]
    assert bits(runs[0]) == bits(runs[1])
    assert differ(weights_of(init_state(tiny(seed=1))), weights_of(init_state(tiny())))


def test_router_biases_of_interleaved_layers_follow_their_own_loads():
    config = tiny(model={"num_layers": 4}, moe={"pattern": "0,2,3", "bias_rate": 0.1}, mod={"pattern": "2"})
    transformer = init_state(config).transformer
    load_LA = torch.tensor([[9, 1, 1, 1], [1, 9, 1, 1], [2, 2, 2, 6]])  # of layers 0, 2 and 3
    update_biases(config.model, transformer, {"moe": {"load_A": load_LA}})
    found = dict(transformer.named_buffers())
    for layer, heavy in ((0, 0), (2, 1), (3, 3)):
        expected = np.where(np.arange(4) == heavy, -0.15, 0.05)  # signs -1 and +1, less their mean of 0.5, times the rate
        assert_close(found[f"blocks.{layer}.moe.bias"], expected, 1e-6)


def test_a_tie_is_one_however_many_alternatives_there_are():
    config = tiny(moe={"bias_rate": 0.1, "num_experts": 5})
    for load in (*range(1, 40), 16_777_217, 400_000_001):
        transformer = init_state(config).transformer
        update_biases(config.model, transformer, {"moe": {"load_A": torch.tensor([[load] * 5, [load + 1] + [load] * 4])}})
        found = dict(transformer.named_buffers())
        assert not found["blocks.0.moe.bias"].any()
        assert_close(found["blocks.1.moe.bias"], [-0.16] + [0.04] * 4, 1e-6)


def test_dropout_depends_on_the_step_and_on_nothing_else():
    config = tiny("dense", model={"dropout": 0.5}, batch_size=2, micro_batches=2)
    losses, step = [], make_train_step(config)
    for number in (0, 0, 1, 2):
        state = init_state(config)
        state.step = number
        losses.append(float(step(state, random_batch(2), NO_CONTROLS)[1]["loss"]))
    assert losses[0] == losses[1]
    assert len({*losses}) == 3


def test_micro_batches_change_no_dropout_and_share_none():
    losses = {}
    equal = {name: np.concatenate([array, array]) for name, array in random_batch(1).items()}
    for M in (1, 2):
        config = tiny("dense", model={"dropout": 0.5}, batch_size=2, micro_batches=M)
        for which, rows in (("both", [1, 1]), ("first", [1, 0])):
            batch = equal | {"weights": np.repeat(rows, T).reshape(2, T).astype(np.float64)}
            step = make_train_step(config, dtype=torch.float64)
            losses[M, which] = float(step(doubled(config), batch, NO_CONTROLS)[1]["loss"])
    assert_close(losses[2, "both"], losses[1, "both"], 1e-12)
    assert abs(losses[2, "both"] - losses[2, "first"]) > 1e-5  # equal rows, of other masks


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_on_one_repeated_batch_falls(kind):
    config = tiny(kind)
    _, history = train(make_train_step(config), init_state(config), random_batch(), 30, controls(config))
    assert abs(history[0]["loss"] - math.log(V)) < 0.1
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


class Cycle:
    """A token stream that repeats 5, 6, 7."""

    name, num_tokens = "train", 3 * 4 * T + 1

    def read(self, start, stop):
        return (5 + np.arange(start, stop) % 3).astype(np.int32)


def test_a_trained_model_predicts_the_next_token_and_not_the_one_after():
    config = tiny("dense", steps=60)
    step, state, batches = make_train_step(config), init_state(config), Batches(Rows(Cycle(), T, 0), 4, seed=0)
    for n in range(60):
        state, _ = step(state, batches.batch(n), controls(config))
    tokens = torch.from_numpy(Cycle().read(1, T + 1)[None].astype(np.int64))  # a row that begins within the cycle
    places = torch.zeros_like(tokens), torch.arange(T)[None]
    with torch.no_grad():
        hidden, _, _ = state.transformer(tokens, *places, dtype=torch.float32)
        predicted = (hidden @ state.transformer.head_DV(torch.float32)).argmax(-1).numpy()
    assert np.mean(predicted == Cycle().read(2, T + 2)) > 0.9
    assert np.mean(predicted == Cycle().read(3, T + 3)) < 0.1


def test_the_default_controls_are_those_of_the_config():
    config = tiny(moe={"balance_weight": 0.25, "z_weight": 0.125}, mod={"predictor_weight": 0.5})
    found = controls(config)
    assert found._replace(stop_N=None) == Controls(1.0, 0.25, 0.125, 0.5, True, None)
    assert found.stop_N.tolist() == [0]


@pytest.mark.skipif(bool(no_compiler()), reason=no_compiler())
def test_a_compiled_layer_trains_as_one_that_is_not_and_keeps_its_names():
    config = tiny("dense", model={"num_layers": 1})
    plain, _ = make_train_step(config)(init_state(config), random_batch(), controls(config))
    config.torch.compile = True
    compiled, metrics = make_train_step(config)(init_state(config), random_batch(), controls(config))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for name, array in tensors(plain).items():
        if name.startswith("first "):
            assert_close(tensors(compiled)[name], array, 5e-6)


@pytest.mark.parametrize(("kind", "sums"), [("dense", 1), ("moe", 2), ("dense+mod", 2)])
def test_processes_sum_no_counts_of_tokens_where_nothing_is_routed(kind, sums):
    config, summed = tiny(kind), []
    share = Share(total=lambda of_one: summed.append(of_one) or of_one)
    state, batch = init_state(config), {name: torch.tensor(array) for name, array in random_batch().items()}
    batch |= {name: batch[name].long() for name in ("inputs", "targets", "segments", "positions")}
    make_gradients(config, None, None, torch.device("cpu"), share)(state, batch, controls(config))
    assert len(summed) == sums
