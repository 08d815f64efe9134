"""Mixture-of-Depths, against a mask: compute every token, keep the chosen ones, multiply by their gates."""

import numpy as np
import pytest
import torch

from lumina.architecture import block_tensors
from lumina.config import MoDConfig, ModelConfig, MoEConfig
from lumina_torch.attend import Places
from lumina_torch.mod import MoD, select_top, uniform
from lumina_torch.model import CAUSAL, TRAINING, Block, Mode
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, D = 2, 7, 5
POSITIONS_BT = np.array([[0, 1, 2, 7, 0, 2, 3], [0, 1, 2, 3, 4, 0, 9]])
LAYER = 2
EVERYONE = np.ones((B, T), bool)
# Of a row that has more real positions than are selected, and of one that has fewer; of one that has none.
REAL = {"full": EVERYONE, "packed": np.arange(T) < [[5], [2]], "a_row_of_none": np.arange(T) < [[0], [6]]}


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W_DD = _normal(D, D, seed=1)
Z_BTD = _normal(B, T, D, seed=2)
COTANGENT_BTD = _normal(B, T, D, seed=3)
WEIGHTS = {"mod.router": _normal(D, seed=4), "mod.bias": np.float32(0.3)}
PREDICTOR = {
    "mod.predictor.hidden": _normal(D, 3, seed=5),
    "mod.predictor.output": _normal(3, seed=6),
    "mod.predictor.bias": np.float32(0.1),
}


def _model(capacity=0.5, **mod):
    mod = MoDConfig(pattern="all", capacity=capacity, **mod)
    return ModelConfig(d_model=D, num_layers=1, num_heads=1, head_dim=4, d_ff=3, mod=mod)


PREDICTED, RANDOM = _model(predictor_width=3), _model(router="random")


def _weights(model):
    return WEIGHTS | (PREDICTOR if model.mod.predictor_width else {})


def _places(real_BT=EVERYONE):
    return Places(torch.tensor(np.where(real_BT, 0, -1)), torch.tensor(POSITIONS_BT))


def _router(model, weights, dtype=torch.float32):
    return MoD(model, lambda name: torch.nn.Parameter(torch.tensor(weights[name], dtype=dtype)))


def _tanh(z, places, taken):
    return torch.tanh(z @ torch.tensor(W_DD, dtype=z.dtype)), {}


def _apply(model, weights, z_BTD, top, inner=_tanh):
    """(output, own metrics)."""
    places = _places()
    selection, own = _router(model, weights)(torch.as_tensor(z_BTD), places, LAYER, top)
    return selection.run(inner, torch.as_tensor(z_BTD), places, lambda x: {})[0], own


def _gradients(model, weights, z_BTD, top, dtype, real_BT=EVERYONE):
    """Output, own metrics, and the gradients of a weighted sum of the output and the predictor loss."""
    router, z_BTD = _router(model, weights, dtype), torch.tensor(z_BTD, dtype=dtype, requires_grad=True)
    selection, own = router(z_BTD, _places(real_BT), LAYER, top)
    out_BTD, _ = selection.run(_tanh, z_BTD, _places(real_BT), lambda x: {})
    ((torch.tensor(COTANGENT_BTD) * out_BTD).sum() + own["predictor_loss"]).backward()
    gradients = {"z": z_BTD.grad, **{f"mod.{name}": p.grad for name, p in router.named_parameters()}}
    return out_BTD.detach(), {name: m.detach() for name, m in own.items()}, gradients


def _masked(model, weights, z_BTD, top, real_BT=EVERYONE):
    """(out [B, T, D], own metrics by row): every token computed, then the mask."""
    z_BTD = oracles.wide(z_BTD)
    weights = {name: oracles.wide(w) for name, w in weights.items()}
    real = [np.flatnonzero(real_T) for real_T in real_BT]
    rows = [oracles.depth(model, weights, *row[:2], LAYER, top, row[2]) for row in zip(z_BTD, POSITIONS_BT, real, strict=True)]
    chosen_BT = np.array([np.isin(range(T), chosen) for chosen, _, _ in rows])
    gate_BT = np.array([gate_T for _, gate_T, _ in rows])
    own = {name: np.array([metrics[name] for _, _, metrics in rows]) for name in rows[0][2]}
    return (gate_BT * chosen_BT)[:, :, None] * np.tanh(z_BTD @ W_DD.astype(np.float64)), own


