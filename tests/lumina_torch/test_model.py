"""The whole transformer, against the slow one in numpy, for every kind of layer.

B rows, T positions, V vocabulary.
"""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lumina.architecture import layer_kinds, tensor_table
from lumina.config import MoDConfig, ModelConfig, MoEConfig
from lumina_torch.draw import Draw
from lumina_torch.model import (
    CAUSAL,
    TRAINING,
    Block,
    Mode,
    Transformer,
    create,
    load_state,
    make_caches,
    state_by_name,
)
from lumina_torch.moe import balance_loss
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, V = 2, 9, 11


def _config(moe, mod, num_layers=2, jitter=0.0, experts=(), depth=(), **fields):
    return ModelConfig(
        **{"vocab_size": V, "d_model": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 6, **fields},
        num_layers=num_layers,
        moe=MoEConfig(
            pattern=moe, **{"num_experts": 3, "top_k": 2, "capacity_factor": 0.75, "jitter": jitter, **dict(experts)}
        ),
        mod=MoDConfig(pattern=mod, **{"capacity": 0.5, **dict(depth)}),
    )


BLOCK, PREDICTED, RANDOM = {"scope": "block"}, {"predictor_width": 3}, {"router": "random"}
NOOPS = {"noop_experts": 2, "capacity_factor": 1.0, "top_k": 3}
KINDS = {
    "dense": _config("none", "none"),
    "moe": _config("all", "none"),
    "dense+mod": _config("none", "all"),
    "moe+mod": _config("all", "all"),
}
EVERY = KINDS | {
    "moe+mod predicted": _config("all", "all", depth=PREDICTED),
    "dense+mod random": _config("none", "all", depth=RANDOM),
    "dense+mod block": _config("none", "all", depth=BLOCK),
    "moe+mod block": _config("all", "all", depth=BLOCK, qk_norm=True),
    "moe+mod block predicted": _config("all", "all", experts=NOOPS, depth=BLOCK | PREDICTED),
    "moe+mod block random dropless": _config("all", "all", experts={"dispatch": "dropless"}, depth=BLOCK | RANDOM),
    "dense+mod block every second": _config("none", "every_2", 4, depth=BLOCK),
    "moe of some layers, mod block of others": _config("0,2", "0,1", 3, depth=BLOCK),
    "mixed": _config("1,2,3,4", "2,4", num_layers=5),
    "shared experts, untied, scaled": _config(
        "all", "none", experts={"shared_experts": 2}, tie_embeddings=False, scale_embeddings=True
    ),
    "geglu, normed heads, epsilon": _config("none", "none", activation="geglu", qk_norm=True, norm_eps=0.1),
}

rng = np.random.default_rng(0)
INPUTS_BT = rng.integers(0, V, (B, T))
# Two documents a row. The positions have gaps, so that counting anew what is there would not give them.
SEGMENTS_BT = np.array([[1] * 4 + [2] * 5, [1] * 7 + [2] * 2])
POSITIONS_BT = np.array([[0, 1, 2, 7, 0, 2, 3, 4, 9], [0, 1, 2, 3, 4, 5, 9, 0, 3]])
BATCH = (INPUTS_BT, SEGMENTS_BT, POSITIONS_BT)
# Nothing in the last places: after more tokens than a depth router selects, and after fewer; and in a whole row.
PACKED = (INPUTS_BT, np.where(np.arange(T) < [[7], [3]], SEGMENTS_BT, -1), POSITIONS_BT)
A_ROW_OF_NONE = (INPUTS_BT, np.where(np.arange(T) < [[0], [8]], SEGMENTS_BT, -1), POSITIONS_BT)
BATCHES = {"full": BATCH, "packed": PACKED, "a row of none": A_ROW_OF_NONE}
COTANGENT_BTV = rng.standard_normal((B, T, V))
F32, F64 = torch.float32, torch.float64


@functools.cache
def _weights(name):
    return oracles.random_weights(tensor_table(EVERY[name]), seed=1)


def _transformer(name, dtype=F32):
    transformer = Transformer(EVERY[name])
    load_state(transformer, _weights(name))
    return transformer.to(dtype)


def _logits_and_metrics(transformer, batch=BATCH, mode=CAUSAL, dtype=F32, **rest):
    tensors = (torch.tensor(np.ascontiguousarray(a), dtype=torch.long) for a in batch)
    hidden_BTD, metrics, _ = transformer(*tensors, dtype=dtype, mode=mode, **rest)
    return hidden_BTD @ transformer.head_DV(dtype), metrics


