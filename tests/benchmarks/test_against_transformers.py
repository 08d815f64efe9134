"""The comparison with transformers, run as a user runs it, at a size that takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import GIVES_UP

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "against_transformers.py"
SMALL = [
    "--length=16",
    "--rounds=1",
    "--steps=1",
    "--config.model.d_model=32",
    "--config.model.vocab_size=64",
    "--config.model.num_layers=1",
    "--config.model.d_ff=32",
    "--config.train.batch_size=2",
]


def _run(*arguments, before=""):
    """The script in a process of its own, after the statement `before`."""
    as_script = "runpy.run_path(sys.argv[0], run_name='__main__')"
    program = f"{before}\nimport runpy, sys\nsys.argv = {[str(SCRIPT), *arguments]!r}\n{as_script}"
    command = [sys.executable, "-c", program] if before else [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], check=False, timeout=GIVES_UP)


@pytest.mark.parametrize(("dense", "ours"), [(False, "jax"), (True, "torch")], ids=["mixtral", "llama"])
def test_both_sides_train_the_same_model(dense, ours):
    done = _run(*SMALL, *(["--dense"] if dense else []), f"--ours={ours}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    attention, ff = 2 * 32 * 8 * 32 + 2 * 32 * 2 * 32, 3 * 32 * 32
    layer = attention + 2 * 32 + (ff if dense else 8 * ff + 32 * 8)
    for side in ("lumina", "transformers"):
        assert result[side]["parameters"] == layer + 2 * 64 * 32 + 32
        assert 3 < result[side]["loss"] < 6  # log 64 is 4.2
    assert ("dispatch" in result) != dense
    assert ("jax" in result["lumina"]["versions"]) == (ours == "jax")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.model.qk_norm=True", "model.qk_norm = True"),
        ("--config.model.moe.pattern=interleaved", "model.moe.pattern = 'interleaved'"),
        ("--rounds=0", "--rounds = 0"),
    ],
)
def test_what_transformers_cannot_match_is_refused(override, says):
    done = _run(*SMALL, override)
    assert done.returncode in (2, 3)
    assert says in done.stderr


def test_a_missing_transformers_is_said_with_what_to_install():
    done = _run(
        *SMALL, before="import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: n != 'transformers' and find(n)"
    )
    assert done.returncode == 2
    assert "transformers not installed: pip install" in done.stderr
