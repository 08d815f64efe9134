"""One optimizer step and one evaluation step, on a state that they change in place.

B rows, T positions, M micro-batches, L layers that route, A alternatives of a router, W losses remembered.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lumina.architecture import capacity, layer_kinds
from lumina.config import Config, GuardConfig, ModelConfig
from lumina_torch.device import place
from lumina_torch.draw import Draw
from lumina_torch.loss import cross_entropy
from lumina_torch.model import CAUSAL, TRAINING, Mode, Transformer, create
from lumina_torch.moe import balance_loss
from lumina_torch.optimizer import clip_factor, global_norm, gradients_of, make_optimizer, schedule, update

Batch = dict[str, Tensor]  # inputs, targets, weights, segments, positions, each [B, T]
Metrics = dict[str, Any]  # tensors, which may still be computed, and groups of them


class Guard(NamedTuple):
    """What tells a good update from a bad one. Part of the state, so that a resumed run decides as it would have."""

    losses_W: np.ndarray  # float32: of the last updates that were made, all finite; NaN where there is none yet
    skipped: int  # updates skipped in a row


class LossScale(NamedTuple):
    """float16: gradients are formed this much larger, lest small ones become zero. Part of the state, as the guard."""

    scale: float
    good_steps: int  # updates made since it last changed

    def after_update(self, window: int) -> "LossScale":
        """Doubled after `window` updates without an overflow."""
        return LossScale(2 * self.scale, 0) if self.good_steps + 1 >= window else LossScale(self.scale, self.good_steps + 1)


@dataclass
class TrainState:
    """All that a step changes. Random numbers derive from (seed, step); none are stored."""

    step: int  # batches consumed
    transformer: Transformer
    optimizer: torch.optim.Optimizer
    guard: Guard
    loss_scale: LossScale | None  # of float16 only


class Controls(NamedTuple):
    """What may be turned while running."""

    learning_rate_scale: float
    balance_weight: float
    z_weight: float
    predictor_weight: float
    update: bool  # False passes over the batch
    stop_N: Any  # int32, by process: it was asked to stop; each learns of all


def controls(config: Config, update: bool = True, stop_N: Any = None) -> Controls:
    """The controls as the config sets them."""
    moe, mod = config.model.moe, config.model.mod
    stop_N = np.zeros(1, np.int32) if stop_N is None else stop_N
    return Controls(1.0, moe.balance_weight, moe.z_weight, mod.predictor_weight, update, stop_N)


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _directly(transformer: Transformer, function: Callable[..., Any], *rest: Any) -> Any:
    return function(transformer, *rest)


class Share(NamedTuple):
    """What of a step one process does, of several that make it together."""

    part: tuple[int, int] = (0, 1)  # its number from 0, and how many there are; each has as many rows
    total: Callable[[Tensor], Tensor] = _alone  # the sum of what each has
    run: Callable[..., Any] = _directly  # (transformer, function, *rest) -> function(transformer, *rest)
    backward: Callable[[Tensor], Any] = Tensor.backward


ALONE = Share()


def init_state(config: Config, device: torch.device | str = "cpu") -> TrainState:
    """A fresh state on `device`; with `config.torch.compile` its layers are compiled when they first run."""
    transformer = create(config.model, config.train.seed, device)
    if config.torch.compile:
        compile_blocks(transformer)
    guard = Guard(np.full(config.guard.spike_window, np.nan, np.float32), 0)
    scale = LossScale(config.torch.loss_scale, 0) if config.train.compute_dtype == "float16" else None
    return TrainState(0, transformer, make_optimizer(config, transformer), guard, scale)


def compile_blocks(transformer: Transformer) -> None:
    """torch.compile of each layer's forward and backward; names of parameters stay.

    The whole model is not compiled at once: its layers are alike, and one program serves those of a kind. Where a shape
    depends on data (dropless experts, causal depth routing, whose tokens are counted at run time) the program is cut, and
    that part runs as without compiling. Caches of generation grow, so that a layer is compiled anew until PyTorch gives up
    and runs it as is.
    """
    for block in transformer.blocks:
        block.compile()


def make_train_step(
    config: Config,
    token_bytes: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    pin_memory: bool = False,
) -> Callable[[TrainState, dict[str, Any], Controls], tuple[TrainState, Metrics]]:
    """train_step(state, batch, controls) -> (state, metrics): changes `state` and returns it.

    The loss is the weighted sum over the whole batch divided by its weight, whatever the micro-batches; router losses are means
    over the tokens that a router sees, empty positions left out. Both are sums of parts that already carry their share, so
    gradients simply add.

    A loss or gradient that is not finite, or a spike (`config.guard`), makes no update: of the state only `step` and the
    guard's count change. `metrics` has `skipped`, how many in a row, and `stop`, how many processes were asked to. With
    float16, a finite loss whose gradients are not has overflowed its scale: that is halved instead, and counted as a skip only
    once it cannot be.

    Args:
        token_bytes: int [V], bytes of text a token stands for; `metrics` then has `text_bytes` of the targets, and
            `text_tokens`, how many there are.
        dtype: overrides the config's compute dtype.
        device: where the state is, and where batches, of numpy arrays or tensors, are brought.
        pin_memory: batches are copied while the device works.
    """
    device, rate = torch.device(device), schedule(config.optim, config.train.steps)
    gradients = make_gradients(config, token_bytes, dtype, device)

    def train_step(state: TrainState, batch: dict[str, Any], knobs: Controls) -> tuple[TrainState, Metrics]:
        metrics = gradients(state, place(batch, device, pin_memory), knobs)
        grads = gradients_of(state.optimizer)
        unscale = 1 / state.loss_scale.scale if state.loss_scale else 1.0
        metrics["gradient_norm"] = global_norm(grads) * unscale
        learning_rate = rate(state.step) * knobs.learning_rate_scale
        metrics["learning_rate"] = torch.tensor(learning_rate, dtype=torch.float32)
        loss, norm = torch.stack([metrics["loss"], metrics["gradient_norm"]]).tolist()  # the one wait for the device
        good = is_good(config.guard, state.guard, loss, norm)
        if knobs.update:
            if good:
                update(state.optimizer, learning_rate, unscale * clip_factor(config.optim.clip_norm, norm))
                update_biases(config.model, state.transformer, metrics)
            settle(config, state, loss, norm, good)
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        metrics["skipped"] = torch.tensor(state.guard.skipped, dtype=torch.int32)
        if state.loss_scale:
            metrics["loss_scale"] = torch.tensor(state.loss_scale.scale, dtype=torch.float32)
        return state, metrics

    return train_step


def settle(config: Config, state: TrainState, loss: float, norm: float, good: bool) -> None:
    """What the state remembers of an update that was made, or else not."""
    scale = state.loss_scale
    if good:
        state.loss_scale = scale and scale.after_update(config.torch.loss_scale_window)
    elif scale and math.isfinite(loss) and not math.isfinite(norm) and scale.scale >= 2:
        state.loss_scale = LossScale(scale.scale / 2, 0)
        return
    state.guard = remember(state.guard, loss, made=good, skipped=not good)


# ----------------------------------------------------------------------------------------------------------- gradients


def make_gradients(
    config: Config, token_bytes: Any, dtype: torch.dtype | None, device: torch.device, share: Share = ALONE
) -> Callable[[TrainState, Batch, Controls], Metrics]:
    """gradients(state, batch, controls) -> metrics: adds the batch's gradients, times the loss scale, to every `.grad`.

    Arguments as in `make_train_step`. The state stays as it is. With a `share`, `batch` has the rows of this process, its
    gradients are its part of the sum, and the metrics are those of all.
    """
    dtype, M = dtype or getattr(torch, config.train.compute_dtype), config.train.micro_batches
    token_bytes_V = None if token_bytes is None else torch.as_tensor(np.asarray(token_bytes, np.int64), device=device)
    random = config.model.dropout > 0 or config.model.moe.jitter > 0
    kinds = layer_kinds(config.model)
    routes, has_experts = any(kind != "dense" for kind in kinds), any(kind.startswith("moe") for kind in kinds)
    balance_over, (number, _) = config.model.moe.balance_over, share.part
    if balance_over == "batch" and M == 1:
        balance_over = "micro_batch"

    def hidden(transformer: Transformer, micro: Batch, draw: Draw | None) -> tuple[Tensor, Metrics]:
        rows = (micro["inputs"], micro["segments"], micro["positions"])
        hidden_BTD, metrics, _ = transformer(*rows, dtype=dtype, mode=TRAINING, remat=config.train.remat == "full", draw=draw)
        return hidden_BTD, metrics

    def micro_loss(
        transformer: Transformer, micro: Batch, of_batch: Any, knobs: Controls, draw: Draw | None, load_LA: Tensor | None
    ) -> tuple[Tensor, Metrics]:
        weight, tokens = of_batch
        hidden_BTD, by_row = hidden(transformer, micro, draw)
        metrics = _summarise(by_row, micro["segments"] >= 0, tokens, balance_over, load_LA, share)
        flat_ND, targets_N = hidden_BTD.flatten(0, 1), micro["targets"].flatten()
        sums = cross_entropy(flat_ND, transformer.head_DV(dtype), targets_N, micro["weights"].flatten())
        loss = sums.loss / weight
        return loss + _auxiliary(metrics, knobs), {"loss": loss, "accuracy": sums.correct / weight, **metrics}

    def gradients(state: TrainState, batch: Batch, knobs: Controls) -> Metrics:
        tokens = _tokens(state.transformer, batch["segments"], share) if routes else None
        of_batch = share.total(batch["weights"].sum()), tokens
        B = batch["inputs"].shape[0]
        rows = range(number * B, (number + 1) * B)
        # Every M-th row: so a micro-batch has the same rows on any number of processes.
        micros = [{name: array[m::M] for name, array in batch.items()} for m in range(M)]
        draws = [Draw(config.train.seed, state.step, tuple(rows[m::M])) if random else None for m in range(M)]
        batch_load_LA = None
        if balance_over == "batch" and has_experts:  # known only when every row has been routed once
            with torch.no_grad():
                parts = [share.run(state.transformer, hidden, *part)[1] for part in zip(micros, draws, strict=True)]
            batch_load_LA = share.total(torch.cat([part["moe"]["load_BA"] for part in parts], dim=1).sum(1))
        scale = state.loss_scale.scale if state.loss_scale else 1.0
        total: Metrics = {}
        for micro, draw in zip(micros, draws, strict=True):
            objective, metrics = share.run(state.transformer, micro_loss, micro, of_batch, knobs, draw, batch_load_LA)
            share.backward(objective * scale)
            metrics = _each(Tensor.detach, metrics)
            total = _each(torch.add, total, metrics) if total else metrics
        total["stop"] = torch.tensor(int(np.sum(knobs.stop_N)), dtype=torch.int32)
        if token_bytes_V is not None:
            total["text_bytes"] = _text_bytes(token_bytes_V, batch)
            total["text_tokens"] = (batch["weights"] > 0).sum()
        return totals(total, share)

    return gradients


def _each(function: Callable[..., Any], *trees: Metrics) -> Metrics:
    """`function` of each tensor, or of tensors of one name."""
    return {
        name: _each(function, *(tree[name] for tree in trees)) if isinstance(of, dict) else function(*(t[name] for t in trees))
        for name, of in trees[0].items()
    }


def totals(metrics: Metrics, share: Share) -> Metrics:
    """The sums over all processes, by one reduction; whole numbers below 2^53 stay exact."""
    if share.part[1] == 1:
        return metrics
    leaves: list[Tensor] = []
    _each(leaves.append, metrics)
    device = max((a.device for a in leaves), key=lambda device: device.type != "cpu")
    flat_N = share.total(torch.cat([a.detach().reshape(-1).to(device, torch.float64) for a in leaves]))
    parts = iter(flat_N.split([a.numel() for a in leaves]))
    return _each(lambda a: next(parts).reshape(a.shape).to(a.dtype), metrics)


def _auxiliary(metrics: Metrics, knobs: Controls) -> Tensor | float:
    """The router losses, each the mean over the layers that have it, weighted."""
    total: Tensor | float = 0.0
    if "moe" in metrics:
        total = total + knobs.balance_weight * metrics["moe"]["balance_loss"].mean()
        total = total + knobs.z_weight * metrics["moe"]["z_loss"].mean()
    if "mod" in metrics:
        total = total + knobs.predictor_weight * metrics["mod"]["predictor_loss"].mean()
    return total


class Tokens(NamedTuple):
    """How many tokens of the whole batch each router sees; at least 1, as they divide sums."""

    experts_L: Tensor  # of the layers that have experts
    depth: Tensor  # of every layer that has a depth router


def _tokens(transformer: Transformer, segments_BT: Tensor, share: Share) -> Tokens:
    """From a process's rows. Positions in a segment count, and of those as many as depth routers select for experts."""
    real_B = (segments_BT >= 0).sum(1)

    def seen(block: Any) -> Tensor:
        return real_B.clamp(max=capacity(segments_BT.shape[1], block.mod.mod.capacity)) if hasattr(block, "mod") else real_B

    counts = [real_B, *(seen(block) for block in transformer.blocks if hasattr(block, "moe"))]
    depth, *experts = share.total(torch.stack([count_B.sum() for count_B in counts])).clamp(min=1)
    return Tokens(torch.stack(experts) if experts else depth[None], depth)