# ------------------------------------------------------------------------------------------------- against the mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("top", [True, False], ids=["top", "causal"])
@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("model", [_model(), PREDICTED, RANDOM], ids=["router", "predictor", "random"])
def test_equals_computing_all_and_masking_forward_and_backward(model, real, top, dtype, tolerance):
    real_BT = REAL[real]
    out_BTD, own, gradients = _gradients(model, _weights(model), Z_BTD, top, dtype, real_BT)
    expected_BTD, expected = _masked(model, _weights(model), Z_BTD, top, real_BT)
    the_other = _masked(model, _weights(model), Z_BTD, not top, real_BT)[1]["taken_BT"]
    assert np.any(expected["taken_BT"] != the_other) or real != "full"  # the two differ
    assert not np.any(expected["taken_BT"] & ~real_BT)
    assert_close(out_BTD, expected_BTD, tolerance)
    assert set(own) == set(expected)
    assert_close(own["predictor_loss"], np.sum(expected["predictor_loss"]), tolerance)
    assert_close(own["logit_BT"], expected["logit_BT"], tolerance)
    assert own["taken_BT"].tolist() == expected["taken_BT"].tolist()

    def loss(arrays):
        out_BTD, own = _masked(model, arrays, arrays["z"], top, real_BT)
        return np.sum(COTANGENT_BTD * out_BTD) + np.sum(own["predictor_loss"])

    assert_gradients(loss, {"z": Z_BTD, **_weights(model)}, gradients, tolerance)


def test_the_predictor_loss_of_a_sure_decision_is_exact():
    """Of logits of 25 and more, where an approximation of the loss by its asymptote would be off by 1e-11."""
    weights = WEIGHTS | {"mod.bias": np.float32(25)}
    _, own, _ = _gradients(_model(), weights, 0.1 * Z_BTD, False, torch.float64)
    assert own["taken_BT"].all()
    assert (own["logit_BT"] > 20).all()
    assert_close(own["predictor_loss"], np.sum(np.log1p(np.exp(-own["logit_BT"].numpy()))), 1e-9)


@pytest.mark.parametrize(("capacity", "count"), [(0.01, 1), (0.5, 4), (0.6, 5), (1.0, T)])
def test_exactly_the_ceiling_of_capacity_times_length_are_selected(capacity, count):
    out_BTD, _ = _apply(_model(capacity), WEIGHTS, Z_BTD, True)
    assert (out_BTD != 0).any(dim=-1).sum(dim=1).tolist() == [count] * B
    assert_close(out_BTD.detach(), _masked(_model(capacity), WEIGHTS, Z_BTD, True)[0])


def test_ties_choose_the_earlier_position():
    index_BC = select_top(torch.tensor([[2.0, 1, 1, 3, 1], [0, 0, 0, 0, 0], [1, 2, 2, 2, 1]]), 3)
    assert index_BC.tolist() == [[0, 1, 3], [0, 1, 2], [1, 2, 3]]


def test_where_the_wish_is_minus_infinity_nothing_is_selected():
    none = -torch.inf
    index_BC = select_top(torch.tensor([[none, 1, none, 3, 1], [none, none, 0, none, none], [none] * 5]), 3)
    assert index_BC.tolist() == [[1, 3, 4], [2, -1, -1], [-1] * 3]


def test_ties_of_long_rows_choose_the_earlier_position():
    logits_BT = torch.randint(0, 3, (8, 700), generator=torch.Generator().manual_seed(0)).float()
    assert select_top(logits_BT, 300).tolist() == [oracles.highest(row, 300) for row in logits_BT.tolist()]


def test_tied_rows_still_select_exactly_the_count():
    weights = {"mod.router": np.zeros(D, np.float32), "mod.bias": np.float32(0.3)}
    out_BTD, own = _apply(_model(), weights, Z_BTD, True)
    assert (out_BTD != 0).any(dim=-1).tolist() == own["taken_BT"].tolist() == [[True] * 4 + [False] * 3] * B
    assert (own["logit_BT"] > 0).all()  # the router wants all: membership is what was selected


# ------------------------------------------------------------------------------------------------- who is computed


def _seen(model, weights, z_BTD, top):
    """What inner was given: (x, positions, segments, taken) of each call."""
    calls = []

    def inner(z, places, taken):
        calls.append((z.detach(), places.positions_BT, places.segments_BT, taken))
        return z, {}

    _apply(model, weights, z_BTD, top, inner)
    return calls


