"""Grouped feed-forward, against a loop over choices in float64.

N tokens, k choices a token, E experts, D model width, F feed-forward width.
"""

import math

import numpy as np
import pytest
import torch

import lumina_torch.grouped
from lumina.config import ModelConfig
from lumina.errors import ConfigError
from lumina_torch.grouped import choose_grouped, grouped_feedforward, sort_choices
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients, wide

N, k, E, D, F = 23, 2, 4, 16, 8
FORMS = ("loop", "grouped_mm")


def _arrays(N=N, E=E):
    rng = np.random.default_rng(0)
    shapes = {"x": (N, D), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: (rng.standard_normal(s) / math.sqrt(s[-2])).astype(np.float32) for name, s in shapes.items()}


def _random(low, high):
    return np.random.default_rng(5).integers(low, high, (N, k))


LOADS = {
    "balanced": np.arange(N * k).reshape(N, k) % E,
    "random": _random(0, E),
    "some_take_none": _random(-3, E + 3),
    "none_takes_any": np.where(_random(0, 2) > 0, -1, E),
    "all_to_the_first": np.zeros((N, k), int),
    "all_to_the_last": np.full((N, k), E - 1),
    "two_empty_experts": 2 * _random(0, 2),
    "one_choice_in_all": np.where(np.arange(N * k).reshape(N, k) == 17, 1, E),
    "one_token": np.array([[3, 1]]),
    "one_token_that_takes_none": np.array([[-1]]),
}


def _oracle(arrays, experts_Nk, activation="swiglu"):
    """Choice by choice."""
    arrays, model = {name: wide(a) for name, a in arrays.items()}, ModelConfig(activation=activation)
    out_NkD = np.zeros((*experts_Nk.shape, D), np.result_type(*arrays.values()))
    for n, choices in enumerate(experts_Nk):
        for j, e in enumerate(choices):
            if 0 <= e < len(arrays["gate"]):
                weights = (arrays[name][e] for name in ("gate", "up", "down"))
                out_NkD[n, j] = oracles.feedforward(model, *weights, arrays["x"][n])
    return out_NkD


def _run(arrays, experts_Nk, form, dtype, activation="swiglu"):
    """(out, gradients of a weighted sum of it by name, weights in float32 where they are in training)."""
    keep = torch.promote_types(dtype, torch.float32)
    leaves = {n: torch.tensor(a, dtype=dtype if n == "x" else keep).requires_grad_() for n, a in arrays.items()}
    x_ND, *weights = leaves.values()
    out_NkD = grouped_feedforward(x_ND, torch.tensor(experts_Nk), tuple(weights), activation, form)
    (out_NkD * torch.tensor(_cotangent(experts_Nk), dtype=dtype)).sum().backward()
    # Where no choice takes an expert the loop has used no weight.
    return out_NkD.detach(), {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}


def _cotangent(experts_Nk):
    return np.random.default_rng(9).standard_normal((*experts_Nk.shape, D))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_a_loop_over_choices_forward_and_backward(form, load):
    arrays, experts_Nk = _arrays(len(LOADS[load])), LOADS[load]
    out_NkD, gradients = _run(arrays, experts_Nk, form, torch.float32)
    assert_close(out_NkD, _oracle(arrays, experts_Nk))
    cotangent = _cotangent(experts_Nk)
    assert_gradients(lambda a: np.sum(cotangent * _oracle(a, experts_Nk)), arrays, gradients)


@pytest.mark.parametrize("form", FORMS)
def test_geglu_equals_a_loop_over_choices(form):
    arrays, experts_Nk = _arrays(), LOADS["some_take_none"]
    assert_close(_run(arrays, experts_Nk, form, torch.float32, "geglu")[0], _oracle(arrays, experts_Nk, "geglu"))


def test_float64_stays_float64():
    arrays, experts_Nk = _arrays(), LOADS["some_take_none"]
    out_NkD, gradients = _run(arrays, experts_Nk, "auto", torch.float64)
    assert {a.dtype for a in (out_NkD, *gradients.values())} == {torch.float64}
    assert_close(out_NkD, _oracle(arrays, experts_Nk), 1e-12)


