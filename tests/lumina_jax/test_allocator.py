"""What the trainer asks of the C library's allocator, in processes of their own, as it lasts."""

import subprocess
import sys

import pytest

MEASURE = """
import sys
from lumina_jax.allocator import keep_large_buffers
said = keep_large_buffers() if sys.argv[1] == "kept" else ""
import numpy as np
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
before = faults()
for _ in range(8):
    np.ones(2**24)
print(faults() - before, said)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is asked of the allocator")
def test_a_freed_buffer_is_used_again_without_asking_the_kernel_for_its_pages():
    faults, said = {}, {}
    for how in ("kept", "as it is"):
        done = subprocess.run([sys.executable, "-c", MEASURE, how], capture_output=True, text=True, check=True)
        count, _, said[how] = done.stdout.strip().partition(" ")
        faults[how] = int(count)
    if "glibc" in said["kept"]:  # another C library
        return
    assert faults["kept"] < faults["as it is"] / 10
