"""One config for both backends: plain dataclasses, validated in plain words before anything expensive runs.

A config is named by a preset (`b14`), a file (`configs/b14.py`, `my.json`, `my.yaml`), or a run directory, each with an
optional variant (`configs/b7.py:dense`), and changed by flags (`--config.model.num_layers=4`).
"""

import dataclasses
import difflib
import json
import math
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from lumina.errors import ConfigError, UsageError

PRESET_DIRECTORY = Path(__file__).resolve().parent.parent / "configs"
VARIANTS = ("", "dense", "moe", "mod", "hybrid")
SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "cosine_restarts", "wsd")


@dataclass(unsafe_hash=True)  # a module may hold it, and modules are keys of compiled functions
class MoEConfig:
    """Mixture-of-Experts feed-forward layers."""

    pattern: str = "none"  # which layers: all, none, interleaved, every_N, sandwich, or a list such as 1,3,5
    num_experts: int = 8  # E
    top_k: int = 1  # experts a token
    capacity_factor: float = 1.25  # capacity dispatch: slots an expert has in a row, times T * top_k / (E + no-ops)
    score: str = "softmax"  # softmax or sigmoid over the router logits
    temperature: float = 1.0  # router logits are divided by it
    jitter: float = 0.0  # training only: router inputs are multiplied by uniform noise in 1 +- jitter
    route_scale: float = 1.0  # gates are multiplied by it
    shared_experts: int = 0  # experts that every token takes, fused into one feed-forward of width shared_experts * d_ff
    balance_weight: float = 0.01  # load-balance loss, averaged over layers; uniform load is 1
    z_weight: float = 0.001  # mean of logsumexp(router logits)^2
    bias_rate: float = 0.0  # loss-free balancing: step of the selection bias after each optimizer step; 0 is off
    dispatch: str = "capacity"  # in training: capacity (what is beyond it is dropped) or dropless; evaluation never drops
    renormalise: bool = True  # gates sum to route_scale over the chosen; never at top_k = 1, where they would be constant
    noop_experts: int = 0  # further choices that do no work: a token decides its own depth, without seeing the future
    num_groups: int = 1  # group-limited choice: the experts in this many equal groups,
    top_groups: int = 1  # of which a token chooses from the best so many only
    balance_over: str = "row"  # whose load the balance loss counts: row, micro_batch, or batch (of several: a third more work)
    grouped_form: str = "auto"  # of the dropless matrix products: auto; JAX: blocks, ragged; PyTorch: grouped_mm, loop


@dataclass(unsafe_hash=True)
class MoDConfig:
    """Mixture-of-Depths: only some tokens of a row take a layer."""

    pattern: str = "none"  # which layers, as in moe.pattern
    capacity: float = 0.75  # c: fraction of a row's tokens that the layer works on in training
    predictor_weight: float = 0.1  # binary cross-entropy that teaches the causal decision, gate > 0.5
    scope: str = "ffn"  # what the others skip: ffn (the feed-forward, dense or MoE) or block (attention as well)
    start_capacity: float = 1.0  # capacity of the first step, where it is annealed
    anneal_steps: int = 0  # steps over which capacity falls from start_capacity, in 8 stages, each compiled; 0 is fixed
    predictor_width: int = 0  # hidden width of a predictor apart from the router for the causal decision; 0 is the router's own
    router: str = "learned"  # learned, or random: the control in experiments, in which nothing learns what to take


@dataclass(unsafe_hash=True)
class ModelConfig:
    """The transformer."""

    vocab_size: int = 1024  # V: rows of the embedding; at least the tokenizer's ids
    d_model: int = 128  # D
    num_layers: int = 2  # L
    num_heads: int = 2  # H: query heads
    num_kv_heads: int = 1  # K: key/value heads; divides num_heads
    head_dim: int = 64  # h: even, as RoPE rotates halves
    d_ff: int = 512  # F: width of one feed-forward, or of one expert
    activation: str = "swiglu"  # swiglu or geglu
    tie_embeddings: bool = True  # the head is the embedding, transposed
    scale_embeddings: bool = False  # multiply the embedding by sqrt(D)
    qk_norm: bool = False  # RMSNorm over each query and key head
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # inside the root of RMSNorm
    dropout: float = 0.0  # training only: on each residual branch
    embedding_std: float = 0.02  # of the embedding's normal initialiser; matrices take 1 / sqrt(fan in)
    attention_form: str = "auto"  # of the inner attention: auto, reference; JAX: chunked, splash; PyTorch: sdpa, flash
    moe: MoEConfig = field(default_factory=MoEConfig)
    mod: MoDConfig = field(default_factory=MoDConfig)


