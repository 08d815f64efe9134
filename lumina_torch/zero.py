"""DeepSpeed's ZeRO: several processes hold one training state between them, and make the same steps as one would.

N numbers of a flattened tensor, W losses remembered. For the stages see `lumina_torch.stages`. Weights, gradients and what is
sent are float32 as without DeepSpeed, and the model casts weights as it uses them; experts are plain tensors. DeepSpeed writes
no file of its own.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lumina.architecture import tensor_table
from lumina.config import Config
from lumina.interchange.state import MOMENTS, State
from lumina_torch.device import Policy, place
from lumina_torch.model import Block, Transformer, initial_values
from lumina_torch.optimizer import clip_factor, global_norm, gradients_of, make_optimizer, schedule
from lumina_torch.processes import VARIABLES, Place, total
from lumina_torch.stages import deepspeed_config
from lumina_torch.step import (
    Controls,
    Guard,
    LossScale,
    Metrics,
    Share,
    TrainState,
    is_good,
    make_eval_step,
    make_gradients,
    settle,
    totals,
    update_biases,
)

ADAM_KEYS = dict(zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True))


# ------------------------------------------------------------------------------------------------------------ the engine


def join(policy: Policy, place: Place, hang_seconds: float = 0) -> None:
    """Join the other processes: gloo between CPUs, nccl between CUDA's devices. Imports DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = policy.device.type
    for name, value in zip(VARIABLES, place, strict=True):  # of a process started alone: DeepSpeed reads them
        os.environ[name] = str(value)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # DeepSpeed calls what PyTorch renames
    # Its own collective for CPUs would be compiled for a minute; gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if policy.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=hang_seconds or 1800)
        if place.processes == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        else:
            dist.init_process_group(backend, timeout=limit)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


