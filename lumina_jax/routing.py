"""What the routers of a checkpoint decide about held-out text, token by token.

B rows, T positions, D model width, A alternatives of an expert router, k choices, R rows in all, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina.config import Config
from lumina.data import Corpus
from lumina.data.rows import Rows, segments_and_positions
from lumina.runs.directory import RunDirectory
from lumina.runs.routing_text import HeldOut
from lumina_jax.model import Mode, Variables, merge

TELLING = Mode(tell=True)


def decisions(
    config: Config, graphdef: nnx.GraphDef, variables: Variables, tokens_RT: np.ndarray, end: int, step: int = 0
) -> HeldOut:
    """What the routers decide about rows of tokens, as in generation; `end` is the document end's id."""
    dtype, R = jnp.dtype(config.train.compute_dtype), len(tokens_RT)
    B = min(R, config.train.batch_size // config.train.micro_batches)
    segments_RT, positions_RT = segments_and_positions(tokens_RT, end)

    @jax.jit
    def forward(variables: Variables, *rows_BT: Any) -> tuple[Any, Any]:
        _, metrics, _ = merge(graphdef, variables)(*rows_BT, dtype=dtype, mode=TELLING)
        experts_LBTk = metrics["moe"]["experts_BTk"] if "moe" in metrics else jnp.zeros((0, *rows_BT[0].shape, 1), jnp.int32)
        taken_LBT = metrics["mod"]["taken_BT"] if "mod" in metrics else jnp.zeros((0, *rows_BT[0].shape), bool)
        return experts_LBTk, taken_LBT

    found = []
    for start in range(0, R, B):
        numbers_B = np.minimum(np.arange(start, start + B), R - 1)  # the last batch is filled with the last row
        experts_LBTk, taken_LBT = jax.device_get(
            forward(variables, *(rows_RT[numbers_B] for rows_RT in (tokens_RT, segments_RT, positions_RT)))
        )
        found.append((experts_LBTk[:, : R - start], taken_LBT[:, : R - start]))
    experts_LRTk, taken_LRT = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return HeldOut(step, tokens_RT, experts_LRTk, taken_LRT)


def look(run: RunDirectory, config: Config, corpus: Corpus, rows: int, best: bool) -> HeldOut:
    """One pass of the newest (or best) checkpoint over at most `rows` held-out rows, spread evenly.

    Raises CheckpointError: there is no whole checkpoint, or one of another shape.
    """
    from lumina_jax import checkpoint  # orbax takes a second to import

    config, graphdef, variables, step = checkpoint.open_model(run.path, best)
    held_out = Rows(corpus.held_out, config.data.sequence_length, corpus.document_end_id)
    numbers_R = np.linspace(0, len(held_out) - 1, min(rows, len(held_out))).astype(int)
    tokens_RT = np.stack([held_out.row(int(number))[:-1] for number in numbers_R])
    return decisions(config, graphdef, variables, tokens_RT, corpus.document_end_id, step)