@dataclass
class DataConfig:
    """Text in, rows of tokens out."""

    source: str = "stdlib"  # stdlib, synthetic, or comma-separated .txt and .jsonl files and globs
    text_field: str = ""  # field of .jsonl records; empty finds text, content, message, body or output
    tokenizer: str = "bpe"  # bpe (trained on the source), gpt2, cl100k_base, o200k_base, or a .model or .json file
    held_out: float = 0.02  # fraction of documents kept for evaluation, chosen by hash
    sequence_length: int = 256  # T: tokens in a row
    workers: int = 0  # processes that make batches; 0 makes them in threads
    cache_dir: str = ""  # where token shards are kept; empty is $LUMINA_CACHE or ~/.cache/lumina


@dataclass
class OptimConfig:
    """AdamW and its schedule. Matrices decay; norms, routers' biases and embeddings do not."""

    learning_rate: float = 3e-4  # peak
    schedule: str = "cosine"  # constant, cosine, linear, one_cycle, cosine_restarts or wsd (warm-up, stable, decay)
    warmup_steps: int = 100  # linear, never a step of rate zero
    min_ratio: float = 0.1  # last learning rate over the peak
    decay_fraction: float = 0.2  # wsd: last fraction of the steps, decaying linearly
    restarts: int = 3  # cosine_restarts: cycles after the warm-up
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled: times the learning rate, not through the moments
    clip_norm: float = 1.0  # largest global gradient norm; 0 is off


@dataclass
class TrainConfig:
    """How long, how much at once, and how precisely."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # B: rows an optimizer step, over all micro-batches
    micro_batches: int = 1  # the batch is computed in this many equal parts
    seed: int = 0  # of initialisation, shuffling, dropout and samples
    compute_dtype: str = "float32"  # float32, bfloat16 or (PyTorch) float16; parameters and optimizer stay float32
    remat: bool = False  # recompute each layer in the backward pass: less memory, a third more work
    eval_every: int = 200  # steps; 0 evaluates at the end only
    eval_rows: int = 0  # held-out rows an evaluation reads; 0 is all of them
    early_stopping: int = 0  # evaluations without improvement before stopping; 0 is off


@dataclass
class MeshConfig:
    """How many devices share the work. Nothing in the result depends on it but rounding."""

    data: int = -1  # devices that each take a part of every batch; -1 is all there are


@dataclass
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 200  # steps between checkpoints; the last step always has one
    keep: int = 2  # newest checkpoints kept, at least 2; the best one and pinned ones stay besides
    keep_every: int = 0  # checkpoints of steps that this divides stay for good; 0 keeps none so
    backup_dir: str = ""  # a second place, such as another disk, for copies of the newest checkpoint; empty makes none
    backup_every: int = 1  # a backup after every n-th checkpoint
    backup_keep: int = 2  # newest backups kept
    backup_encrypt: bool = False  # with the passphrase in $LUMINA_BACKUP_PASSPHRASE
    init_from: str = ""  # a run of either backend, or a directory of `lumina export` or `import`, that a new run begins from
    init_part: str = "state"  # of it: state (goes on at its step, with its optimizer) or weights (step 0, a fresh optimizer)


@dataclass
class GuardConfig:
    """What is done about a step that goes wrong. A skipped update leaves all but the step count as it was."""

    spike_sigmas: float = 0.0  # a loss this many standard deviations above the mean of the window is a spike; 0 is off
    spike_window: int = 128  # updates in that window; there are no spikes until it is full
    spike_action: str = "skip"  # skip the update, or rewind to the newest checkpoint and pass over the batches since
    max_skips: int = 5  # updates skipped in a row, spikes or not finite, before the run gives up (exit 93)
    max_rewinds: int = 3  # rewinds before the run gives up
    hang_seconds: float = 1800.0  # a step, or batch of an evaluation, that takes longer ends the process; 0 is off


@dataclass
class MonitorConfig:
    """What a person sees."""

    log_every: int = 10  # steps between records in metrics.jsonl
    sample_every: int = 0  # steps between samples; 0 prints them at the end only
    sample_prompt: str = "def "  # what samples begin with
    sample_tokens: int = 96  # length of a sample
    tensorboard: bool = True  # write TensorBoard events beside metrics.jsonl


@dataclass
class DeepSpeedConfig:
    """How PyTorch's processes share a model; on CUDA, or on CPU with gloo."""

    zero_stage: str = "off"  # off, auto, or what the processes split: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights
    offload_optimizer: str = "none"  # where the optimizer's state lives besides the device: none, cpu or nvme
    offload_parameters: str = "none"  # stage 3: where the weights live: none, cpu or nvme
    nvme_path: str = ""  # directory on a fast disk, for nvme
    bucket_size: int = 500_000_000  # elements that are reduced or gathered at once
    overlap: bool = True  # reduce gradients while the backward pass goes on
    partition_activations: bool = False  # with train.remat: what is kept of each layer is spread over the processes


