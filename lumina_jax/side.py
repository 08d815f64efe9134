"""A model as `lumina compare` asks it, computed by JAX in float32.

T positions, n of them, D model width, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lumina.data.rows import EMPTY
from lumina.interchange.side import Canonical, Pass, Row
from lumina.interchange.state import load_here
from lumina.tokenizer_files import load_tokenizer
from lumina_jax.checkpoint import variables_of
from lumina_jax.generate import Generator, bucket
from lumina_jax.model import Mode, merge


def exactly():
    """Products of matrices in full precision: accelerators would round float32 to fewer bits."""
    return jax.default_matmul_precision("highest")


class Side(Canonical):
    """See `lumina.interchange.side.Side`."""

    def __init__(self, name, config, state, tokenizer):
        super().__init__(name, config, state, tokenizer)
        graphdef, self._variables = variables_of(config, state)
        self._generator = Generator(config, graphdef, self._variables, tokenizer)

        def hidden(variables, *row):
            rows_1T = (array_T[None] for array_T in row)
            hidden_1TD, metrics, _ = merge(graphdef, variables)(*rows_1T, dtype=jnp.float32, mode=Mode(tell=True))
            names = ("logit_BT", "taken_BT", "experts_BTk", "margin_BT")
            told = {name: value[:, 0] for group in metrics.values() for name, value in group.items() if name in names}
            return hidden_1TD[0], told

        def logits(variables, hidden_nD):
            return hidden_nD @ merge(graphdef, variables).head_DV(jnp.float32)

        self._hidden, self._logits = jax.jit(hidden), jax.jit(logits)

    def read(self, row: Row) -> Pass:
        # Few lengths are compiled: after the row comes what is empty, which no token of the row can see.
        T = len(row.inputs_T)
        more = (0, bucket(T) - T)
        inputs_T, positions_T = (np.pad(array_T, more) for array_T in (row.inputs_T, row.positions_T))
        segments_T = np.pad(row.segments_T, more, constant_values=EMPTY)
        with exactly():
            hidden_TD, told = self._hidden(self._variables, inputs_T, segments_T, positions_T)

        def logits(start: int, stop: int) -> np.ndarray:
            with exactly():
                return np.asarray(self._logits(self._variables, hidden_TD[start:stop]))

        return Pass(logits, {name.replace("_BT", "_LT"): np.asarray(value)[:, :T] for name, value in told.items()})

    def continuation(self, prompt_T: np.ndarray, count: int) -> list[int]:
        with exactly():
            return self._generator.likeliest(prompt_T.tolist(), count)


def open_side(name: str, path: Path) -> Side:
    """The newest state that verifies of a run of either backend, or a canonical directory; raises as `load_here` does."""
    config, state = load_here(path)
    config = replace(config, train=replace(config.train, compute_dtype="float32"))
    return Side(name, config, state, load_tokenizer(str(path / "tokenizer")))
