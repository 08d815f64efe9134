"""Random numbers of dropout and jitter: what they depend on, and what not."""

from dataclasses import replace

import pytest
import torch

from lumina_torch.draw import Draw

LIKE = torch.zeros(3, 5, 4)
DRAW = Draw(seed=1, step=7, rows_B=(0, 1, 2), layer=3)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 8}, {"layer": 4}, {"rows_B": (3, 4, 5)}, {"use": "attention"}])
def test_another_seed_step_layer_row_or_use_draws_other_numbers(change):
    use = change.get("use", "jitter")
    other = replace(DRAW, **{name: value for name, value in change.items() if name != "use"})
    assert not (DRAW.uniform("jitter", LIKE) == other.uniform(use, LIKE)).any()


def test_a_row_draws_by_its_number_wherever_it_stands():
    together = DRAW.uniform("jitter", LIKE)
    assert not torch.equal(together[0], together[1])
    reordered = replace(DRAW, rows_B=(2, 0)).uniform("jitter", LIKE[:2])
    assert torch.equal(reordered, together[[2, 0]])


def test_drawing_neither_uses_nor_moves_the_global_generator():
    torch.manual_seed(0)
    before, state = DRAW.uniform("jitter", LIKE), torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(DRAW.uniform("jitter", LIKE), before)
    torch.manual_seed(0)
    DRAW.uniform("jitter", LIKE)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_numbers_are_uniform_from_0_to_1():
    numbers = DRAW.uniform("jitter", torch.zeros(3, 100, 100)).flatten().sort().values
    assert numbers[0] >= 0
    assert numbers[-1] < 1
    expected = (torch.arange(len(numbers)) + 0.5) / len(numbers)
    assert (numbers - expected).abs().max() < 0.02