@dataclass
class TorchConfig:
    """What only lumina_torch reads."""

    device: str = "auto"  # auto, cpu, cuda or mps
    compile: bool = False  # torch.compile of each layer
    loss_scale: float = 65536.0  # float16: the first loss scale; halved by an overflow
    loss_scale_window: int = 2000  # float16: steps without overflow before it doubles
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)


@dataclass
class Config:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    torch: TorchConfig = field(default_factory=TorchConfig)


# ---------------------------------------------------------------------------------------------------- validation


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


def validate(config: Config) -> Config:
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
        ("optim", o, "schedule", SCHEDULES),
        ("train", t, "compute_dtype", ("float32", "bfloat16", "float16")),
        ("checkpoint", config.checkpoint, "init_part", ("state", "weights")),
        ("torch", config.torch, "device", ("auto", "cpu", "cuda", "mps")),
        ("torch.deepspeed", zero, "zero_stage", ("off", "auto", "0", "1", "2", "3")),
        ("torch.deepspeed", zero, "offload_optimizer", ("none", "cpu", "nvme")),
        ("torch.deepspeed", zero, "offload_parameters", ("none", "cpu", "nvme")),
        ("guard", config.guard, "spike_action", ("skip", "rewind")),
    ):
        value = getattr(part, name)
        _require(value in choices, f"{prefix}.{name}", value, f"must be one of {', '.join(choices)}{_nearest(value, choices)}")
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
    _require(
        t.batch_size % t.micro_batches == 0,
        "train.batch_size",
        t.batch_size,
        f"must be a multiple of train.micro_batches = {t.micro_batches}",
    )
    _require(config.mesh.data == -1 or config.mesh.data >= 1, "mesh.data", config.mesh.data, "must be -1 or at least 1")
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
        _require(value != "nvme" or bool(zero.nvme_path), f"torch.deepspeed.{name}", value, "needs torch.deepspeed.nvme_path")
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
        f"must be below train.steps = {t.steps}",
    )
    _require(
        t.early_stopping == 0 or t.eval_every > 0,
        "train.early_stopping",
        t.early_stopping,
        "needs train.eval_every above 0: it counts evaluations",
    )
    return config