@torch.no_grad()
def _logits(name, batch=BATCH, mode=CAUSAL, dtype=F64, **rest):
    return _logits_and_metrics(_transformer(name, dtype), batch, mode, dtype, **rest)[0]


def _auxiliary(metrics, balance_loss):
    """The router losses, each the mean over its layers."""
    total = 0.0
    if "moe" in metrics:
        loads, shares = metrics["moe"]["load_BA"], metrics["moe"]["share_BA"]
        total += sum(balance_loss(load_BA, share_BA) for load_BA, share_BA in zip(loads, shares, strict=True)) / len(loads)
        total += metrics["moe"]["z_loss"].mean()
    return total + (metrics["mod"]["predictor_loss"].mean() if "mod" in metrics else 0.0)


def _gradients(transformer, dtype=F32, batch=BATCH, **rest):
    """Logits, metrics and gradients in training."""
    logits_BTV, metrics = _logits_and_metrics(transformer, batch, TRAINING, dtype, **rest)
    auxiliary = _auxiliary(metrics, lambda load_BA, share_BA: balance_loss(load_BA.to(share_BA.dtype), share_BA))
    ((torch.tensor(COTANGENT_BTV, dtype=dtype) * logits_BTV).sum() + auxiliary).backward()
    return logits_BTV.detach(), metrics, {name: p.grad for name, p in transformer.named_parameters()}


def _assert_metrics_close(metrics, expected, tolerance):
    for group in expected:
        for name, values in expected[group].items():
            assert_close(metrics[group][name].detach(), values, max(tolerance, 1e-6) if name == "dropped" else tolerance)


# ------------------------------------------------------------------------------------ against the slow transformer


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("of", BATCHES)
def test_training_in_float64_equals_the_slow_transformer_with_every_gradient(name, of):
    config, batch = EVERY[name], BATCHES[of]
    logits_BTV, metrics, gradients = _gradients(_transformer(name, F64), F64, batch)
    expected_BTV, expected = oracles.transformer(config, _weights(name), *batch, True)
    assert_close(logits_BTV, expected_BTV, 1e-12)
    assert {group: set(m) for group, m in metrics.items()} == {group: set(m) for group, m in expected.items()}
    _assert_metrics_close(metrics, expected, 1e-12)

    def loss(weights):
        logits_BTV, metrics = oracles.transformer(config, weights | fixed, *batch, True)
        rows = [[b] for b in range(B)]
        auxiliary = _auxiliary(metrics, lambda load_BA, share_BA: oracles.balance_loss(load_BA, share_BA, rows))
        return np.sum(COTANGENT_BTV * logits_BTV) + auxiliary

    fixed = {name: w for name, w in _weights(name).items() if name not in gradients}
    assert_gradients(loss, {n: _weights(name)[n] for n in gradients}, gradients, tolerance=1e-12)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, TRAINING) for name in KINDS), *((name, CAUSAL) for name in EVERY)], ids=lambda of: str(of)[:45]
)
@pytest.mark.parametrize("of", BATCHES)
def test_float32_equals_the_slow_transformer(name, mode, of):
    config, batch = EVERY[name], BATCHES[of]
    with torch.no_grad():
        logits_BTV, metrics = _logits_and_metrics(_transformer(name), batch, mode)
    expected_BTV, expected = oracles.transformer(config, _weights(name), *batch, mode.training, mode.top)
    assert_close(logits_BTV, expected_BTV)
    _assert_metrics_close(metrics, expected, 5e-6)
    assert set(metrics) == set(expected)
    if "mod" in expected:
        assert 0 < np.mean(expected["mod"]["taken_BT"]) < 1


def test_the_top_may_be_selected_without_dropping():
    mode = Mode(top=True)
    with torch.no_grad():
        logits_BTV, metrics = _logits_and_metrics(_transformer("moe+mod block"), mode=mode)
    assert_close(logits_BTV, oracles.transformer(EVERY["moe+mod block"], _weights("moe+mod block"), *BATCH, False, True)[0])
    assert not metrics["moe"]["dropped"].any()