def _summarise(
    metrics: Metrics, real_BT: Tensor, tokens: Any, balance_over: str, batch_load_LA: Tensor | None, share: Share
) -> Metrics:
    """Metrics by layer from what the layers tell: counts, and parts of means over all tokens of the batch, of these rows.

    Loads are counted over `balance_over` for the balance loss.
    """
    summary: Metrics = {}
    if "moe" in metrics:
        experts = metrics["moe"]
        load_LBA, share_LBA = experts["load_BA"], experts["share_BA"]
        load_LA = load_LBA.sum(1)
        if balance_over == "micro_batch":
            load_LBA = share.total(load_LA)[:, None]
        elif balance_over == "batch" and batch_load_LA is not None:
            load_LBA = batch_load_LA[:, None]
        sums = {
            "balance_loss": balance_loss(load_LBA.to(share_LBA.dtype), share_LBA),  # counts would divide into float32
            **{name: experts[name] for name in ("z_loss", "entropy", "dropped")},
        }
        summary["moe"] = {"load_A": load_LA, **_each(lambda sum_L: sum_L / tokens.experts_L, sums)}
    if "mod" in metrics:
        depth = metrics["mod"]
        decided_LBT = depth["logit_BT"] > 0
        sums = {
            "predictor_loss": depth["predictor_loss"],
            "causal_capacity": (decided_LBT & real_BT).sum((1, 2)).float(),
            "agreement": ((decided_LBT == depth["taken_BT"]) & real_BT).sum((1, 2)).float(),
        }
        summary["mod"] = _each(lambda sum_L: sum_L / tokens.depth, sums)
    return summary


