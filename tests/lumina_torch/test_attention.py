"""Attention, rotary positions, RMSNorm and the cache, against a full softmax in loops."""

import numpy as np
import pytest
import torch

from lumina.architecture import block_tensors
from lumina.config import ModelConfig
from lumina_torch.attend import Places
from lumina_torch.attention import Attention, Cache, RMSNorm, rotary
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

H, K, h, T = 4, 2, 6, 7
MODEL = ModelConfig(d_model=8, num_layers=2, num_heads=H, num_kv_heads=K, head_dim=h, rope_theta=100.0, qk_norm=True)
# Two documents a row. The positions have gaps, so that counting anew what is there would not give them.
SEGMENTS_BT = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]])
POSITIONS_BT = np.array([[0, 1, 5, 0, 2, 3, 9], [0, 1, 2, 3, 8, 0, 6]])
WEIGHTS = {n: w for n, w in oracles.random_weights(block_tensors(MODEL, "dense")).items() if n.startswith("attention.")}


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _layer(dtype):
    params = {name: torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for name, w in WEIGHTS.items()}
    return Attention(MODEL, params.__getitem__), params


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
def test_layer_equals_the_oracle_with_grouped_queries_normed_heads_and_given_positions(dtype, tolerance):
    arrays = {"x": _normal(2, T, 8).astype(np.float32), **WEIGHTS}
    (layer, params), cotangent_BTD = _layer(dtype), _normal(2, T, 8, seed=1)
    x_BTD = torch.tensor(arrays["x"], dtype=dtype, requires_grad=True)
    out_BTD = layer(x_BTD, Places(torch.tensor(SEGMENTS_BT), torch.tensor(POSITIONS_BT)))
    (out_BTD * torch.tensor(cotangent_BTD)).sum().backward()

    def oracle(arrays):
        rows = zip(arrays["x"], SEGMENTS_BT, POSITIONS_BT, strict=True)
        return np.stack([oracles.attention(MODEL, arrays, x, s, p) for x, s, p in rows])

    assert_close(out_BTD.detach(), oracle({n: a.astype(np.float64) for n, a in arrays.items()}), tolerance)
    gradients = {"x": x_BTD.grad, **{name: p.grad for name, p in params.items()}}
    assert_gradients(lambda a: np.sum(cotangent_BTD * oracle(a)), arrays, gradients, tolerance)


# Pieces of a row as it comes: (from, to, whether each row's tokens are written). What is not is filling.
PIECES = [(0, 4, [[1, 1, 1, 1], [1, 1, 0, 0]]), (2, 6, [[0, 0, 1, 1], [1, 1, 1, 1]]), (6, 7, [[1], [1]])]


def test_cached_attention_equals_uncached_whatever_is_written_when():
    layer, _ = _layer(torch.float64)
    x_BTD, positions_BT = torch.tensor(_normal(2, T, 8)), torch.arange(T).expand(2, T) ** 2
    cache, found_BTD, lengths = Cache(2, K, h, torch.float64, "cpu"), torch.zeros(2, T, 8).double(), []
    with torch.no_grad():
        whole_BTD = layer(x_BTD, Places(torch.zeros_like(positions_BT), positions_BT))
        for start, end, written in PIECES:
            written_BT, positions = torch.tensor(written).bool(), positions_BT[:, start:end]
            out_BTD = layer(x_BTD[:, start:end], Places(torch.zeros_like(positions), positions), cache, written_BT)
            found_BTD[:, start:end][written_BT] = out_BTD[written_BT]
            lengths.append(cache.length_B.tolist())
    assert lengths == [[4, 2], [6, 6], [7, 7]]
    assert_close(found_BTD, whole_BTD, 1e-12)


def test_a_cache_holds_what_is_written_in_order_and_nothing_else():
    cache = Cache(2, 1, 1, torch.float32, "cpu")
    new = torch.arange(1.0, 7).reshape(2, 3, 1, 1)
    assert cache.append(new, -new, torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()).tolist() == [[0, 0, 1], [-1, 0, 0]]
    assert cache.append(new, -new, torch.tensor([[0, 0, 0], [0, 0, 1]]).bool()).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert cache.length_B.tolist() == [2, 2]
    assert cache.keys_BSKh[:, :, 0, 0].tolist() == [[1, 3] + [0] * 14, [5, 6] + [0] * 14]
    assert torch.equal(cache.values_BSKh, -cache.keys_BSKh)


def test_a_cache_grows_to_hold_what_it_is_given_and_keeps_what_it_has():
    cache, new = Cache(2, 1, 1, torch.float32, "cpu"), torch.arange(1.0, 81).reshape(2, 40, 1, 1)
    for piece in (slice(0, 15), slice(15, 17), slice(17, 40)):  # to 15, over 16, and over 32 places
        cache.append(new[:, piece], new[:, piece], torch.ones(2, len(new[0, piece])).bool())
    assert torch.equal(cache.keys_BSKh[:, :40], new)
    assert torch.equal(cache.values_BSKh[:, :40], new)
    assert cache.keys_BSKh.shape[1] == 64


def test_rotation_depends_on_the_difference_of_positions_alone():
    q, k = (torch.tensor(_normal(1, 3, 1, h, seed=seed)) for seed in (0, 1))

    def scores(shift):
        places = Places(torch.zeros(1, 3).long(), torch.tensor([[0, 3, 11]]) + shift)
        return torch.einsum("btnh,bsnh->bts", rotary(q, places, 100.0), rotary(k, places, 100.0))

    assert_close(scores(1000), scores(0), 1e-12)
    assert (scores(0) - torch.einsum("btnh,bsnh->bts", q, k)).abs().max() > 0.1


def test_rotation_turns_halves_of_a_head_as_the_oracle_does():
    x, positions_T = _normal(3, h), [0, 3, 700]
    places = Places(torch.zeros(1, 3).long(), torch.tensor([positions_T]))
    assert_close(rotary(torch.tensor(x)[None, :, None], places, 100.0)[0, :, 0], oracles.rotate(x, positions_T, 100.0), 1e-12)


def test_rms_norm_has_its_epsilon_within_the_root_and_runs_in_float32():
    x, scale = 1e-3 * _normal(5, 16), _normal(16, seed=1)
    norm = RMSNorm(torch.tensor(scale), 1e-6)
    assert_close(norm(torch.tensor(x)), oracles.rms_norm(x, scale, 1e-6), 1e-12)
    half = torch.tensor(x, dtype=torch.float16)  # whose squares are too small for it
    assert norm(half).dtype == torch.float16
    assert_close(norm(half).double(), oracles.rms_norm(half.double().numpy(), scale, 1e-6), 1e-3)