class Gate(torch.optim.AdamW):
    """AdamW that updates only when the step says so. DeepSpeed calls it, perhaps once for each of several parts, when the
    gradients have been summed and their norm is known."""

    learning_rate = 0.0
    norm_of: Callable[[], Any]  # the gradients' norm
    judge: Callable[[float], float | None]  # norm -> what gradients are multiplied by, or None: no update
    asked = False
    factor: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update, or not; the first call of a step asks."""
        if not self.asked:
            self.asked, self.factor = True, self.judge(float(self.norm_of()))
        if self.factor is None:
            return
        if self.factor != 1.0:
            torch._foreach_mul_(gradients_of(self), self.factor)
        for group in self.param_groups:
            group["lr"] = self.learning_rate
        super().step()


def _splitting(ds_config: dict[str, Any]) -> AbstractContextManager[Any]:
    """In here each tensor of a model is split over the processes as it is made."""
    import deepspeed

    class Splitting(deepspeed.zero.Init):
        def _zero_init_param(self, param: nn.Parameter) -> None:
            # As it has it, but that nothing is sent: it cannot send a number without dimensions, and all are set afterwards.
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

    return Splitting(config_dict_or_path=ds_config, dtype=torch.float32)


class Around(nn.Module):
    """Calls a function of the transformer, so that what it uses of the weights outside of layers is there when it does."""

    def __init__(self, transformer: Transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, function: Callable[..., Any], *rest: Any) -> Any:
        return function(self.transformer, *rest)


class Zero:
    """DeepSpeed's engine around a model, and the one training state that the processes hold in it."""

    def __init__(self, config: Config, policy: Policy, place: Place, stage: int):
        """All processes make it at once; the values are left uninitialised; see `fresh` and `load`."""
        import deepspeed

        self.config, self.policy, self.place, self.stage = config, policy, place, stage
        self.table = {tensor.name: tensor for tensor in tensor_table(config.model)}
        parameters = sum(math.prod(tensor.shape) for tensor in self.table.values())
        ds_config = deepspeed_config(config, stage, place.processes, parameters, policy.device.type == "cuda")
        with _splitting(ds_config) if stage == 3 else nullcontext():
            self.transformer = Transformer(config.model, policy.device)
        outside = self._outside_of_layers()
        around = Around(self.transformer)
        for parameter in self.transformer.parameters():
            # Not to be sent when the engine is made: it cannot send a number without dimensions, and all are set afterwards.
            parameter.ds_optim_param = True  # type: ignore[attr-defined]
        if stage == 3:
            # All of a layer is gathered at once: which of its parts has tokens may differ between processes.
            deepspeed.utils.set_z3_leaf_modules(self.transformer, [Block])
            for parameter in outside:
                deepspeed.zero.register_external_parameter(around, parameter)
        self.gate: Gate = make_optimizer(config, self.transformer, Gate)
        self.engine, *_ = deepspeed.initialize(model=around, optimizer=self.gate, config=ds_config, dist_init_required=False)
        self.gate.norm_of = self._norm
        for partition in self._partitions():
            self.gate.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                **{key: torch.zeros_like(partition, requires_grad=False) for key in ADAM_KEYS.values()},
            }
        if stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        self.share = Share((place.number, place.processes), total, self._run, self._backward)

    def _outside_of_layers(self) -> list[nn.Parameter]:
        return [p for name, p in self.transformer.named_parameters() if name in ("embedding.weight", "head.weight")]

    def _partitions(self) -> list[Tensor]:
        """What this process's part of the optimizer updates."""
        if self.stage == 0:
            return [parameter for group in self.gate.param_groups for parameter in group["params"]]
        optimizer = self.engine.optimizer
        return list(optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups)

    def _norm(self) -> Any:
        return self.engine.optimizer._global_grad_norm if self.stage else global_norm(gradients_of(self.gate))

    def _run(self, transformer: Transformer, function: Callable[..., Any], *rest: Any) -> Any:
        return self.engine(function, *rest)

    def _backward(self, objective: Tensor) -> None:
        # The objective is this process's part of a sum, of which DeepSpeed makes a mean.
        self.engine.backward(objective * self.place.processes, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch

    def gathered(self) -> AbstractContextManager[Any]:
        """In here the weights that lie outside of layers are whole; layers see to themselves."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(self._outside_of_layers()) if self.stage == 3 else nullcontext()

    # --------------------------------------------------------------------------------------------------------- states

    def fresh(self) -> TrainState:
        """The state that `lumina_torch.step.init_state` makes."""
        self._set_weights(initial_values(self.config.model, self.config.train.seed))
        self._set_moments(None, 0)
        config = self.config
        scale = LossScale(config.torch.loss_scale, 0) if config.train.compute_dtype == "float16" else None
        return self._state(0, Guard(np.full(config.guard.spike_window, np.nan, np.float32), 0), scale)

    def load(self, state: State | None) -> TrainState:
        """The state that the first process gives; what the others give does not count. Around weights alone a fresh one."""
        numbers_N, losses_W = np.zeros(7), np.zeros(0)
        if state is not None:
            losses_W = state.losses_W
            numbers_N[:] = (
                state.is_whole, len(losses_W), state.step, state.updates, state.skipped, state.loss_scale, state.good_steps
            )  # fmt: skip
        is_whole, W, *told = self._shared(numbers_N, (7,), torch.float64).tolist()
        step, updates, skipped, scale, good_steps = (number if is_whole else 0 for number in told)
        losses_W = self._shared(losses_W, (int(W),)).cpu().numpy()
        self._set_weights((name, state.weights[name] if state else None) for name in self.table)
        self._set_moments(state if is_whole else None, int(updates), is_whole=bool(is_whole))
        if not is_whole:
            losses_W = np.full(self.config.guard.spike_window, np.nan, np.float32)
        loss_scale = None
        if self.config.train.compute_dtype == "float16":
            loss_scale = LossScale(scale or self.config.torch.loss_scale, int(good_steps))
        return self._state(int(step), Guard(losses_W, int(skipped)), loss_scale)

    def to_state(self, state: TrainState) -> State | None:
        """A copy on the first process's host; None in the others, which take part: each tensor is gathered on its own."""
        weights = {name: self._on_host(self._weight(name)) for name in self.table}
        moments = {
            moment: {name: self._on_host(self._moment(name, key)) for name in self._trained()}
            for moment, key in ADAM_KEYS.items()
        }
        if self.place.number:
            return None
        guard, scale = state.guard, state.loss_scale or LossScale(0.0, 0)
        updates = int(self.gate.state[self._partitions()[0]]["step"])
        return State(
            state.step, weights, **moments, updates=updates, losses_W=guard.losses_W.copy(), skipped=int(guard.skipped),
            loss_scale=scale.scale, good_steps=scale.good_steps,
        )  # fmt: skip

    def copy(self) -> Transformer | None:
        """A whole model in the first process, for generation: on its device where there is room, else on the host."""
        if self.stage < 3:
            return self.transformer
        mine = self.place.number == 0
        weights = {name: self._on_host(self._weight(name)) for name in self.table}
        if not mine:
            return None
        size = 4 * sum(array.size for array in weights.values())
        fits = self.policy.device.type == "cuda" and size < 0.5 * torch.cuda.mem_get_info(self.policy.device)[0]
        transformer = Transformer(self.config.model, self.policy.device if fits else "cpu")
        with torch.no_grad():
            for name, tensor in {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}.items():
                tensor.copy_(torch.from_numpy(weights[name]))
        return transformer

    def _state(self, step: int, guard: Guard, scale: LossScale | None) -> TrainState:
        return TrainState(step, self.transformer, self.gate, guard, scale)

    def _trained(self) -> list[str]:
        return [name for name, tensor in self.table.items() if tensor.trained]

    def _on_host(self, tensor: Tensor) -> Any:
        return np.array(tensor.detach().cpu().numpy()) if self.place.number == 0 else None

    def _shared(self, values: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """What the first process has, on the device of each."""
        tensor = torch.empty(shape, dtype=dtype, device=self.policy.device)
        if self.place.number == 0:
            tensor.copy_(values if isinstance(values, Tensor) else torch.from_numpy(np.array(values)))
        if tensor.numel():
            dist.broadcast(tensor, 0)
        return tensor

    def _named(self) -> dict[str, Tensor]:
        return {**dict(self.transformer.named_parameters()), **dict(self.transformer.named_buffers())}

    @torch.no_grad()
    def _set_weights(self, pairs: Iterable[tuple[str, Any]]) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        named = self._named()
        for name, values in pairs:
            value, tensor = self._shared(values, self.table[name].shape), named[name]
            if self.stage == 3 and self.table[name].trained:
                if tensor.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
                    tensor.partition()  # type: ignore[attr-defined]
                value, tensor = self._own(tensor, value), tensor.ds_tensor  # type: ignore[attr-defined]
            tensor.data.copy_(value)
        if self.stage:
            self.engine.optimizer.refresh_fp32_params()

    def _set_moments(self, state: State | None, updates: int, is_whole: bool = False) -> None:
        for partition in self._partitions():
            for value in self.gate.state[partition].values():
                value.zero_()
            self.gate.state[partition]["step"].fill_(updates)
        if is_whole:
            for moment, key in ADAM_KEYS.items():
                for name in self._trained():
                    self._set_moment(
                        name, key, self._shared(getattr(state, moment)[name] if state else None, self.table[name].shape)
                    )

    def _set_moment(self, name: str, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        parameter = self._named()[name]
        if self.stage == 0:
            self.gate.state[parameter][key].copy_(value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:  # what would set all of it fails where a tensor is no multiple of the processes
            safe_set_local_optimizer_state(parameter, self._own(parameter, value), key)

    def _own(self, parameter: Any, value: Tensor) -> Tensor:
        """Stage 3: this process's part of a parameter's value [N], filled with zeros at the end."""
        own = parameter.ds_tensor.numel()
        padded_N = torch.cat([value.flatten(), value.new_zeros(own * self.place.processes - value.numel())])
        return padded_N.narrow(0, own * self.place.number, own)

    def _weight(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        tensor = self._named()[name]
        return safe_get_full_fp32_param(tensor) if self.stage == 3 and self.table[name].trained else tensor

    def _moment(self, name: str, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameter = self._named()[name]
        return safe_get_full_optimizer_state(parameter, key) if self.stage else self.gate.state[parameter][key]


# -------------------------------------------------------------------------------------------------------------- the step


def make_train_step(
    zero: Zero, token_bytes: Any = None, dtype: torch.dtype | None = None
) -> Callable[[TrainState, dict[str, Any], Controls], tuple[TrainState, Metrics]]:
    """`lumina_torch.step.make_train_step` for the rows of this process: all make the same step, and have the same metrics.

    What a gradient that is not finite would do is known to DeepSpeed alone in stages 1 to 3, which then drops it, so that the
    gate is never asked: the step counts as one with an infinite norm.
    """
    config, device, gate = zero.config, zero.policy.device, zero.gate
    rate = schedule(config.optim, config.train.steps)
    gradients = make_gradients(config, token_bytes, dtype, device, zero.share)

    def train_step(state: TrainState, batch: dict[str, Any], knobs: Controls) -> tuple[TrainState, Metrics]:
        metrics = gradients(state, place(batch, device, zero.policy.pin_memory), knobs)
        unscale = 1 / state.loss_scale.scale if state.loss_scale else 1.0
        loss, norm, good = float(metrics["loss"]), math.inf, False

        def judge(scaled_norm: float) -> float | None:
            nonlocal norm, good
            norm = scaled_norm * unscale
            good = is_good(config.guard, state.guard, loss, norm)
            return unscale * clip_factor(config.optim.clip_norm, norm) if good and knobs.update else None

        gate.asked, gate.judge, gate.learning_rate = False, judge, rate(state.step) * knobs.learning_rate_scale
        zero.engine.step()
        if knobs.update:
            if good:
                update_biases(config.model, state.transformer, metrics)
            settle(config, state, loss, norm, good)
        state.step += 1
        metrics["gradient_norm"] = torch.tensor(norm, dtype=torch.float32)
        metrics["learning_rate"] = torch.tensor(gate.learning_rate, dtype=torch.float32)
        metrics["skipped"] = torch.tensor(state.guard.skipped, dtype=torch.int32)
        if state.loss_scale:
            metrics["loss_scale"] = torch.tensor(state.loss_scale.scale, dtype=torch.float32)
        return state, metrics

    return train_step


def make_shared_eval_step(
    zero: Zero, token_bytes: Any, dtype: torch.dtype | None = None
) -> Callable[[Transformer, dict[str, Any]], Metrics]:
    """`lumina_torch.step.make_eval_step`, of the rows of all processes; each gives its own."""
    eval_step = make_eval_step(zero.config, token_bytes, dtype, device=zero.policy.device)

    def shared_eval_step(transformer: Transformer, batch: dict[str, Any]) -> Metrics:
        with zero.gathered():
            return totals(eval_step(transformer, batch), zero.share)

    return shared_eval_step
