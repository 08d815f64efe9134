"""What several processes split between them, by stage of ZeRO (Rajbhandari et al., 2020), and how DeepSpeed is told.

Stage 0 splits nothing, 1 the optimizer's state, 2 gradients as well, 3 weights as well.
"""

from typing import Any

from lumina.config import Config
from lumina.errors import ConfigError
from lumina.runs.units import gib
from lumina_torch.device import Policy
from lumina_torch.processes import Place

LEFT_FOR_ACTIVATIONS = 0.25  # of the memory that is free, when a stage is chosen


def bytes_a_parameter(stage: int, processes: int, offload_optimizer: bool = False, offload_parameters: bool = False) -> float:
    """The most bytes a device holds for each parameter of the model in a step; buckets, gathered layers, activations apart.

    All is float32: weights, gradients, two moments of Adam. From stage 1 on a process has a second copy of the weights that it
    updates, and while it does of their gradients; stage 1 has whole gradients until they are summed.
    """
    if stage == 0:
        return 4.0 + 4.0 + 8.0
    part = 4.0 / processes
    weights = 4.0 if stage < 3 else 0.0 if offload_parameters else part
    if offload_optimizer:
        return weights + (4.0 if stage == 1 else part)
    kept = weights + part + 2 * part
    return max(kept + 2 * part, kept + 4.0 if stage == 1 else 0.0)


def choose_stage(
    parameters: int,
    bytes_free: int,
    processes: int,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> tuple[int, str]:
    """(stage, why): the lowest that fits into the free memory of a device; the higher ones send more."""
    offload = (offload_optimizer, offload_parameters)
    room = (1 - LEFT_FOR_ACTIVATIONS) * bytes_free
    least = 3 if offload_parameters else 1 if offload_optimizer else 0
    for stage in range(least, 4):
        needed = parameters * bytes_a_parameter(stage, processes, *offload)
        if needed <= room:
            return stage, f"the lowest stage that fits: {gib(needed)} of {gib(bytes_free)} free on a device"
    return 3, f"no stage fits: {gib(needed)} of {gib(bytes_free)} free on a device; more processes, or offloading, would help"


def require_possible(config: Config, policy: Policy, place: Place) -> None:
    """Raise a ConfigError for what DeepSpeed cannot do here."""
    zero, train = config.torch.deepspeed, config.train
    if policy.device.type == "mps":
        raise ConfigError("torch.deepspeed.zero_stage: DeepSpeed has no mps; off would work")
    if config.torch.compile:
        raise ConfigError("torch.compile = True: not with DeepSpeed, which hooks into the layers; False would work")
    if zero.offload_parameters == "cpu" and policy.device.type == "cpu":
        raise ConfigError("torch.deepspeed.offload_parameters = 'cpu': they are there already; none would work")
    rows = train.batch_size // train.micro_batches
    if rows % place.processes:
        raise ConfigError(
            f"train.batch_size / train.micro_batches = {rows} rows: must be a multiple of {place.processes}, the processes"
        )


def deepspeed_config(config: Config, stage: int, processes: int, parameters: int, on_cuda: bool = False) -> dict[str, Any]:
    """DeepSpeed's own configuration. Clipping, precision, loss scale and learning rate are the step's, and not here."""
    zero, train = config.torch.deepspeed, config.train
    bucket = min(zero.bucket_size, parameters)
    optimization: dict[str, Any] = {"stage": stage}
    if stage:
        optimization |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": zero.overlap,
            "contiguous_gradients": True,
        }
    if stage == 3:
        optimization |= {
            "stage3_prefetch_bucket_size": bucket,
            # Whole on every process: norms, biases and routers' vectors, each sent in less time than a message takes to begin.
            "stage3_param_persistence_threshold": 10 * config.model.d_model,
        }
    for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_parameters", "offload_param")):
        where = getattr(zero, name)
        if where != "none":
            optimization[key] = {"device": where, "pin_memory": on_cuda}
    return {
        "train_micro_batch_size_per_gpu": train.batch_size // train.micro_batches // processes,
        "gradient_accumulation_steps": train.micro_batches,
        "zero_optimization": optimization,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,  # AdamW as PyTorch has it, behind a gate
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own compiles for minutes
        "steps_per_print": 2**31,
    }
