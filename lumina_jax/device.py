"""The device at hand: what it is, how fast it multiplies matrices, how much memory it has and used."""

import resource
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh

from lumina.architecture import capacity, depth_capacity_at, layer_kinds
from lumina.auto import free_memory
from lumina.config import Config
from lumina.topology import Topology
from lumina.topology import at_hand as topology_of
from lumina_jax.attend import choose_attention
from lumina_jax.grouped import choose_grouped
from lumina_jax.mesh import axes_of, slices_of


def describe(mesh: Mesh) -> str:
    """Number, platform and kind of the devices in use; names the ones that stay idle."""
    first, idle = mesh.devices.flat[0], jax.device_count() - mesh.size
    each = f"{mesh.size} x {first.platform} ({first.device_kind})"
    shared = f" as {axes_of(mesh)}" if mesh.size > 1 else ""
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{each}{processes}{shared}, jax {jax.__version__}" + (f"; {idle} more stay idle" if idle else "")


def chosen_forms(config: Config) -> str:
    """Which forms of attention and of the experts' products this machine takes for `config`, and why.

    Raises ConfigError when one that is asked for cannot honour the request.
    """
    (what, form, why), *more = forms(config, jax.default_backend())
    return f"{what}: {form} ({why})" + "".join(
        f", {form} {what} ({why})" if what.startswith("among") else f"; {what}: {form} ({why})" for what, form, why in more
    )


def forms(config: Config, platform: str) -> list[tuple[str, str, str]]:
    """(what, its form, why) for attention, for attention among fewer tokens where it is another, and for dropless experts.

    Raises ConfigError when one that is asked for cannot honour the request.
    """
    model = config.model
    dtype, length, context = config.train.compute_dtype, config.data.sequence_length, max(config.mesh.context, 1)
    attention, why = choose_attention(model.attention_form, platform, dtype, length, context)
    chosen = [("attention", attention, why)]
    if model.mod.scope == "block" and any(kind.endswith("mod") for kind in layer_kinds(model)):
        stages = {depth_capacity_at(model.mod, step) for step in (*range(model.mod.anneal_steps), model.mod.anneal_steps)}
        for selected in sorted({capacity(length, share) for share in stages} - {length}):
            form, why = choose_attention(model.attention_form, platform, dtype, selected, context)
            if form != attention:
                chosen.append((f"among the {selected} tokens that take a block", form, why))
    if any(kind.startswith("moe") for kind in layer_kinds(model)):
        grouped, why = choose_grouped(model.moe.grouped_form, platform)
        chosen.append(("dropless experts", grouped, why))
    return chosen


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


def at_hand() -> Topology:
    """All devices of the run, the same on every process."""
    devices = jax.devices()
    return topology_of(devices[0].device_kind, devices[0].platform, len(devices), slices_of(devices))


def memory_of_each() -> int:
    """Bytes that each device may use: what its allocator tells, else its share of what this machine has free."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return free_memory()[0] // jax.local_device_count()


def peak_memory() -> int:
    """The most bytes held so far: by the device's allocator where it tells, else by the process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
