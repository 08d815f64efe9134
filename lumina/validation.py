"""What a config may hold: every refusal names the field, its value and what would be right."""

import dataclasses
import difflib
import math
from typing import TYPE_CHECKING, Any

from lumina.errors import ConfigError
from lumina.stages import MODES
from lumina.stages import stages as stages_of

if TYPE_CHECKING:
    from lumina.config import Config

SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "cosine_restarts", "wsd")


def nearest(name: str, names: Any) -> str:
    """A suggestion for a name that there is not, or nothing."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _require(holds: bool, name: str, value: Any, would_work: str) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r}: {would_work}")


def layer_pattern(pattern: str, num_layers: int, name: str = "pattern") -> list[bool]:
    """Which of `num_layers` layers a pattern selects.

    `all`; `none`; `interleaved`, every second one, the last included; `every_N`, layers N-1, 2N-1, ...; `sandwich`, all but
    the first two and last two; or layer numbers from 0 such as `1,3,5`. Raises ConfigError for anything else.
    """
    if pattern in ("all", "none"):
        return [pattern == "all"] * num_layers
    if pattern == "interleaved":
        pattern = "every_2"
    if pattern == "sandwich":
        return [2 <= i < num_layers - 2 for i in range(num_layers)]
    if pattern.startswith("every_") and pattern[6:].isdigit() and int(pattern[6:]) > 0:
        every = int(pattern[6:])
        return [i % every == every - 1 for i in range(num_layers)]
    numbers = pattern.split(",")
    _require(
        all(n.strip().isdigit() and int(n) < num_layers for n in numbers),
        name,
        pattern,
        f"must be all, none, interleaved, every_N, sandwich, or layer numbers from 0 to {num_layers - 1} such as 0,1",
    )
    return [i in {int(n) for n in numbers} for i in range(num_layers)]


def _check_types(config: Any, prefix: str) -> None:
    for spec in dataclasses.fields(config):
        value, name = getattr(config, spec.name), prefix + spec.name
        if dataclasses.is_dataclass(value):
            _check_types(value, name + ".")
            continue
        if spec.type is float and type(value) is int:
            value = float(value)
            setattr(config, spec.name, value)
        _require(type(value) is spec.type, name, value, f"must be of type {getattr(spec.type, '__name__', spec.type)}")
        if isinstance(value, float):
            _require(math.isfinite(value), name, value, "must be finite")


def validate(config: "Config") -> "Config":
    """Return `config`, or raise a ConfigError that names the field, its value and what would be right."""
    _check_types(config, "")
    m, moe, mod, d, o, t = config.model, config.model.moe, config.model.mod, config.data, config.optim, config.train
    zero = config.torch.deepspeed
    at_least_1 = {
        "model": (m, "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff"),
        "model.moe": (moe, "num_experts top_k num_groups top_groups"),
        "data": (d, "sequence_length"),
        "optim": (o, "restarts"),
        "train": (t, "steps batch_size micro_batches"),
        "checkpoint": (config.checkpoint, "every backup_every backup_keep"),
        "guard": (config.guard, "max_skips"),
        "torch": (config.torch, "loss_scale loss_scale_window"),
        "torch.deepspeed": (zero, "bucket_size"),
        "monitor": (config.monitor, "log_every sample_tokens"),
    }
    at_least_0 = {
        "model": (m, "embedding_std norm_eps"),
        "model.moe": (moe, "jitter shared_experts balance_weight z_weight bias_rate noop_experts"),
        "model.mod": (mod, "predictor_weight anneal_steps predictor_width"),
        "optim": (o, "learning_rate warmup_steps weight_decay clip_norm"),
        "data": (d, "workers"),
        "train": (t, "seed eval_every eval_rows early_stopping"),
        "checkpoint": (config.checkpoint, "keep_every"),
        "guard": (config.guard, "spike_sigmas max_rewinds hang_seconds"),
        "monitor": (config.monitor, "sample_every"),
    }
    for least, table in ((1, at_least_1), (0, at_least_0)):
        for prefix, (part, names) in table.items():
            for name in names.split():
                value = getattr(part, name)
                _require(value >= least, f"{prefix}.{name}", value, f"must be at least {least}")
    for prefix, part, names in (
        ("model", m, "rope_theta"),
        ("model.moe", moe, "capacity_factor temperature route_scale"),
        ("optim", o, "eps"),
    ):
        for name in names.split():
            _require(getattr(part, name) > 0, f"{prefix}.{name}", getattr(part, name), "must be above 0")
    for prefix, part, name, choices in (
        ("model", m, "activation", ("swiglu", "geglu")),
        ("model", m, "attention_form", ("auto", "reference", "chunked", "splash", "sdpa", "flash")),
        ("model.moe", moe, "score", ("softmax", "sigmoid")),
        ("model.moe", moe, "dispatch", ("capacity", "dropless")),
        ("model.moe", moe, "balance_over", ("row", "micro_batch", "batch")),
        ("model.moe", moe, "grouped_form", ("auto", "blocks", "ragged", "grouped_mm", "loop")),
        ("model.mod", mod, "scope", ("ffn", "block")),
        ("model.mod", mod, "router", ("learned", "random")),
        ("data", d, "mode", MODES),
        ("data", d, "rows", ("stream", "packed")),
        ("optim", o, "schedule", SCHEDULES),
        ("optim", o, "moment_dtype", ("float32", "bfloat16")),
        ("train", t, "compute_dtype", ("float32", "bfloat16", "float16")),
        ("train", t, "remat", ("none", "full", "dots")),
        ("checkpoint", config.checkpoint, "init_part", ("auto", "state", "weights")),
        ("torch", config.torch, "device", ("auto", "cpu", "cuda", "mps")),
        ("torch.deepspeed", zero, "zero_stage", ("off", "auto", "0", "1", "2", "3")),
        ("torch.deepspeed", zero, "offload_optimizer", ("none", "cpu")),
        ("torch.deepspeed", zero, "offload_parameters", ("none", "cpu")),
        ("guard", config.guard, "spike_action", ("skip", "rewind")),
    ):
        value = getattr(part, name)
        _require(value in choices, f"{prefix}.{name}", value, f"must be one of {', '.join(choices)}{nearest(value, choices)}")
    _require(
        m.num_heads % m.num_kv_heads == 0,
        "model.num_heads",
        m.num_heads,
        f"must be a multiple of model.num_kv_heads = {m.num_kv_heads}",
    )
    _require(m.head_dim % 2 == 0, "model.head_dim", m.head_dim, "must be even, because RoPE rotates halves")
    layer_pattern(moe.pattern, m.num_layers, "model.moe.pattern")
    layer_pattern(mod.pattern, m.num_layers, "model.mod.pattern")
    _require(
        moe.top_k <= moe.num_experts, "model.moe.top_k", moe.top_k, f"must be at most model.moe.num_experts = {moe.num_experts}"
    )
    _require(
        moe.num_experts % moe.num_groups == 0,
        "model.moe.num_groups",
        moe.num_groups,
        f"must divide model.moe.num_experts = {moe.num_experts}",
    )
    _require(
        moe.top_groups <= moe.num_groups,
        "model.moe.top_groups",
        moe.top_groups,
        f"must be at most {moe.num_groups}, the num_groups",
    )
    within = moe.top_groups * (moe.num_experts // moe.num_groups)
    _require(moe.top_k <= within, "model.moe.top_k", moe.top_k, f"must be at most {within}, the experts in top_groups groups")
    _require(
        moe.num_groups == 1 or moe.noop_experts == 0,
        "model.moe.noop_experts",
        moe.noop_experts,
        "must be 0 with num_groups above 1, as no-op experts belong to no group",
    )
    for name, value in (("capacity", mod.capacity), ("start_capacity", mod.start_capacity)):
        _require(0 < value <= 1, f"model.mod.{name}", value, "must be above 0 and at most 1")
    _require(
        mod.anneal_steps < t.steps,
        "model.mod.anneal_steps",
        mod.anneal_steps,
        f"must be below train.steps = {t.steps}, or the run ends at another capacity than model.mod.capacity",
    )
    _require(
        mod.anneal_steps == 0 or mod.start_capacity >= mod.capacity,
        "model.mod.start_capacity",
        mod.start_capacity,
        f"must be at least model.mod.capacity = {mod.capacity}, to which it falls",
    )
    _require(
        mod.router == "learned" or mod.predictor_width == 0,
        "model.mod.predictor_width",
        mod.predictor_width,
        "must be 0 with model.mod.router = random, which leaves nothing to predict",
    )
    _require(moe.jitter < 1, "model.moe.jitter", moe.jitter, "must be below 1")
    _require(0 <= m.dropout < 1, "model.dropout", m.dropout, "must be from 0 to below 1")
    _require(d.sequence_length >= 2, "data.sequence_length", d.sequence_length, "must be at least 2")
    _require(0 < d.held_out < 1, "data.held_out", d.held_out, "must be between 0 and 1")
    _require(0 < d.ratio < 1, "data.ratio", d.ratio, "must be between 0 and 1")
    stages_of(config)  # refuses those that cannot be
    _require(
        t.batch_size % t.micro_batches == 0,
        "train.batch_size",
        t.batch_size,
        f"must be a multiple of train.micro_batches = {t.micro_batches}",
    )
    axes = {field.name: getattr(config.mesh, field.name) for field in dataclasses.fields(config.mesh) if field.type is int}
    for name, size in axes.items():
        _require(size == -1 or size >= 1, f"mesh.{name}", size, "must be -1 or at least 1")
    open_axes = [name for name, size in axes.items() if size == -1]
    _require(
        len(open_axes) < 2,
        f"mesh.{open_axes[-1]}" if open_axes else "",
        -1,
        f"mesh.{open_axes[0] if open_axes else ''} is -1 already; one axis takes the rest",
    )
    _require(config.checkpoint.keep >= 2, "checkpoint.keep", config.checkpoint.keep, "must be at least 2, lest one be damaged")
    _require(
        bool(config.checkpoint.backup_dir) or not config.checkpoint.backup_encrypt,
        "checkpoint.backup_encrypt",
        True,
        "needs checkpoint.backup_dir, the place for backups",
    )
    for name in ("offload_optimizer", "offload_parameters"):
        value, stages = getattr(zero, name), ("1", "2", "3", "auto") if name == "offload_optimizer" else ("3", "auto")
        _require(
            value == "none" or zero.zero_stage in stages,
            f"torch.deepspeed.{name}",
            value,
            f"needs torch.deepspeed.zero_stage = {' or '.join(stages)}",
        )
    _require(config.guard.hang_seconds <= 1e6, "guard.hang_seconds", config.guard.hang_seconds, "must be at most 1e6; 0 is off")
    _require(config.guard.spike_window >= 2, "guard.spike_window", config.guard.spike_window, "must be at least 2")
    for name in ("min_ratio", "decay_fraction"):
        value = getattr(o, name)
        _require(0 <= value <= 1, f"optim.{name}", value, "must be from 0 to 1")
    for name in ("beta1", "beta2"):
        value = getattr(o, name)
        _require(0 <= value < 1, f"optim.{name}", value, "must be from 0 to below 1")
    _require(
        o.warmup_steps < t.steps or o.warmup_steps == 0,
        "optim.warmup_steps",
        o.warmup_steps,
        f"must be below train.steps = {t.steps}, as with --config.optim.warmup_steps={t.steps // 10}",
    )
    _require(
        t.early_stopping == 0 or t.eval_every > 0,
        "train.early_stopping",
        t.early_stopping,
        "needs train.eval_every above 0: it counts evaluations",
    )
    return config
