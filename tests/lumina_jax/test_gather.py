"""Moving rows by index, against plain indexing and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from lumina_jax.gather import inverse_index, take_rows
from tests.lumina_jax.oracles import assert_close

B, N, M, k, D = 2, 5, 6, 2, 3

# Row 0 takes item 3 twice and skips 0 and 4; row 1 takes item 0 twice. -1 takes nothing.
INDEX_BM = np.array([[3, -1, 1, 2, 3, -1], [4, 0, -1, 0, 1, 2]])


def _back_BNk(index_BM):
    """The places that each item goes to, found by looking."""
    back_BNk = np.full((B, N, k), -1)
    for b in range(B):
        for n in range(N):
            places = np.flatnonzero(index_BM[b] == n)
            back_BNk[b, n, : len(places)] = places
    return back_BNk


BACK_BNk = _back_BNk(INDEX_BM)
rng = np.random.default_rng(0)
X_BND = rng.standard_normal((B, N, D)).astype(np.float32)
WEIGHTS_BMD = rng.standard_normal((B, M, D)).astype(np.float32)


@jax.jit
def _value_and_gradient(x_BND):
    def weighted(x):
        y_BMD = take_rows(x, INDEX_BM, BACK_BNk)
        return jnp.sum(y_BMD * WEIGHTS_BMD), y_BMD

    (_, y_BMD), dx_BND = jax.value_and_grad(weighted, has_aux=True)(x_BND)
    return y_BMD, dx_BND


def test_take_rows_equals_plain_indexing():
    expected_BMD = np.zeros((B, M, D))
    for b in range(B):
        for m in range(M):
            if INDEX_BM[b, m] >= 0:
                expected_BMD[b, m] = X_BND[b, INDEX_BM[b, m]]
    assert_close(_value_and_gradient(X_BND)[0], expected_BMD, 0)


def test_take_rows_gradient_equals_that_of_plain_indexing():
    def naive(x):
        return jnp.sum(jnp.where(INDEX_BM[:, :, None] >= 0, x[np.arange(B)[:, None], INDEX_BM], 0) * WEIGHTS_BMD)

    assert_close(_value_and_gradient(X_BND)[1], jax.jit(jax.grad(naive))(X_BND), 1e-6)


def test_index_minus_one_takes_zero_even_where_row_zero_is_not_finite():
    x_BND = X_BND.copy()
    x_BND[0, 0] = np.inf  # row 0 of the batch never takes item 0
    y_BMD, dx_BND = _value_and_gradient(x_BND)
    assert np.all(np.asarray(y_BMD)[INDEX_BM < 0] == 0)
    assert np.all(np.isfinite(y_BMD))
    assert np.all(np.isfinite(dx_BND))


def test_an_item_that_no_place_takes_has_no_gradient():
    dx_BND = np.asarray(_value_and_gradient(X_BND)[1])
    assert np.all(dx_BND[0, [0, 4]] == 0)
    assert np.all(dx_BND[1, 3] == 0)


def test_inverse_index_names_the_place_of_each_item():
    index_BM = np.array([[3, -1, 1, 0], [-1, -1, 4, 2]])
    back_BN = np.asarray(inverse_index(index_BM, N))
    expected_BN = np.full((2, N), -1)
    for b in range(2):
        for m, n in enumerate(index_BM[b]):
            if n >= 0:
                expected_BN[b, n] = m
    assert back_BN.tolist() == expected_BN.tolist()


def test_inverse_index_of_a_permutation_undoes_it():
    index_BM = np.stack([np.random.default_rng(i).permutation(N) for i in range(B)])
    assert np.take_along_axis(index_BM, np.asarray(inverse_index(index_BM, N)), 1).tolist() == [list(range(N))] * B
