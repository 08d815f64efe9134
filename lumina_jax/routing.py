"""What the routers of a checkpoint decide about held-out text, token by token.

B rows, T positions, D model width, A alternatives of an expert router, k choices, R rows in all, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina.config import Config
from lumina.data.corpus import Corpus
from lumina.runs.directory import RunDirectory
from lumina.runs.routing_text import HeldOut
from lumina.runs.text import rows_of
from lumina_jax.model import Mode, Variables, merge

TELLING = Mode(tell=True)


def decisions(
    config: Config, graphdef: nnx.GraphDef, variables: Variables, rows: dict[str, np.ndarray], step: int = 0
) -> HeldOut:
    """What the routers decide about rows, as `RowSet.gather` makes them, as in generation."""
    dtype, R = jnp.dtype(config.train.compute_dtype), len(rows["inputs"])
    B = min(R, config.train.batch_size // config.train.micro_batches)

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
            forward(variables, *(rows[name][numbers_B] for name in ("inputs", "segments", "positions")))
        )
        found.append((experts_LBTk[:, : R - start], taken_LBT[:, : R - start]))
    experts_LRTk, taken_LRT = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return HeldOut(step, rows["inputs"], rows["segments"] >= 0, experts_LRTk, taken_LRT)


def look(run: RunDirectory, config: Config, corpus: Corpus, rows: int, best: bool) -> HeldOut:
    """One pass of the newest (or best) checkpoint over at most `rows` of the rows that the run is evaluated on, spread evenly.

    Raises:
        CheckpointError: there is no whole checkpoint, or one of another shape.
        DataError: there are no such rows.
    """
    from lumina_jax import checkpoint  # orbax takes a second to import

    config, graphdef, variables, step = checkpoint.open_model(run.path, best)
    held_out = rows_of(corpus, "held_out", config.data, config.data.sequence_length)
    numbers_R = np.linspace(0, len(held_out) - 1, min(rows, len(held_out))).astype(np.int64)
    return decisions(config, graphdef, variables, held_out.gather(numbers_R), step)
