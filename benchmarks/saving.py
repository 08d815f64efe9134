"""What saving in the background costs the steps beside it, as one JSON object.

    python benchmarks/saving.py debug --every 50 --workdir /tmp/saving

Blocks of steps that begin with a checkpoint alternate with blocks that do not, in one process, so that a machine whose speed
drifts slows both alike; the figure is the median over pairs of neighbours. A block ends when its checkpoint is committed.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
from train_step import random_batch

from lumina.config import Config, load, override
from lumina.errors import UsageError, exit_with
from lumina.runs.directory import Events, RunDirectory
from lumina_jax.checkpoint import Checkpoints
from lumina_jax.device import describe
from lumina_jax.mesh import one_device, place_rows, shaped_whole, whole
from lumina_jax.step import controls, init_state, make_train_step, state_shapes


def measure(config: Config, every: int, pairs: int, workdir: Path) -> dict[str, object]:
    """Time `pairs` pairs of blocks of `every` steps."""
    mesh = one_device()
    shapes, graphdef = state_shapes(config)
    run = RunDirectory(workdir)
    checkpoints = Checkpoints(run, config.checkpoint, Events(run, lambda line: None), shaped_whole(mesh, shapes))
    state = jax.jit(lambda: init_state(config)[1], out_shardings=whole(mesh))()
    batch, knobs = place_rows(mesh, random_batch(config)), controls(config)
    step = jax.jit(make_train_step(config, graphdef, mesh), donate_argnums=0).lower(state, batch, knobs).compile()
    blocking: list[float] = []

    def block(number: int, saving: bool) -> float:
        nonlocal state
        jax.block_until_ready(state)
        began = time.perf_counter()
        if saving:
            checkpoints.save(number, state, lambda digest: {"progress": {"best_step": None}, "ledger": None})
            blocking.append(time.perf_counter() - began)
        for _ in range(every):
            state, metrics = step(state, batch, knobs)
            metrics["loss"].block_until_ready()
        checkpoints.wait()
        return time.perf_counter() - began

    block(0, True)  # the first of everything
    blocking.clear()
    growth = []
    plain = []
    for number in range(1, pairs + 1):
        order = (True, False) if number % 2 else (False, True)  # so that a drift cancels
        seconds = {saving: block(number, saving) for saving in order}
        growth.append(seconds[True] / seconds[False])
        plain.append(seconds[False])
        print(f"pair {number}/{pairs}: {100 * (growth[-1] - 1):+.1f}%", file=sys.stderr)
    if checkpoints.failure:
        raise UsageError(f"{workdir}: saving failed ({checkpoints.failure}); choose another --workdir")
    size = sum(path.stat().st_size for path in checkpoints.steps.directory(pairs).rglob("*") if path.is_file())
    checkpoints.close()
    return {
        "device": describe(mesh),
        "step_time_growth": statistics.median(growth) - 1,
        "step_time_growth_quartiles": [q - 1 for q in statistics.quantiles(growth, n=4)] if pairs > 1 else [],
        "save_blocks_seconds": statistics.median(blocking),
        "step_seconds": statistics.median(plain) / every,
        "checkpoint_bytes": size,
        "every": every,
        "pairs": pairs,
    }


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default="debug", help="as in training (default: debug)")
    parser.add_argument("--every", type=int, default=50, help="steps a block (default: 50)")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of blocks (default: 12)")
    parser.add_argument("--workdir", type=Path, help="where to save (default: a temporary directory)")
    known, overrides = parser.parse_known_args()
    for flag, value in (("--every", known.every), ("--pairs", known.pairs)):
        if value < 1:
            raise UsageError(f"{flag} = {value}: must be at least 1")
    config = override(load(known.config), overrides)
    workdir = known.workdir or Path(tempfile.mkdtemp(prefix="lumina-saving-"))
    try:
        print(json.dumps(measure(config, known.every, known.pairs, workdir), indent=2))
    finally:
        if not known.workdir:
            shutil.rmtree(workdir, ignore_errors=True)


if __name__ == "__main__":
    exit_with(main)
