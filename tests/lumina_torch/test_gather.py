"""Moving rows by index, against plain indexing and its gradient."""

import numpy as np
import torch

from lumina_torch.gather import inverse_index, take_rows
from tests.lumina_jax.oracles import assert_close

B, N, M, k, D = 2, 5, 6, 2, 3

# Row 0 takes item 3 twice and skips 0 and 4; row 1 takes item 0 twice. -1 takes nothing.
INDEX_BM = torch.tensor([[3, -1, 1, 2, 3, -1], [4, 0, -1, 0, 1, 2]])
# The places that each item goes to.
BACK_BNk = torch.tensor([[[-1, -1], [2, -1], [3, -1], [0, 4], [-1, -1]], [[1, 3], [4, -1], [5, -1], [-1, -1], [0, -1]]])
rng = np.random.default_rng(0)
X_BND, WEIGHTS_BMD = (torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for shape in ((B, N, D), (B, M, D)))


def _value_and_gradient(x_BND):
    x_BND = x_BND.clone().requires_grad_()
    y_BMD = take_rows(x_BND, INDEX_BM, BACK_BNk)
    (y_BMD * WEIGHTS_BMD).sum().backward()
    return y_BMD.detach(), x_BND.grad


def test_take_rows_and_its_gradient_equal_plain_indexing():
    y_BMD, dx_BND = _value_and_gradient(X_BND)
    expected_BMD, expected_BND = np.zeros((B, M, D)), np.zeros((B, N, D))
    for b in range(B):
        for m, n in enumerate(INDEX_BM[b].tolist()):
            if n >= 0:
                expected_BMD[b, m] = X_BND[b, n]
                expected_BND[b, n] += WEIGHTS_BMD[b, m].numpy()
    assert_close(y_BMD, expected_BMD, 0)
    assert_close(dx_BND, expected_BND, 1e-6)


def test_index_minus_one_takes_zero_even_where_row_zero_is_not_finite():
    x_BND = X_BND.clone()
    x_BND[0, 0] = torch.inf  # row 0 of the batch never takes item 0
    y_BMD, dx_BND = _value_and_gradient(x_BND)
    assert (y_BMD[INDEX_BM < 0] == 0).all()
    assert y_BMD.isfinite().all()
    assert dx_BND.isfinite().all()


def test_a_gradient_that_is_not_finite_stays_with_the_item_it_is_of():
    x_BND = X_BND.clone().requires_grad_()
    weights_BMD = WEIGHTS_BMD.clone()
    weights_BMD[0, 0] = torch.nan  # of item 3; place 0 is also what -1 is looked up at
    (take_rows(x_BND, INDEX_BM, BACK_BNk) * weights_BMD).sum().backward()
    assert torch.argwhere(~x_BND.grad.isfinite().all(dim=-1)).tolist() == [[0, 3]]


def test_inverse_index_names_the_place_of_each_item():
    index_BM = torch.tensor([[3, -1, 1, 0], [-1, -1, 4, 2]])
    assert inverse_index(index_BM, N).tolist() == [[3, 2, -1, 0, -1], [-1, -1, 3, -1, 2]]


def test_inverse_index_of_a_permutation_undoes_it():
    index_BM = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    assert index_BM.gather(1, inverse_index(index_BM, N)).tolist() == [list(range(N))] * B