@pytest.mark.parametrize("mode", [TRAINING, CAUSAL], ids=["training", "causal"])
@pytest.mark.parametrize("name", EVERY)
def test_what_empty_positions_hold_changes_nothing_of_the_others(name, mode):
    """Not a bit of any real token; and no router tells of them."""
    real_BT = PACKED[1] >= 0
    other = (np.where(real_BT, INPUTS_BT, (INPUTS_BT + 3) % V), PACKED[1], np.where(real_BT, POSITIONS_BT, 5))
    with torch.no_grad():
        (one_BTV, told), (two_BTV, told_too) = (_logits_and_metrics(_transformer(name), b, mode) for b in (PACKED, other))
    real_BT = torch.tensor(real_BT)
    assert torch.equal(one_BTV[real_BT], two_BTV[real_BT])
    assert (one_BTV - two_BTV).abs().max() > 1e-2
    for group, metrics in told.items():
        assert all(torch.equal(metrics[each], told_too[group][each]) for each in metrics if each != "logit_BT")
    if "mod" in told:
        assert not (told["mod"]["taken_BT"] & ~real_BT).any()


NOISY = {
    "dense": _config("none", "none", dropout=0.3),
    "moe": _config("all", "none", jitter=0.3, dropout=0.3),
    "moe+mod": _config("all", "all", jitter=0.3, dropout=0.3),
    "moe+mod block dropless": _config("all", "all", jitter=0.3, dropout=0.3, depth=BLOCK, experts={"dispatch": "dropless"}),
}


@pytest.mark.parametrize("kind", NOISY)
def test_rematerialisation_gives_the_same_bits(kind):
    draw = Draw(0, 0, (0, 1))
    plain, again = (_gradients(create(NOISY[kind], 1), remat=remat, draw=draw) for remat in (False, True))
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(again[2][n], gradient) for n, gradient in plain[2].items())
    assert all(torch.equal(again[1][group][n], m) for group in plain[1] for n, m in plain[1][group].items())


def test_rematerialisation_keeps_less_for_the_backward_pass():
    def kept(remat):
        sizes, transformer = [], _transformer("dense")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            _logits_and_metrics(transformer, mode=TRAINING, remat=remat)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


# ------------------------------------------------------------------------------------------------- what sees what


def _before_and_after(name, prefix, mode):
    """Logits of one document with two endings."""
    changed_BT = INPUTS_BT.copy()
    changed_BT[:, prefix:] = (changed_BT[:, prefix:] + 1) % V
    return (_logits(name, (inputs, np.zeros((B, T)), POSITIONS_BT), mode) for inputs in (INPUTS_BT, changed_BT))


@pytest.mark.parametrize("name", EVERY)
def test_the_causal_logits_of_a_prefix_do_not_depend_on_what_follows(name):
    for prefix in (1, 5, T - 1):
        before, after = _before_and_after(name, prefix, CAUSAL)
        assert_close(after[:, :prefix], before[:, :prefix], 1e-13)
        assert (after[:, prefix:] - before[:, prefix:]).abs().amax() > 1e-2


@pytest.mark.parametrize("name", ["dense+mod", "moe+mod block"])
def test_the_top_of_a_row_sees_the_future(name):
    before, after = _before_and_after(name, 5, Mode(top=True))
    assert (after[:, :5] - before[:, :5]).abs().amax() > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_packed_documents_equal_each_alone(name):
    cut, (first, second) = 4, (INPUTS_BT[:1, :4], INPUTS_BT[:1, 4:])
    positions = np.array([[*range(cut), *range(T - cut)]])
    together_TV = _logits(name, (INPUTS_BT[:1], np.array([[0] * cut + [1] * (T - cut)]), positions))[0]
    for document, logits_TV in ((first, together_TV[:cut]), (second, together_TV[cut:])):
        alone = (document, np.zeros_like(document), np.arange(document.shape[1])[None])
        assert_close(logits_TV, _logits(name, alone)[0], 1e-12)


# As they come: the first tokens of each row, as many as WRITTEN says, then one at a time; all in pieces of four.
PIECE, WRITTEN = 4, (4, 2)


