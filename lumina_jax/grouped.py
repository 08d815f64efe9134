"""Temporary."""

import jax
import jax.numpy as jnp

from lumina_jax.feedforward import ACTIVATIONS


def grouped_feedforward(x_ND, experts_Nk, weights, activation: str, form: str = "auto"):
    gate_EDF, up_EDF, down_EFD = (w.astype(x_ND.dtype) for w in weights)
    hidden = ACTIVATIONS[activation](jnp.einsum("nd,edf->nef", x_ND, gate_EDF)) * jnp.einsum("nd,edf->nef", x_ND, up_EDF)
    out_NED = jnp.einsum("nef,efd->ned", hidden, down_EFD)
    one_hot = jax.nn.one_hot(experts_Nk, gate_EDF.shape[0], dtype=x_ND.dtype)
    return jnp.einsum("nke,ned->nkd", one_hot, out_NED)
