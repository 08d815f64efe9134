"""The forms of attention, against a full softmax in loops, forward and backward; and which form is taken when.

B rows, T positions, S key positions, H query heads, K key/value heads, h head width, N tokens.
"""

import functools
import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch

import lumina_torch.attend
from lumina.errors import ConfigError
from lumina_torch.attend import (
    FORMS,
    NO_DOCUMENT,
    Form,
    Places,
    attend,
    attend_cached,
    choose_attention,
    flash_attention,
)
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, H, K, h = 2, 13, 4, 2, 6


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _qkv(heads=H, kv_heads=K, length=T):
    return tuple(2 * _normal(B, length, n, h, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))


def _places(segments_BT):
    segments_BT = torch.as_tensor(segments_BT)
    return Places(segments_BT, torch.zeros_like(segments_BT))


def _attend_and_gradients(arrays, segments_BT, cotangent, form, dtype):
    q, k, v = (torch.tensor(a, dtype=dtype, requires_grad=True) for a in arrays)
    out = attend(q, k, v, _places(segments_BT), form)
    (out * torch.tensor(cotangent, dtype=dtype)).sum().backward()
    assert out.dtype == q.grad.dtype == dtype
    return out.detach(), dict(zip("qkv", (q.grad, k.grad, v.grad), strict=True))


def _check(segments_BT, form, dtype=torch.float32, heads=H, kv_heads=K):
    """Output and gradients are those of the loops; what is in no document means nothing, and has no cotangent."""
    arrays = _qkv(heads, kv_heads, len(segments_BT[0]))
    counts_BT = np.array(segments_BT) != NO_DOCUMENT
    cotangent = _normal(*arrays[0].shape, seed=4) * counts_BT[:, :, None, None]
    narrow = [a.astype(np.float32).astype(np.float64) for a in arrays] if dtype == torch.float32 else arrays
    out, gradients = _attend_and_gradients(arrays, segments_BT, cotangent, form, dtype)

    def oracle(a):
        rows = zip(*(a[n] for n in "qkv"), segments_BT, strict=True)
        return np.stack([oracles.attend(*row) for row in rows]) * counts_BT[:, :, None, None]

    named, tolerance = dict(zip("qkv", narrow, strict=True)), {torch.float32: 5e-6, torch.float64: 1e-12}[dtype]
    assert_close(out * torch.tensor(counts_BT)[:, :, None, None], oracle(named), tolerance)
    assert_gradients(lambda a: np.sum(cotangent * oracle(a)), named, gradients, tolerance)


# ------------------------------------------------------------------------------------------------- flash, stood in for


def _flash(q_NHh, k_NKh, v_NKh, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, deterministic):
    """flash-attn's variable-length function as it is documented, document by document and query by query."""
    assert causal
    assert deterministic
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(q_NHh))
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(bounds))
    group, out = q_NHh.shape[1] // k_NKh.shape[1], []
    for a, b in pairwise(bounds):
        assert a < b  # no empty document
        for n in range(a, b):
            keys, values = (x[a : n + 1].repeat_interleave(group, 1) for x in (k_NKh, v_NKh))
            weights = (torch.einsum("hd,shd->hs", q_NHh[n], keys) / q_NHh.shape[2] ** 0.5).softmax(dim=-1)
            out.append(torch.einsum("hs,shd->hd", weights, values))
    return torch.stack(out)


@pytest.fixture(autouse=True)
def forgetful():
    """What is installed is looked up anew in each test."""
    flash_attention.cache_clear()
    yield
    flash_attention.cache_clear()


@pytest.fixture
def flash(monkeypatch):
    """flash-attn 2 stands in, on this processor and in any dtype; call it with the function to be found."""

    def install(function=_flash, module="flash_attn"):
        for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, None)
        stand_in = ModuleType(module)
        stand_in.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, module, stand_in)
        monkeypatch.setitem(FORMS, "flash", Form("flash"))
        flash_attention.cache_clear()

    install()
    return install


