"""Waiting for other processes: as long as it takes on a busy machine, so that only what hangs is given up."""

import time

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
