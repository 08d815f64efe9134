"""Waiting for other processes: as long as it takes on a busy machine, so that only what hangs is given up."""

import time
from pathlib import Path

GIVES_UP = 1800.0  # seconds; a limit that a slow machine can reach would be a test of the machine


def until(condition, why=lambda: "waited in vain"):
    """What `condition` gives once that is true of it; `why` raises, or says in the end what was wrong."""
    end = time.monotonic() + GIVES_UP
    while not (found := condition()):
        said = why()
        if time.monotonic() > end:
            raise TimeoutError(said)
        time.sleep(0.05)
    return found


def runs(pid):
    """Whether Linux has this process. One that has ended stays in its list for as long as its parent, as in a container whose
    first process is no init, does not ask how."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
