"""Plant known mistakes one at a time, and see that the suite catches each: make mutants [ARGS='part of a name']

Each mistake is a replacement of text in a copy of the project; the tests named beside it must then fail. Exits 1 when one
survives, or when the text to replace or the test is no longer there: then the code has moved, and the lists, mutants_of_*.py,
should follow.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from mutant import Mutant
from mutants_of_commands import COMMANDS
from mutants_of_data import DATA
from mutants_of_devices import DEVICES
from mutants_of_models import MODELS
from mutants_of_planning import PLANS
from mutants_of_preparing import PREPARING
from mutants_of_runs import RUNS
from mutants_of_steps import STEPS
from mutants_of_texts import TEXTS
from mutants_of_torch import TORCH

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "lumina",
    "lumina_jax",
    "lumina_torch",
    "configs",
    "launch",
    "tests",
    "parity_tests",
    "docs",
    "conftest.py",
    "pyproject.toml",
)
MUTANTS = [*STEPS, *MODELS, *DEVICES, *PLANS, *RUNS, *TORCH, *TEXTS, *PREPARING, *DATA, *COMMANDS]


def path(tests: str) -> str:
    """From the root of the project, of what a mistake names."""
    return tests if tests.startswith("parity_tests/") else f"tests/{tests}"


def misses(mutant: Mutant) -> str:
    """What is no longer there: the text to replace or a test; "" if both are."""
    if mutant.right not in (ROOT / mutant.file).read_text(encoding="utf-8"):
        return f"{mutant.file} no longer holds {mutant.right!r}"
    file, _, test = path(mutant.tests).partition("::")
    if test and f"def {test.split('[')[0]}(" not in (ROOT / file).read_text(encoding="utf-8"):
        return f"{file} no longer holds {test}"
    return ""


def plant(mutant: Mutant, directory: Path) -> str:
    """Run the tests of a copy with the mistake in it; the name of the first that failed, "" if none did."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, directory)
    file = directory / mutant.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
    # What waits in vain here most likely does so for the mistake, and half an hour tells no more than ten minutes.
    waiting = directory / "tests" / "waiting.py"
    waiting.write_text(re.sub(r"GIVES_UP = [0-9.]+", "GIVES_UP = 600.0", waiting.read_text(encoding="utf-8")), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", path(mutant.tests)]
    # Most of a run is compiling what the mistake does not touch: a cache serves all of them.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory.parent / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"PYTHONPATH": str(directory)}
    pipe = subprocess.PIPE
    # A session of its own, so that what a mistake leaves running ends with it.
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as run:
        try:
            out, errors = run.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.name}: pytest did not run\n{out[-2000:]}{errors[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", out, re.MULTILINE)
    return failed.group(1) if failed else ""


def main() -> int:
    """Plant every mistake whose name contains the argument; print a line each."""
    names = Counter(mutant.name for mutant in MUTANTS)
    if names.most_common(1)[0][1] > 1:
        sys.exit(f"error: several mistakes are called {names.most_common(1)[0][0]!r}: a name is for one")
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or sys.argv[1] in mutant.name]
    for mutant in chosen:
        if missing := misses(mutant):
            sys.exit(f"error: {mutant.name}: {missing}")
    caught, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lumina-mutants-") as scratch:
        for number, mutant in enumerate(chosen, 1):
            directory = Path(scratch) / "copy"
            directory.mkdir()
            failed = plant(mutant, directory)
            shutil.rmtree(directory)
            caught += bool(failed)
            left = (time.monotonic() - began) / number * (len(chosen) - number)
            verdict = f"caught by {failed.removeprefix('tests/')}" if failed else f"SURVIVED {mutant.tests}"
            print(f"{number}/{len(chosen)} ({left:.0f} s left)  {mutant.name}: {verdict}", flush=True)
    print(f"{caught} of {len(chosen)} mistakes caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