# ------------------------------------------------------------------------------------------------------- each form

SEGMENTS = {
    "one_document": [[0] * T] * B,
    "packed": [[0] * 4 + [1] * 9, [3] * 7 + [4] * 5 + [9]],
    "documents_that_do_not_lie_together": [[0, 1] * 6 + [0], [2, 2, 0, 1, 1, 2, 0, 0, 1, 1, 1, 2, 2]],
    "filling_at_the_end": [[0] * 4 + [1] * 3 + [NO_DOCUMENT] * 6, [0] * T],
    "filling_after_documents_apart": [[1, 0, 1, 0] + [NO_DOCUMENT] * 9, [5, 4] * 4 + [4] * 2 + [NO_DOCUMENT] * 3],
}


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("form", ["sdpa", "reference", "flash"])
def test_a_form_equals_a_full_softmax_forward_and_backward(form, segments, flash):
    _check(SEGMENTS[segments], form)


@pytest.mark.parametrize("form", ["sdpa", "reference", "flash"])
def test_a_form_in_float64_equals_a_full_softmax_to_its_last_digits(form, flash):
    _check(SEGMENTS["packed"], form, torch.float64)


@pytest.mark.parametrize("form", ["sdpa", "reference"])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 1), (6, 2)], ids=["a_key_head_each", "one_key_head", "three_to_a_key_head"]
)
def test_query_heads_share_key_heads_in_order(form, heads, kv_heads):
    _check(SEGMENTS["packed"], form, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("form", ["sdpa", "reference", "flash"])
def test_a_packed_row_of_one_token_documents_returns_its_own_values(form, flash):
    arrays, cotangent = _qkv(), _normal(B, T, H, h, seed=4)
    out, gradients = _attend_and_gradients(arrays, [list(range(T))] * B, cotangent, form, torch.float32)
    assert_close(out, np.repeat(arrays[2], H // K, axis=2), 1e-6)
    assert_close(gradients["v"], cotangent.reshape(B, T, K, H // K, h).sum(axis=3), 1e-6)
    assert max(gradients[name].abs().max() for name in "qk") < 1e-4  # a softmax over one key is flat


@pytest.mark.parametrize("module", ["flash_attn.cute", "flash_attn_interface", "flash_attn"])
def test_a_version_that_gives_the_sums_as_well_is_understood(module, flash):
    flash(functools.wraps(_flash)(lambda *args, **kwargs: (_flash(*args, **kwargs), "logarithms of sums")), module)
    _check(SEGMENTS["packed"], "flash")


def test_rows_of_the_variable_length_form_do_not_run_together(flash):
    """The last document of a row and the first of the next may have the same number."""
    packed = _places([[0, 0, 1, 1], [1, 1, 1, 2]]).packed
    assert packed.order_N is None
    assert packed.bounds.tolist() == [0, 2, 4, 7, 8]
    assert packed.longest == 3


@pytest.mark.parametrize("form", ["sdpa", "reference", "flash"])
def test_no_key_of_the_future_or_of_another_document_reaches_a_query(form, flash):
    arrays, segments_BT = _qkv(), np.array([[0] * 6 + [1] * 7] * B)
    before, _ = _attend_and_gradients(arrays, segments_BT, 0 * arrays[0], form, torch.float64)
    for changed in (3, 9):
        for a in arrays[1:]:
            a[:, changed] += 9
        after, _ = _attend_and_gradients(arrays, segments_BT, 0 * arrays[0], form, torch.float64)
        moved_T = (after != before).flatten(2).any(dim=2).any(dim=0)
        assert moved_T.tolist() == [changed <= t < (6 if changed < 6 else T) for t in range(T)]
        before = after


def test_softmax_runs_in_float32_for_bfloat16_inputs():
    arrays, segments_BT = [torch.tensor(a, dtype=torch.bfloat16) for a in _qkv()], SEGMENTS["packed"]
    expected = attend(*(a.double() for a in arrays), _places(segments_BT), "reference")
    for form in ("sdpa", "reference"):
        out = attend(*arrays, _places(segments_BT), form)
        assert out.dtype == torch.bfloat16
        assert_close(out.double(), expected, 2**-7)


# ------------------------------------------------------------------------------------------------------------- cached


def test_cached_queries_see_the_places_up_to_their_last():
    q, k, v = _normal(2, 3, H, h), _normal(2, 9, K, h, seed=1), _normal(2, 9, K, h, seed=2)
    last_BT = np.array([[0, 4, 8], [2, 2, 7]])
    out = attend_cached(*(torch.tensor(a) for a in (q, k, v, last_BT)))
    for row in range(2):
        for t, last in enumerate(last_BT[row]):
            queries, seen = np.zeros((last + 1, H, h)), slice(0, last + 1)
            queries[-1] = q[row, t]  # the oracle's last query of a row sees all of it
            assert_close(out[row, t], oracles.attend(queries, k[row, seen], v[row, seen], np.zeros(last + 1))[-1], 1e-12)


def test_a_cached_query_that_sees_nothing_yet_is_finite():
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 5, 1, 4)
    assert attend_cached(q, k, k, torch.tensor([[-1]])).isfinite().all()


# -------------------------------------------------------------------------------------------------- where tokens stand


def test_places_of_some_tokens_are_those_that_they_have_in_the_row():
    places = Places(torch.tensor([[0, 0, 1, 1, 1], [3, 3, 3, 4, 4]]), torch.tensor([[0, 1, 0, 1, 7], [0, 1, 2, 0, 1]]))
    some = places.at(torch.tensor([[1, 4, -1], [0, 2, 3]]))
    assert some.segments_BT.tolist() == [[0, 1, NO_DOCUMENT], [3, 3, 4]]
    assert some.positions_BT[:, :2].tolist() == [[1, 7], [0, 2]]
    assert some.positions_BT[1, 2] == 0


@pytest.mark.parametrize(
    ("segments_BT", "alone"),
    [([[0, 0], [0, 0]], True), ([[3, 3], [5, 5]], True), ([[0, 0], [0, 1]], False), ([[0, NO_DOCUMENT]], False), ([[4]], True)],
)
def test_a_row_is_one_document_where_all_its_tokens_are_in_the_same(segments_BT, alone):
    assert _places(segments_BT).alone == alone


def test_rotations_are_computed_once_for_all_layers_and_anew_for_another_base():
    places = _places([[0] * T])
    once = places.rotation(100.0, 3, torch.float32)
    assert places.rotation(100.0, 3, torch.float32)[0] is once[0]
    assert places.rotation(100.0, 3, torch.float64)[0].dtype == torch.float64
    assert places.rotation(50.0, 3, torch.float32)[0] is not once[0]


# ------------------------------------------------------------------------------------------------------------- choice


def _install(monkeypatch, present):
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if name in present else None)
        if name in present:
            sys.modules[name].flash_attn_varlen_func = functools.partial(_flash, name)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ((), ""),
        (("flash_attn",), "flash-attn 2"),
        (("flash_attn", "flash_attn_interface"), "flash-attn 3"),
        (("flash_attn", "flash_attn.cute"), "flash-attn 4"),
    ],
    ids=["none", "2", "2_and_3", "2_and_4"],
)
def test_the_newest_flash_attention_is_found(present, expected, monkeypatch):
    _install(monkeypatch, present)
    name, function = flash_attention(64)
    assert name == expected
    assert (function is None) == (not present)


@pytest.mark.parametrize(
    ("capability", "head_dim", "expected"),
    [
        ((7, 5), 64, ""),
        ((8, 0), 64, "flash-attn 2"),
        ((9, 0), 64, "flash-attn 4"),
        ((9, 0), 192, "flash-attn 3"),
        ((10, 0), 64, "flash-attn 4"),
        ((10, 0), 192, "flash-attn 2"),
    ],
)
def test_of_all_versions_the_newest_for_this_gpu_and_these_heads_is_taken(capability, head_dim, expected, monkeypatch):
    _install(monkeypatch, ("flash_attn", "flash_attn_interface", "flash_attn.cute"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert flash_attention(head_dim)[0] == expected


def test_a_version_that_cannot_be_told_to_be_deterministic_is_not_taken(monkeypatch):
    _install(monkeypatch, ("flash_attn",))
    sys.modules["flash_attn"].flash_attn_varlen_func = lambda q, cu_seqlens_q, cu_seqlens_k, causal: q
    assert flash_attention(64) == ("", None)


def test_what_is_not_installed_is_looked_for_once(monkeypatch):
    looked_for = []

    def missing(name):
        looked_for.append(name)
        raise ImportError

    monkeypatch.setattr(lumina_torch.attend.importlib, "import_module", missing)
    for _ in range(3):
        assert choose_attention("auto", "cuda", "bfloat16", 64)[0] == "sdpa"
    assert looked_for == ["flash_attn.cute", "flash_attn_interface", "flash_attn"]


def test_a_flash_attention_without_the_function_is_none(monkeypatch):
    _install(monkeypatch, ("flash_attn",))
    del sys.modules["flash_attn"].flash_attn_varlen_func
    assert flash_attention(64) == ("", None)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "installed", "expected"),
    [
        ("cpu", torch.float32, 64, True, "sdpa"),
        ("mps", torch.bfloat16, 64, True, "sdpa"),
        ("cuda", torch.bfloat16, 64, True, "flash"),
        ("cuda", torch.float16, 256, True, "flash"),
        ("cuda", torch.bfloat16, 64, False, "sdpa"),
        ("cuda", torch.float32, 64, True, "sdpa"),
        ("cuda", torch.bfloat16, 20, True, "sdpa"),
        ("cuda", torch.bfloat16, 264, True, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_honours_the_request(platform, dtype, head_dim, installed, expected, monkeypatch):
    _install(monkeypatch, ("flash_attn",) if installed else ())
    name, why = choose_attention("auto", platform, dtype, head_dim)
    assert name == expected
    assert why.startswith("auto: ")


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "installed", "says"),
    [
        ("cpu", torch.bfloat16, 64, True, "flash runs on cuda, not on cpu"),
        ("cuda", torch.float32, 64, True, "flash takes bfloat16 or float16, not float32"),
        ("cuda", torch.bfloat16, 20, True, "a multiple of 8, at most 256, not 20"),
        ("cuda", torch.bfloat16, 264, True, "a multiple of 8, at most 256, not 264"),
        ("cuda", torch.bfloat16, 64, False, "needs the package flash-attn, which is not installed here"),
    ],
)
def test_a_form_that_cannot_honour_the_request_is_refused(platform, dtype, head_dim, installed, says, monkeypatch):
    _install(monkeypatch, ("flash_attn",) if installed else ())
    with pytest.raises(ConfigError) as error:
        choose_attention("flash", platform, dtype, head_dim)
    assert says in str(error.value)
    assert str(error.value).endswith("; sdpa, reference would work")


@pytest.mark.parametrize("form", ["chunked", "splash", "fast"])
def test_a_form_of_jax_or_of_nobody_is_refused(form):
    with pytest.raises(ConfigError, match=f"attention_form = '{form}': PyTorch has auto, sdpa, reference, flash"):
        choose_attention(form, "cpu", "float32", 8)


def test_attend_itself_refuses_a_form_that_cannot_run_here():
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ConfigError, match="flash runs on cuda, not on cpu"):
        attend(q, q, q, _places([[0] * 3]), "flash")


def test_the_variable_length_form_without_its_package_says_what_would_work(monkeypatch):
    _install(monkeypatch, ())
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ConfigError, match="needs the package flash-attn; use sdpa"):
        lumina_torch.attend.attend_packed(q, q, q, _places([[0] * 3]).packed)
