"""Large buffers stay mapped: by default glibc returns each to the system, and getting it back costs a fault a page."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
NEVER, PAD = -1, 64 * 2**20


def keep_large_buffers() -> str:
    """Tell the C library to keep what is freed, for this process from now on. Returns what was done, in a line.

    A step allocates its temporaries anew each time, and getting pages took an eighth of its processor time. To be called before
    the first large allocation. One arena serves all threads, as the others cannot keep what is larger than 64 MB; the memory
    that a process holds then never shrinks.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return f"large buffers: as the C library has them, which is not glibc ({sys.platform})"
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, PAD))
    accepted = [mallopt(name, value) for name, value in settings]
    if not all(accepted):
        return "large buffers: as glibc has them, as it refused mallopt"
    return "large buffers: kept when freed (mallopt)"
