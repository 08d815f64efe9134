"""AdamW, clipping and learning-rate schedules, from optax."""

from itertools import pairwise
from typing import Any

import jax
import optax

from lumina.architecture import layer_kinds, layer_plan, tensor_table
from lumina.config import Config, OptimConfig
from lumina_jax.model import canonical_names


def schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update n = 0, 1, ..., steps - 1.

    The warm-up gives peak * (n + 1) / warmup_steps, so that no update has rate zero, and one_cycle rises from peak / 25 on a
    cosine. All but `constant` end near min_ratio * peak.
    """
    peak, warmup, last = optim.learning_rate, optim.warmup_steps, optim.learning_rate * optim.min_ratio
    rest = max(1, steps - warmup)
    if optim.schedule == "one_cycle":
        if not warmup:
            return optax.cosine_decay_schedule(peak, rest, optim.min_ratio)
        return optax.piecewise_interpolate_schedule("cosine", peak / 25, {warmup: 25.0, steps: optim.min_ratio})
    if optim.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, optim.min_ratio)
    elif optim.schedule == "linear":
        after = optax.linear_schedule(peak, last, rest)
    elif optim.schedule == "cosine_restarts":  # SGDR without growing cycles (Loshchilov and Hutter, 2017)
        starts = [round(rest * i / optim.restarts) for i in range(optim.restarts + 1)]
        cycles = [optax.cosine_decay_schedule(peak, max(1, b - a), optim.min_ratio) for a, b in pairwise(starts)]
        after = optax.join_schedules(cycles, starts[1:-1])
    else:  # wsd: warm-up, stable, decay (MiniCPM, section 4)
        decay = min(rest, max(1, round(steps * optim.decay_fraction)))
        stable = rest - decay
        after = optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, last, decay)], [stable])
    if not warmup:
        return after
    return optax.join_schedules([lambda n: peak * (n + 1) / warmup, after], [warmup])


def decay_mask(config: Config, params: Any) -> Any:
    """True for the leaves of `params` that the table of tensors marks as decayed."""
    decayed = {tensor.name: tensor.decayed for tensor in tensor_table(config.model)}
    plan = layer_plan(layer_kinds(config.model))
    return jax.tree_util.tree_map_with_path(lambda path, _: decayed[canonical_names(plan, path)[0]], params)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Everything up to the learning rate, which `train_step` applies: clip, Adam direction, decoupled decay (AdamW)."""
    optim = config.optim
    first_moment = None if optim.moment_dtype == "float32" else optim.moment_dtype  # None: as the parameters
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps, mu_dtype=first_moment),
        optax.add_decayed_weights(optim.weight_decay, mask=lambda params: decay_mask(config, params)),
    )