@pytest.mark.parametrize("load", ["random", "some_take_none", "none_takes_any", "two_empty_experts"])
def test_both_forms_agree_in_bfloat16_and_give_weights_gradients_of_their_own_dtype(load):
    arrays, experts_Nk = _arrays(), LOADS[load]
    (out, gradients), (other, others) = (_run(arrays, experts_Nk, form, torch.bfloat16) for form in FORMS)
    assert out.dtype == other.dtype == torch.bfloat16
    assert_close(other.double(), out.double(), 2**-6)
    assert_close(out.double(), _oracle(arrays, experts_Nk), 2**-5)
    for name, gradient in gradients.items():
        assert gradient.dtype == others[name].dtype == (torch.bfloat16 if name == "x" else torch.float32)
        assert_close(others[name].double(), gradient.double(), 2**-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_beyond_the_last_expert_reach_neither_output_nor_gradient(form, monkeypatch):
    """What a kernel leaves in rows that belong to no expert may be anything."""
    run = lumina_torch.grouped.FORMS[form].run

    def spoilt(rows_SD, counts_E, *rest):
        out_SD, none_S1 = run(rows_SD, counts_E, *rest), torch.arange(len(rows_SD))[:, None] >= counts_E.sum()
        return torch.where(none_S1, torch.nan, out_SD)

    monkeypatch.setitem(lumina_torch.grouped.FORMS, form, lumina_torch.grouped.FORMS[form]._replace(run=spoilt))
    arrays, experts_Nk = _arrays(), LOADS["some_take_none"]
    out_NkD, gradients = _run(arrays, experts_Nk, form, torch.float32)
    assert_close(out_NkD, _oracle(arrays, experts_Nk))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_no_token_chose_has_a_gradient_of_zero(form):
    _, gradients = _run(_arrays(), LOADS["two_empty_experts"], form, torch.float32)
    for name in ("gate", "up", "down"):
        assert (gradients[name][[1, 3]] == 0).all()
        assert (gradients[name][[0, 2]] != 0).any()


def test_the_loop_multiplies_the_rows_of_the_choices_alone(monkeypatch):
    rows = []
    monkeypatch.setitem(lumina_torch.grouped.ACTIVATIONS, "swiglu", lambda x: rows.append(len(x)) or torch.tanh(x))
    _run(_arrays(), LOADS["one_choice_in_all"], "loop", torch.float32)
    assert rows == [1]


def test_choices_are_sorted_by_expert_each_in_the_order_of_its_tokens():
    order = sort_choices(torch.tensor([[2, 0], [7, 2], [0, -1], [2, 0]]), 4)
    assert order.counts_E.tolist() == [3, 0, 3, 0]
    assert order.choice_S.tolist() == [1, 4, 7, 0, 3, 6, 2, 5]
    assert order.place_S.tolist() == [3, 0, -1, 4, 1, -1, 5, 2]


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cuda", torch.bfloat16, "grouped_mm"),
        ("cuda", torch.float32, "loop"),
        ("cuda", torch.float16, "loop"),
        ("cpu", torch.bfloat16, "loop"),
        ("mps", torch.float32, "loop"),
    ],
)
def test_auto_takes_the_best_form_that_runs(platform, dtype, expected):
    name, why = choose_grouped("auto", platform, dtype)
    assert name == expected
    assert why
    assert choose_grouped("loop", platform, dtype)[0] == "loop"


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_a_form_that_cannot_run_is_refused(platform, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"'grouped_mm': runs on cuda in bfloat16, not on {platform} in {name}; use auto"):
        choose_grouped("grouped_mm", platform, dtype)


@pytest.mark.parametrize("widths", [(12, 8), (16, 20)])
def test_widths_whose_rows_do_not_begin_at_16_bytes_are_left_to_the_loop(widths):
    assert choose_grouped("auto", "cuda", "bfloat16", widths)[0] == "loop"
    odd = next(width for width in widths if width % 8)
    with pytest.raises(ConfigError, match=rf"'grouped_mm': takes widths that are multiples of 8, not {odd}; use auto"):
        choose_grouped("grouped_mm", "cuda", "bfloat16", widths)


@pytest.mark.parametrize("form", ["blocks", "ragged", "fast"])
def test_a_form_of_jax_or_of_nobody_is_refused(form):
    with pytest.raises(ConfigError, match=f"grouped_form = '{form}': PyTorch has auto, grouped_mm, loop"):
        choose_grouped(form, "cpu", torch.float32)