def test_inner_is_given_the_selected_alone_in_their_order_at_their_positions():
    ((z_BCD, positions_BC, _, taken),) = _seen(_model(), WEIGHTS, Z_BTD, True)
    chosen_BT = _masked(_model(), WEIGHTS, Z_BTD, True)[1]["taken_BT"]
    assert taken.all()
    for b in range(B):
        assert z_BCD[b].tolist() == Z_BTD[b, chosen_BT[b]].tolist()
        assert positions_BC[b].tolist() == POSITIONS_BT[b, chosen_BT[b]].tolist()


def test_in_causal_mode_inner_is_given_as_many_places_as_the_row_that_takes_most():
    ((z_BCD, positions_BC, segments_BC, taken_BC),) = _seen(_model(), WEIGHTS, Z_BTD, False)
    chosen_BT = _masked(_model(), WEIGHTS, Z_BTD, False)[1]["taken_BT"]
    counts_B = chosen_BT.sum(axis=1)
    assert counts_B[0] != counts_B[1]
    assert z_BCD.shape[1] == counts_B.max() < T
    for b in range(B):
        assert taken_BC[b].tolist() == [i < counts_B[b] for i in range(counts_B.max())]
        assert z_BCD[b, : counts_B[b]].tolist() == Z_BTD[b, chosen_BT[b]].tolist()
        assert positions_BC[b, : counts_B[b]].tolist() == POSITIONS_BT[b, chosen_BT[b]].tolist()
        assert not z_BCD[b, counts_B[b] :].any()
        assert (segments_BC[b] == 0).tolist() == taken_BC[b].tolist()


def test_where_no_token_takes_the_layer_it_is_not_called():
    weights = {"mod.router": np.zeros(D, np.float32), "mod.bias": np.float32(-1)}
    assert _seen(_model(), weights, Z_BTD, False) == []
    assert len(_seen(_model(), weights, Z_BTD, True)) == 1
    out_BTD, own, gradients = _gradients(_model(), weights, Z_BTD, False, torch.float32)
    assert not out_BTD.any()
    assert not own["taken_BT"].any()
    assert gradients.pop("z") is None  # nothing of z is in the output, and the predictor teaches nothing below it
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_causal_choice_takes_gates_above_one_half():
    weights = {"mod.router": np.array([1, 0, 0, 0, 0], np.float32), "mod.bias": np.float32(0)}
    z_BTD = np.ones((B, T, D), np.float32)
    z_BTD[0, :, 0] = [1e-3, 0, -1e-3, 1, -1, 0, 2]  # a gate of exactly one half does not
    z_BTD[1, :, 0] = -1
    out_BTD, _ = _apply(_model(), weights, z_BTD, False)
    assert (out_BTD != 0).any(dim=-1).tolist() == [[True, False, False, True, False, False, True], [False] * T]


def test_the_token_at_the_threshold_takes_the_layer():
    weights = {"mod.router": np.array([1, 0, 0, 0, 0], np.float32), "mod.bias": np.float32(0)}
    z_BTD = np.ones((B, T, D), np.float32)
    z_BTD[:, :, 0] = [0, 3, 2, 1, -1, -2, 4]  # of which four are taken: the lowest at position 3
    _, own = _apply(_model(), weights, z_BTD, True)
    assert own["taken_BT"].tolist() == [[False, True, True, True, False, False, True]] * B


# ----------------------------------------------------------------------------------------------------- in its layer

N = 14  # tokens of a row, of which 6 are selected
SMALL = {"d_model": D, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "d_ff": 9}
EXPERTS = MoEConfig(pattern="all", num_experts=3, top_k=2, capacity_factor=1.0)
X_BND = _normal(B, N, D, seed=7)
SEGMENTS_BN = np.array([[1] * 5 + [2] * 9, [1] * 12 + [2] * 2])
POSITIONS_BN = np.array([[0, 1, 3, 4, 9, 0, 1, 2, 3, 4, 5, 8, 9, 11], [*range(11), 13, 0, 2]])


def _layer_model(scope, kind, **mod):
    depth = MoDConfig(pattern="all", capacity=0.4, scope=scope, **mod)
    return ModelConfig(**SMALL, mod=depth, moe=EXPERTS if kind.startswith("moe") else MoEConfig())


def _layer_weights(model, kind):
    return oracles.random_weights(block_tensors(model, kind))