def _text_bytes(token_bytes_V: Tensor, batch: Batch) -> Tensor:
    return (token_bytes_V[batch["targets"]] * (batch["weights"] > 0)).sum()


# --------------------------------------------------------------------------------------------------- guard and biases


def is_good(config: GuardConfig, guard: Guard, loss: float, gradient_norm: float) -> bool:
    """Whether an update with this loss and gradient is to be made: both finite, and the loss no spike over a full window."""
    good = math.isfinite(loss) and math.isfinite(gradient_norm)
    if config.spike_sigmas:  # comparisons with NaN are false: before the window is full there are no spikes
        limit = np.mean(guard.losses_W) + np.float32(config.spike_sigmas) * np.std(guard.losses_W)
        good = good and not loss > limit
    return bool(good)


def remember(guard: Guard, loss: float, made: bool, skipped: bool) -> Guard:
    """The guard after an update that was made, skipped, or (neither) passed over."""
    if made:
        return Guard(np.append(guard.losses_W[1:], np.float32(loss)), 0)
    return Guard(guard.losses_W, guard.skipped + skipped)


@torch.no_grad()
def update_biases(model: ModelConfig, transformer: Transformer, metrics: Metrics) -> None:
    """Loss-free balancing (Wang et al., 2024): bias += rate * sign(mean load - load), centred; load is the whole batch's."""
    if not model.moe.bias_rate or "moe" not in metrics:
        return
    load_LA = metrics["moe"]["load_A"]  # the layers that have experts, in order
    # Whole numbers, so that a tie is one on any machine.
    change_LA = model.moe.bias_rate * torch.sign(load_LA.sum(-1, keepdim=True) - load_LA.shape[-1] * load_LA).float()
    change_LA -= change_LA.mean(-1, keepdim=True)
    biases = dict(transformer.named_buffers())
    moe_layers = [i for i, kind in enumerate(layer_kinds(model)) if kind.startswith("moe")]
    for layer, change_A in zip(moe_layers, change_LA, strict=True):
        biases[f"blocks.{layer}.moe.bias"] += change_A