# -------------------------------------------------------------------------------------------------- save and load


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dictionaries."""
    return dataclasses.asdict(config)


def from_dict(values: Any, cls: type = Config, prefix: str = "") -> Any:
    """A config from nested dictionaries; missing fields keep their defaults, unknown ones raise a ConfigError."""
    where = prefix.rstrip(".") or "the config"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} = {values!r}: must be a mapping of field to value")
    config = cls()
    names = {spec.name for spec in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"{prefix}{key}: no such field{_nearest(key, names)}; {where} has {', '.join(sorted(names))}")
        old = getattr(config, key)
        setattr(config, key, from_dict(value, type(old), f"{prefix}{key}.") if dataclasses.is_dataclass(old) else value)
    return config


def save(config: Config, path: str | Path) -> None:
    """Write the whole config as JSON, or as YAML when the name ends in .yaml or .yml."""
    path = Path(path)
    values = to_dict(config)
    text = yaml.safe_dump(values, sort_keys=False) if path.suffix in (".yaml", ".yml") else json.dumps(values, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def presets() -> list[str]:
    """Names that `load` takes: auto, and the files in `configs/`."""
    return ["auto", *sorted(path.stem for path in PRESET_DIRECTORY.glob("*.py"))]


def as_variant(config: Config, variant: str) -> Config:
    """`config`, a hybrid, with its Mixture-of-Experts, its Mixture-of-Depths or both taken out, in place.

    Without experts a layer has one feed-forward as wide as the experts that a token took, so active parameters stay equal.
    """
    model = config.model
    if variant in ("moe", "mod", "hybrid") and model.moe.pattern == model.mod.pattern == "none":
        raise ConfigError(f"variant {variant}: this is a dense family; set model.moe.pattern and model.mod.pattern instead")
    if variant in ("dense", "mod"):
        model.d_ff *= model.moe.top_k + model.moe.shared_experts
        model.moe.pattern = "none"
    if variant in ("dense", "moe"):
        model.mod.pattern = "none"
    return config


def load(spec: str) -> Config:
    """The validated config that `spec` names.

    Args:
        spec: a preset name, `auto`, a .py, .json or .yaml file, or a run directory; presets and .py files take `:variant`.

    Raises:
        UsageError: there is no such file or preset.
        ConfigError: it does not hold a valid config.
    """
    name, _, variant = spec.partition(":")
    if name == "auto":
        from lumina.auto import choose

        return choose()
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UsageError(f"{name}: not a run directory, it has no config.json")
    elif not path.is_file() and name in presets()[1:]:
        path = PRESET_DIRECTORY / f"{name}.py"
    if not path.is_file():
        raise UsageError(
            f"{name}: no such config file, run directory or preset{_nearest(name, presets())}; presets: {' '.join(presets())}"
        )
    if path.suffix == ".py":
        if variant not in VARIANTS:
            raise UsageError(
                f"{spec}: no variant {variant!r}{_nearest(variant, VARIANTS)}; there are {', '.join(VARIANTS[1:])}"
            )
        return validate(runpy.run_path(str(path))["get_config"](variant))
    if variant:
        raise UsageError(f"{spec}: only presets and .py files have variants")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {str(error).splitlines()[0]}") from error
    return validate(from_dict(values))


# ------------------------------------------------------------------------------------------------------ overrides


def override(config: Config, flags: list[str]) -> Config:
    """A validated copy of `config` with flags such as `--config.model.num_layers=4` applied.

    Raises:
        ConfigError: a field does not exist (the nearest name is suggested) or the value is not of its type.
        UsageError: a flag is not of this form.
    """
    for flag in flags:
        if not flag.startswith("--config.") or "=" not in flag:
            raise UsageError(f"{flag}: unknown argument; config fields are set as --config.train.steps=100")
        _check_field(config, flag[len("--config.") :].partition("=")[0])
    if not flags:
        return validate(config)
    from absl import flags as absl_flags
    from ml_collections import config_flags

    values = absl_flags.FlagValues()
    # ml_collections looks for overrides in argv, and defines one typed flag for each.
    saved, sys.argv = sys.argv, ["lumina", *flags]
    try:
        config_flags.DEFINE_config_dataclass("config", config, flag_values=values)
        values(sys.argv)
        changed = cast(Config, values["config"].value)
    except (absl_flags.Error, ValueError, TypeError) as error:
        raise ConfigError(str(error).removeprefix("flag --config.")) from error
    finally:
        sys.argv = saved
    return validate(changed)


def _check_field(config: Any, dotted: str) -> None:
    node, done = config, ""
    for key in dotted.split("."):
        names = [spec.name for spec in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if key not in names:
            whole = [name for name in _all_fields(config) if name.split(".")[-1] == dotted.split(".")[-1]]
            hint = f" (did you mean {whole[0]}?)" if len(whole) == 1 else _nearest(dotted, _all_fields(config))
            raise ConfigError(f"{dotted}: no such field{hint}; {done or 'the config'} has {', '.join(names) or 'no fields'}")
        node, done = getattr(node, key), f"{done}.{key}".lstrip(".")
    if dataclasses.is_dataclass(node):
        raise ConfigError(f"{dotted}: is a group of fields; set one of {', '.join(s.name for s in dataclasses.fields(node))}")


def _all_fields(config: Any, prefix: str = "") -> list[str]:
    names = []
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        names += _all_fields(value, f"{prefix}{spec.name}.") if dataclasses.is_dataclass(value) else [prefix + spec.name]
    return names