def _block(model, kind, weights, dtype=torch.float32):
    def param(name):
        tensor = torch.tensor(weights[name], dtype=dtype)
        return tensor if name == "moe.bias" else torch.nn.Parameter(tensor)

    return Block(model, kind, param)


def _run_block(block, x_BND, mode):
    return block(x_BND, Places(torch.tensor(SEGMENTS_BN), torch.tensor(POSITIONS_BN)), mode, LAYER)


def _layer_oracle(model, kind, weights, x_BND, mode):
    """(out [B, N, D], taken [B, N])."""
    weights = {name: oracles.wide(w) for name, w in weights.items()}
    rows = [
        oracles.block(model, kind, weights, x, s, p, LAYER, mode.training, mode.top)
        for x, s, p in zip(oracles.wide(x_BND), SEGMENTS_BN, POSITIONS_BN, strict=True)
    ]
    return np.stack([out for out, _ in rows]), np.stack([metrics["mod"]["taken_BT"] for _, metrics in rows])


@pytest.mark.parametrize("mode", [TRAINING, CAUSAL], ids=["training", "causal"])
@pytest.mark.parametrize(
    ("scope", "kind", "mod"),
    [
        ("ffn", "dense+mod", {}),
        ("block", "dense+mod", {}),
        ("block", "moe+mod", {"predictor_width": 3}),
        ("block", "dense+mod", {"router": "random"}),
    ],
    ids=["ffn", "block", "block_of_experts_predicted", "block_at_random"],
)
def test_a_layer_equals_the_slow_one_among_the_selected_and_leaves_the_others_bit_for_bit(scope, kind, mod, mode):
    model = _layer_model(scope, kind, **mod)
    weights = _layer_weights(model, kind)
    block, x_BND = _block(model, kind, weights, torch.float64), torch.tensor(X_BND).double().requires_grad_()
    cotangent_BND = _normal(B, N, D, seed=8)
    out_BND, _ = _run_block(block, x_BND, mode)
    (torch.tensor(cotangent_BND) * out_BND).sum().backward()
    expected_BND, taken_BN = _layer_oracle(model, kind, weights, X_BND, mode)
    assert_close(out_BND.detach(), expected_BND, 1e-12)
    assert 0 < taken_BN.sum() < B * N
    moved_BN = (out_BND != x_BND).any(dim=-1)
    assert moved_BN[torch.tensor(taken_BN)].all()
    assert scope == "ffn" or not moved_BN[~torch.tensor(taken_BN)].any()
    named = dict(block.named_parameters())
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in named.items()}
    fixed = {name: w for name, w in weights.items() if name not in named}

    def loss(arrays):
        return np.sum(cotangent_BND * _layer_oracle(model, kind, arrays | fixed, arrays["x"], mode)[0])

    assert_gradients(loss, {"x": X_BND, **{n: weights[n] for n in named}}, {"x": x_BND.grad, **gradients}, 1e-12)


@pytest.mark.parametrize("mode", [TRAINING, CAUSAL], ids=["training", "causal"])
@pytest.mark.parametrize("scope", ["ffn", "block"])
@pytest.mark.parametrize("kind", ["dense+mod", "moe+mod"])
def test_what_is_skipped_is_not_computed(kind, scope, mode):
    model = _layer_model(scope, kind)
    block, rows = _block(model, kind, _layer_weights(model, kind)), {}

    def count(name):
        def hook(module, args):
            rows.setdefault(name, []).append(args[0].shape[1])

        return hook

    for name in ("attention", "attention_norm", "feedforward_norm", "moe" if kind == "moe+mod" else "feedforward"):
        getattr(block, name).register_forward_pre_hook(count(name))
    _, metrics = _run_block(block, torch.tensor(X_BND), mode)
    selected = 6 if mode.top else int(metrics["mod"]["taken_BT"].sum(dim=1).max())
    assert 0 < selected < N
    inner = selected if scope == "block" else N
    work = rows.pop("moe" if kind == "moe+mod" else "feedforward")
    assert work == [selected]
    norms = [N, selected] if scope == "block" else [N]
    assert rows == {"attention": [inner], "attention_norm": norms, "feedforward_norm": [inner]}  # the router sees all