# ---------------------------------------------------------------------------------------------------------- evaluation


def make_eval_step(
    config: Config,
    token_bytes: Any,
    dtype: torch.dtype | None = None,
    mode: Mode = CAUSAL,
    device: torch.device | str = "cpu",
) -> Callable[[Transformer, dict[str, Any]], dict[str, Tensor]]:
    """eval_step(transformer, batch) -> sums over tokens: loss, correct, weight, text_bytes and those that each MoD layer takes.

    Routing is causal and nothing is dropped, as in generation. Arguments as in `make_train_step`.
    """
    dtype, device = dtype or getattr(torch, config.train.compute_dtype), torch.device(device)
    token_bytes_V = torch.as_tensor(np.asarray(token_bytes, np.int64), device=device)

    @torch.no_grad()
    def eval_step(transformer: Transformer, batch: dict[str, Any]) -> dict[str, Tensor]:
        batch = place(batch, device)
        rows = (batch["inputs"], batch["segments"], batch["positions"])
        hidden_BTD, metrics, _ = transformer(*rows, dtype=dtype, mode=mode)
        flat_ND, targets_N = hidden_BTD.flatten(0, 1), batch["targets"].flatten()
        sums = cross_entropy(flat_ND, transformer.head_DV(dtype), targets_N, batch["weights"].flatten())
        taken_LBT = metrics["mod"]["taken_BT"] if "mod" in metrics else batch["weights"].new_zeros((0, *rows[0].shape))
        return {
            "loss": sums.loss,
            "correct": sums.correct,
            "weight": batch["weights"].sum(),
            "taken_L": (taken_LBT * batch["weights"]).sum((1, 2)),
            "text_bytes": _text_bytes(token_bytes_V, batch),
        }

    return eval_step
