"""The same 200 steps in float64, where what rounding does is too small to see."""

import jax
import pytest

import lumina_jax.model
from parity_tests.lanes import record
from parity_tests.pairs import CASES
from parity_tests.test_trajectory import trained


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    """JAX's layers are compiled once, not once each."""
    monkeypatch.setattr(lumina_jax.model, "UNROLLED", 0)


@pytest.mark.parametrize("case", ["hybrid", "hybrid of blocks, dropless"])
def test_200_steps_in_float64_lead_to_the_same_parameters_to_their_last_digits(case):
    with jax.enable_x64(True):
        away, router = trained(CASES[case], replay=True, double=True)
    record("trajectory, float64", case, away)
    record("flips, float64", case, router.widest_flip)