@pytest.mark.parametrize("kind", ["dense+mod", "moe+mod"])
@pytest.mark.parametrize("scope", ["ffn", "block"])
def test_a_layer_that_no_token_takes_is_not_run_and_has_finite_gradients(scope, kind):
    model = _layer_model(scope, kind)
    weights = _layer_weights(model, kind)
    weights |= {"mod.bias": np.float32(-9), "mod.router": 0 * weights["mod.router"]}
    block, x_BND = _block(model, kind, weights), torch.tensor(X_BND, requires_grad=True)
    inner = getattr(block, "moe" if kind == "moe+mod" else "feedforward")
    inner.register_forward_pre_hook(lambda *_: pytest.fail("was run"))
    out_BND, metrics = _run_block(block, x_BND, CAUSAL)
    assert torch.equal(out_BND, x_BND) == (scope == "block")
    (out_BND.sum() + metrics["mod"]["predictor_loss"]).backward()
    assert x_BND.grad.isfinite().all()
    assert "moe" not in metrics or not metrics["moe"]["load_BA"].any()


@pytest.mark.parametrize("mode", [TRAINING, CAUSAL], ids=["training", "causal"])
def test_residual_is_not_counted_twice(mode):
    # With the outputs of attention and feed-forward at zero the layer adds nothing at all.
    model = _layer_model("block", "dense+mod")
    silent = ("attention.output", "feedforward.down")
    weights = {name: 0 * w if name in silent else w for name, w in _layer_weights(model, "dense+mod").items()}
    assert torch.equal(_run_block(_block(model, "dense+mod", weights), torch.tensor(X_BND), mode)[0], torch.tensor(X_BND))


def test_what_experts_tell_stands_in_the_places_of_the_row():
    model = _layer_model("block", "moe+mod")
    block = _block(model, "moe+mod", _layer_weights(model, "moe+mod"))
    for mode in (Mode(training=True, top=True, tell=True), Mode(tell=True)):
        _, metrics = _run_block(block, torch.tensor(X_BND), mode)
        taken_BN, experts_BNk = metrics["mod"]["taken_BT"], metrics["moe"]["experts_BTk"]
        assert (experts_BNk[~taken_BN] == -1).all()
        assert (metrics["moe"]["margin_BT"][~taken_BN] == 0).all()
        load_BA = [
            torch.bincount(experts[taken].flatten(), minlength=3) for experts, taken in zip(experts_BNk, taken_BN, strict=True)
        ]
        assert torch.stack(load_BA).tolist() == metrics["moe"]["load_BA"].tolist()


# ------------------------------------------------------------------------------------------------ the causal decision


def test_router_of_bfloat16_runs_in_float32():
    z_BTD = torch.tensor(Z_BTD).bfloat16()
    _, own = _apply(_model(), WEIGHTS, z_BTD, True, lambda z, places, taken: (z, {}))
    _, expected = _masked(_model(), WEIGHTS, z_BTD.double().numpy(), True)
    assert own["predictor_loss"].dtype == torch.float32
    assert_close(own["predictor_loss"].detach(), np.sum(expected["predictor_loss"]))


@pytest.mark.parametrize("model", [_model(), PREDICTED], ids=["router", "predictor"])
def test_predictor_loss_teaches_what_decides_and_nothing_below_it(model):
    router, z_BTD = _router(model, _weights(model)), torch.tensor(Z_BTD, requires_grad=True)
    router(z_BTD, _places(), LAYER, True)[1]["predictor_loss"].backward()
    assert z_BTD.grad is None
    gradients = {f"mod.{name}": p.grad for name, p in router.named_parameters() if p.grad is not None}
    assert set(gradients) == (set(PREDICTOR) if model is PREDICTED else set(WEIGHTS))
    assert all(gradient.any() for gradient in gradients.values())


def test_nothing_is_learned_where_the_choice_is_random_but_the_gate():
    _, own, gradients = _gradients(RANDOM, WEIGHTS, Z_BTD, True, torch.float32)
    assert own["predictor_loss"] == 0
    assert all((gradient != 0).all() for name, gradient in gradients.items() if name != "z")  # the gate's, by the output


def test_random_choice_is_that_of_layer_and_position_alone():
    positions_BT = torch.tensor([[0, 1, 500, 2**31 - 1], [500, 1, 7, 131_071]])
    for layer in (0, 3, 200):
        expected = [[oracles.draw(layer, p) for p in row] for row in positions_BT.tolist()]
        assert uniform(positions_BT, layer).tolist() == expected
    assert not (uniform(positions_BT, 0) == uniform(positions_BT, 1)).any()
