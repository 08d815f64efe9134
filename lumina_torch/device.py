"""The device at hand: what it can do, how fast it multiplies matrices, how much memory it used."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lumina.architecture import layer_kinds
from lumina.config import Config
from lumina.errors import ConfigError
from lumina_torch.attend import choose_attention
from lumina_torch.grouped import choose_grouped


@dataclass(frozen=True)
class Policy:
    """What this run does where devices differ."""

    device: torch.device
    dtype: torch.dtype  # of activations, and of parameters as they are used
    compile: bool  # each layer, by torch.compile
    pin_memory: bool  # batches are copied from pages that stay, while the device works
    notes: tuple[str, ...]  # for the user, one line each


def decide(
    asked: str, available: Collection[str], dtype: str, compile: bool, deepspeed: bool = False, no_compiler: str = ""
) -> Policy:
    """The policy for what a config asks and a machine has.

    Args:
        asked: auto, cpu, cuda or mps. auto takes cuda before mps before cpu.
        available: of cpu, cuda and mps.
        dtype: float32, bfloat16 or float16.
        no_compiler: why nothing can be compiled here; empty if it can.

    Raises ConfigError for what the device cannot do.
    """
    kind = next(kind for kind in ("cuda", "mps", "cpu") if kind in available) if asked == "auto" else asked
    if kind not in available:
        raise ConfigError(f"torch.device = {asked!r}: not on this machine, which has {', '.join(sorted(available))}")
    notes = []
    if kind == "mps":
        if dtype == "float16":
            raise ConfigError(f"train.compute_dtype = {dtype!r}: not on mps; float32, or bfloat16, would work")
        if compile:
            raise ConfigError("torch.compile = True: not on mps, where it is unfinished; False would work")
        if deepspeed:
            raise ConfigError("torch.deepspeed.zero_stage: DeepSpeed has no mps; off would work")
        notes.append("mps: one process, not compiled, and no float64")
    if compile and no_compiler:
        raise ConfigError(f"torch.compile = True: {no_compiler}; False would work")
    if kind == "cpu" and dtype == "float16":
        notes.append("float16 on a CPU is slow; float32 or bfloat16 would be faster")
    return Policy(torch.device(kind), getattr(torch, dtype), compile, pin_memory=kind == "cuda", notes=tuple(notes))


def choose_device(config: Config) -> Policy:
    """`decide` for `config` on this machine."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [kind for kind, present in here.items() if present]
    deepspeed = config.torch.deepspeed.zero_stage != "off"
    if config.torch.compile and config.model.mod.anneal_steps:
        raise ConfigError(
            "torch.compile = True: each of the capacities of model.mod.anneal_steps would be compiled, and PyTorch keeps few; "
            "False would work"
        )
    missing = no_compiler() if config.torch.compile else ""
    return decide(config.torch.device, available, config.train.compute_dtype, config.torch.compile, deepspeed, missing)


def no_compiler() -> str:
    """Why torch.compile could not work: what it writes for a CPU is C++, and on CUDA triton needs a C compiler too."""
    wanted = os.environ.get("CXX", "g++")
    return "" if shutil.which(wanted) else f"needs a C++ compiler, and there is no {wanted}"


def be_exact(policy: Policy) -> None:
    """Full float32 products, no TF32; on CUDA the deterministic form of an operation where it has one, so that a resumed run
    repeats the bits of one that was never stopped. On a CPU what we use is deterministic for a number of threads."""
    torch.set_float32_matmul_precision("highest")
    if policy.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it


def describe(policy: Policy) -> str:
    """Platform and kind of the device in use; names the ones that stay idle."""
    if policy.device.type == "cuda":
        idle = torch.cuda.device_count() - 1
        kind = f"cuda ({torch.cuda.get_device_name(policy.device)})"
    else:
        idle, kind = 0, {"cpu": f"cpu ({torch.get_num_threads()} threads)"}.get(policy.device.type, policy.device.type)
    return f"1 x {kind}, torch {torch.__version__}" + (f"; {idle} more stay idle" if idle else "")


def chosen_forms(config: Config, policy: Policy) -> str:
    """Which forms of attention and of the experts' products this machine takes for `config`, and why.

    Raises ConfigError when one that is asked for cannot honour the request.
    """
    model, platform = config.model, policy.device.type
    dtype = config.train.compute_dtype
    attention, why = choose_attention(model.attention_form, platform, dtype, model.head_dim)
    chosen = f"attention: {attention} ({why})"
    if any(kind.startswith("moe") for kind in layer_kinds(model)):
        grouped, why = choose_grouped(model.moe.grouped_form, platform, dtype, (model.d_model, model.d_ff))
        chosen += f"; dropless experts: {grouped} ({why})"
    return chosen


def place(batch: dict[str, Any], device: torch.device, pin_memory: bool = False) -> dict[str, torch.Tensor]:
    """A batch of numpy arrays or tensors on the device, integers as int64."""

    def placed(array: Any) -> torch.Tensor:
        # A copy: rows may be read-only views, which PyTorch warns of.
        tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
        if not tensor.is_floating_point():
            tensor = tensor.to(torch.int64)
        if pin_memory and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=pin_memory)

    return {name: placed(array) for name, array in batch.items()}


def fetch(tree: Any) -> Any:
    """The numbers of a metrics dictionary as numpy arrays, waiting for them."""
    if isinstance(tree, dict):
        return {name: fetch(each) for name, each in tree.items()}
    if isinstance(tree, torch.Tensor):
        tree = tree.detach().cpu()
        return (tree.float() if tree.dtype == torch.bfloat16 else tree).numpy()
    return tree


def matmul_peak(dtype: str, device: torch.device | None = None, seconds: float = 0.5) -> float:
    """FLOP/s of the best of some large square matrix products in `dtype`: the yardstick for a step, measured beside it."""
    device = device or torch.device("cpu")
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(getattr(torch, dtype))

    def multiply() -> None:
        a @ a
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    multiply()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device | None = None) -> int:
    """The most bytes held so far: by CUDA's allocator, or by Metal's now (it keeps no maximum), else by the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device is not None and device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