@pytest.mark.parametrize("name", EVERY)
def test_tokens_through_the_caches_equal_the_whole_row_and_only_those_taken_are_kept(name):
    config, transformer = EVERY[name], _transformer(name, F64)
    positions_BT = np.tile(np.arange(T) * 2 + 1, (B, 1))
    expected_BTV, expected = oracles.transformer(config, _weights(name), INPUTS_BT, np.zeros((B, T)), positions_BT, False)
    caches, found_BTV = make_caches(config, B, F64, "cpu"), np.full((B, T, V), np.nan)
    done = np.zeros(B, int)
    while np.any(done < T):
        count_B = np.where(done == 0, WRITTEN, np.where(done < T, 1, 0))
        columns = np.minimum(done[:, None] + np.arange(PIECE), T - 1)  # beyond what is written: filling
        inputs, positions = (np.take_along_axis(a, columns, axis=1) for a in (INPUTS_BT, positions_BT))
        written_BT = torch.tensor(np.arange(PIECE) < count_B[:, None])
        with torch.no_grad():
            batch = (inputs, np.zeros_like(inputs), positions)
            logits, _ = _logits_and_metrics(transformer, batch, dtype=F64, caches=caches, written_BT=written_BT)
        for b in range(B):
            found_BTV[b, done[b] : done[b] + count_B[b]] = logits[b, : count_B[b]]
        done += count_B
    assert_close(found_BTV, expected_BTV, 1e-12)
    lengths_LB = np.full((config.num_layers, B), T)
    if config.mod.scope == "block":
        mod_layers = [i for i, kind in enumerate(layer_kinds(config)) if kind.endswith("+mod")]
        lengths_LB[mod_layers] = expected["mod"]["taken_BT"].sum(axis=-1)
        assert len(set(lengths_LB.ravel())) > 1  # rows or layers differ
    assert [cache.length_B.tolist() for cache in caches] == lengths_LB.tolist()


# -------------------------------------------------------------------------------------------------- random numbers


def _noisy_logits(kind, rows, numbers, step=0):
    """Of these rows of the batch, drawing as rows of these numbers."""
    batch = [a[list(rows)] for a in BATCH]
    transformer = create(NOISY[kind], 1).double()
    return _logits_and_metrics(transformer, batch, TRAINING, F64, draw=Draw(0, step, tuple(numbers)))[0].detach()


@pytest.mark.parametrize("kind", NOISY)
def test_what_a_row_draws_depends_on_its_number_alone_and_not_on_micro_batches_or_order(kind):
    together_BTV = _noisy_logits(kind, (0, 1), (0, 1))
    assert_close(_noisy_logits(kind, (1, 0), (1, 0)), together_BTV[[1, 0]], 1e-12)
    for b in range(B):
        assert_close(_noisy_logits(kind, (b,), (b,)), together_BTV[[b]], 1e-12)
    assert (_noisy_logits(kind, (0, 1), (2, 3)) - together_BTV).abs().max() > 1e-2
    assert (_noisy_logits(kind, (0, 1), (0, 1), step=1) - together_BTV).abs().max() > 1e-2


@pytest.mark.parametrize(("mode", "draw"), [(TRAINING, None), (CAUSAL, Draw(0, 0, (0, 1)))], ids=["no_draw", "evaluation"])
def test_dropout_and_jitter_act_only_in_training_with_a_draw(mode, draw):
    noisy, calm = create(NOISY["moe"], 1), create(_config("all", "none"), 1)
    with torch.no_grad():
        assert torch.equal(_logits_and_metrics(noisy, mode=mode, draw=draw)[0], _logits_and_metrics(calm, mode=mode)[0])


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(dtype):
    p = 0.1
    block, ones = SimpleNamespace(dropout=p), torch.ones(20, 100, 100, dtype=dtype)
    dropped = Block._drop(block, ones, TRAINING, Draw(0, 0, tuple(range(20))), "attention")
    assert dropped.dtype == dtype
    assert set(dropped.unique().tolist()) == {0, (torch.ones((), dtype=dtype) / (1 - p)).item()}
    # Six standard errors of 200,000 draws
    assert abs((dropped == 0).double().mean().item() - p) < 6 * math.sqrt(p * (1 - p) / ones.numel())


def test_a_row_drops_the_same_whatever_the_precision():
    block, draw = SimpleNamespace(dropout=0.3), Draw(0, 0, (0,))
    kept = [
        Block._drop(block, torch.ones(1, 300, 100, dtype=d), TRAINING, draw, "attention") != 0 for d in (F32, torch.bfloat16)
    ]
    assert torch.equal(*kept)


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_compute_keeps_float32_gradients_and_metrics_and_is_near_the_slow_transformer(kind):
    logits_BTV, metrics, gradients = _gradients(_transformer(kind), torch.bfloat16)
    assert logits_BTV.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {F32}
    assert {a.dtype for group in metrics.values() for a in group.values()} <= {F32, torch.long, torch.bool}
    if kind in ("dense", "moe"):  # where no decision of depth is near enough to go the other way
        assert_close(logits_BTV.float(), oracles.transformer(KINDS[kind], _weights(kind), *BATCH, True)[0], 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_kept_throughout(kind):
    logits_BTV, metrics, gradients = _gradients(_transformer(kind, F64), F64)
    assert {logits_BTV.dtype} == {gradient.dtype for gradient in gradients.values()} == {F64}
    floats = {name: a.dtype for group in metrics.values() for name, a in group.items() if a.is_floating_point()}
    assert {dtype for name, dtype in floats.items() if name != "dropped"} <= {F64}


# ----------------------------------------------------------------------------------------- names and initial values


@pytest.mark.parametrize("name", EVERY)
def test_parameters_and_buffers_are_the_tensors_of_the_table(name):
    transformer = Transformer(EVERY[name], device="meta")
    for named, trained in ((transformer.named_parameters(), True), (transformer.named_buffers(), False)):
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in named}
        expected = {t.name: (t.shape, F32) for t in tensor_table(EVERY[name]) if t.trained == trained}
        assert found == expected
    assert list(state_by_name(transformer)) == [tensor.name for tensor in tensor_table(EVERY[name])]


