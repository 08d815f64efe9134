"""Launch scripts as users call them: from the root of the project, with variables before them."""

import os
import subprocess
from pathlib import Path

from tests.waiting import GIVES_UP

ROOT = Path(__file__).parents[2]
# What these scripts read; a variable of whoever runs the tests must not change what they print.
KEPT = ("PATH", "HOME", "TMPDIR", "LUMINA_CACHE")


def call(script, *words, shell="sh", **variables):
    """(exit code, output, errors) of launch/`script`, with nothing but `variables` set."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | variables
    done = subprocess.run(
        [shell, f"launch/{script}", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=GIVES_UP
    )
    return done.returncode, done.stdout, done.stderr


def dry(script, *words, **variables):
    """What the script would run; on stderr are its variables alone."""
    code, output, errors = call(script, *words, DRY_RUN="1", **variables)
    assert (code, errors[:7], errors.count("\n")) == (0, "# with ", 1)
    return output
