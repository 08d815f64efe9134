"""The device at hand: what it is, how fast it multiplies matrices, how much memory it has and used."""

import resource
import sys
import time
from typing import Any

import jax


def describe() -> str:
    """Platform and kind of the device in use; names the ones that stay idle."""
    first, count = jax.devices()[0], jax.device_count()
    idle = f"; {count - 1} more stay idle" if count > 1 else ""
    return f"{first.platform} ({first.device_kind}), jax {jax.__version__}{idle}"


def matmul_peak(dtype: str, seconds: float = 0.5) -> float:
    """FLOP/s of the best of some large square matrix products in `dtype`: the yardstick for a step, measured beside it."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def compiled_memory(compiled: Any) -> int:
    """Bytes that a compiled function needs by the compiler's own account: arguments, results that reuse none, temporaries."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def peak_memory() -> int:
    """The most bytes held so far: by the device's allocator where it tells, else by the process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
