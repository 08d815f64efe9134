"""States with a value of its own in every place, and runs and directories that hold one, made without any backend."""

import json

import numpy as np

from lumina.architecture import tensor_table
from lumina.config import save
from lumina.interchange.state import State, arrays, digests, write
from lumina.runs.directory import RunDirectory
from lumina.runs.steps import Steps, write_manifest
from tests.lumina_jax.tiny import tiny

PATTERNS = {"moe": {"pattern": "1,3,5"}, "mod": {"pattern": "2,3"}}  # dense, moe, dense+mod, moe+mod, dense, moe
DATA = {"fingerprint": "f" * 64, "tokenizer": {"name": "bpe-300", "fingerprint": "t" * 64}}


def every_kind(**changes):
    """Six layers of the four kinds, some in segments of their own and some stacked."""
    model = {"num_layers": 6} | changes.pop("model", {})
    return tiny(model=model, **{name: PATTERNS[name] | changes.pop(name, {}) for name in PATTERNS}, **changes)


def random_state(config, step=7, seed=0):
    """As after `step` steps of training, of which the last two were skipped."""
    rng = np.random.default_rng(seed)
    table = tensor_table(config.model)

    def values(tensors):
        return {t.name: np.asarray(rng.standard_normal(t.shape), np.float32) for t in tensors}

    trained = [tensor for tensor in table if tensor.trained]
    losses = np.full(config.guard.spike_window, np.nan, np.float32)
    losses[-5:] = rng.random(5)
    return State(step, values(table), values(trained), values(trained), max(0, step - 2), losses, 2, 512.0, 3)


def make_run(path, config, *steps, best=None, progress=(), data=DATA):
    """A run as lumina_torch leaves it, with these states; returns its directory."""
    run = RunDirectory(path)
    run.path.mkdir(parents=True)
    save(config, run.config)
    run.data.write_text(json.dumps(data))
    for step in steps:
        add_step(run, random_state(config, step), best, progress)
    return run


def add_step(run, state, best=None, progress=(), **forged):
    """Commit a state; `forged` digests by name are written in place of the true ones."""
    checkpoints = Steps(run.checkpoints, keep=100)
    write(checkpoints.begin(state.step), state)
    named = arrays(state)
    found = digests(named) | forged
    leaves = {n: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": found[n]} for n, a in named.items()}
    made = {"rows": 4 * state.step, "best_step": best, **dict(progress)}
    checkpoints.commit(state.step, {"leaves": leaves, "parameters": "p", "progress": made, "ledger": None})


def make_directory(path, config, state):
    """A directory with a model under canonical names; returns its path."""
    path.mkdir(parents=True)
    save(config, path / "config.json")
    write(path, state)
    write_manifest(path, {"step": state.step})
    return path


def assert_same(found, expected):
    """Bit for bit, NaN among it."""
    assert arrays(found).keys() == arrays(expected).keys()
    for name, array in arrays(expected).items():
        other = arrays(found)[name]
        assert (other.shape, other.dtype) == (array.shape, array.dtype), name
        assert other.tobytes() == array.tobytes(), name