def test_a_state_is_loaded_from_arrays_and_from_another_transformer():
    source, target = _transformer("mixed"), create(EVERY["mixed"], 0)
    for given in (_weights("mixed"), state_by_name(source)):
        load_state(target, given)
        for name, tensor in state_by_name(target).items():
            assert np.array_equal(tensor.detach().numpy(), _weights("mixed")[name])
    with torch.no_grad():
        target.embedding.weight.zero_()
    assert source.embedding.weight.any()  # copied, not shared


def _replaced(name, value):
    return {**_weights("moe"), name: value}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({n: w for n, w in _weights("moe").items() if n != "blocks.1.moe.bias"}, r"blocks.1.moe.bias: is missing, the model"),
        (_replaced("blocks.2.moe.bias", np.zeros(3, np.float32)), r"blocks.2.moe.bias: .* needs no such tensor"),
        (_replaced("final_norm.scale", np.zeros(9, np.float32)), r"final_norm.scale: is \(\(9,\), 'float32'\), .* \(\(8,\), "),
        (_replaced("embedding.weight", np.zeros((V, 8))), r"embedding.weight: is .*float64.* needs .*float32"),
        (_replaced("embedding.weight", torch.zeros(V, 8).half()), r"embedding.weight: is .*float16.* needs .*float32"),
    ],
    ids=["missing", "unknown", "shape", "dtype", "dtype_of_a_tensor"],
)
def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_is_changed(given, says):
    transformer = create(EVERY["moe"], 0)
    before = {name: tensor.detach().clone() for name, tensor in state_by_name(transformer).items()}
    with pytest.raises(ValueError, match=says):
        load_state(transformer, given)
    assert all(torch.equal(before[name], tensor) for name, tensor in state_by_name(transformer).items())


WIDE = _config("1,2", "0,2", 3, vocab_size=128, d_model=64, num_heads=2, head_dim=16, d_ff=48, tie_embeddings=False)


def test_every_tensor_and_every_seed_draws_its_own_values_and_the_same_ones_again():
    values, again, others = (state_by_name(create(WIDE, seed)) for seed in (0, 0, 1))
    drawn = [tensor for tensor in tensor_table(WIDE) if tensor.std is not None]
    first_8 = {tuple((values[t.name].flatten()[:8] / t.std).detach().numpy().round(3).tolist()) for t in drawn}
    assert len(first_8) == len(drawn)
    assert not any(torch.equal(values[t.name], others[t.name]) for t in drawn)
    assert all(torch.equal(values[name], again[name]) for name in values)


def test_initial_values_have_the_constants_and_spread_of_the_table():
    values = state_by_name(create(WIDE, 0))
    for tensor in tensor_table(WIDE):
        value = values[tensor.name].detach().double()
        if tensor.std is None:
            assert (value == tensor.constant).all(), tensor.name
        else:
            assert abs(value.std() / tensor.std - 1) < 5 / math.sqrt(2 * value.numel()), tensor.name  # five standard errors
            assert abs(value.mean()) < 5 * tensor.std / math.sqrt(value.numel()), tensor.name


def test_initial_values_do_not_depend_on_the_other_layers_or_the_global_generator():
    torch.manual_seed(7)
    mixed = state_by_name(create(WIDE, 0))
    dense = state_by_name(create(_config("none", "none", 3, vocab_size=128, d_model=64, num_heads=2, head_dim=16, d_ff=48), 0))
    shared = set(mixed) & set(dense)
    assert {"embedding.weight", "blocks.0.feedforward.down", "blocks.2.attention.query"} <= shared
    assert all(torch.equal(mixed[name], dense[name]) for name in shared)
