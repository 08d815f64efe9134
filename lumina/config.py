"""One config for both backends: plain dataclasses, validated in plain words before anything expensive runs.

A config is named by a preset (`b14`), a file (`configs/b14.py`, `my.json`, `my.yaml`), or a run directory, each with an
optional variant (`configs/b7.py:dense`), and changed by flags (`--config.model.num_layers=4`).
"""

import dataclasses
import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from lumina.errors import ConfigError, UsageError
from lumina.stages import heed
from lumina.validation import nearest, validate

PRESET_DIRECTORY = Path(__file__).resolve().parent.parent / "configs"
TOKENIZER = "tokenizer"  # the directory of a tokenizer beside a config
VARIANTS = ("", "dense", "moe", "mod", "hybrid")


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

    source: str = "stdlib"  # stdlib, synthetic, docstrings, files, globs...: separated by commas; a mixture: stdlib@3,a.jsonl@1
    mode: str = "base_only"  # base_only, finetuning_only, hybrid (one stage after the other) or interleaved (rows mixed)
    finetuning: str = "docstrings"  # the second source: of all modes but base_only
    ratio: float = 0.5  # of fine-tuning: hybrid's share of steps, interleaved's share of rows
    stages: str = ""  # in place of a mode: STEPS x LENGTH: MIXTURE; ..., such as 600: stdlib; 300 x 512: stdlib@3, docstrings@1
    rows: str = "stream"  # of texts: stream (chunks, cut anywhere) or packed (whole documents); conversations are packed
    template: str = "lumina"  # how conversations are written: lumina, chatml, instruct or chat
    loss_weights: str = "assistant=1"  # of conversations: what a token of each role counts; roles not named are not learned
    text_field: str = ""  # field of .jsonl records; empty finds text, content, message, body or output
    tokenizer: str = "bpe"  # bpe (trained on the source), gpt2, cl100k_base, o200k_base, or a .model or .json file
    held_out: float = 0.02  # fraction of documents kept for evaluation, chosen by hash
    sequence_length: int = 256  # T: tokens in a row; of several stages, in the longest
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
    moment_dtype: str = "float32"  # of Adam's first moment: float32, or (JAX) bfloat16, which saves a sixth of the state
    offload: bool = False  # JAX: Adam's moments live in the host's memory, and come to the device for the update


@dataclass
class TrainConfig:
    """How long, how much at once, and how precisely."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # B: rows an optimizer step, over all micro-batches
    micro_batches: int = 1  # the batch is computed in this many equal parts
    seed: int = 0  # of initialisation, shuffling, dropout and samples
    compute_dtype: str = "float32"  # float32, bfloat16 or (PyTorch) float16; parameters and optimizer stay float32
    remat: str = "none"  # the backward pass recomputes of each layer: none, full (a third more work), or all but the dots (JAX)
    eval_every: int = 200  # steps; 0 evaluates at the end only
    eval_rows: int = 0  # held-out rows an evaluation reads of each source; 0 is all of them
    early_stopping: int = 0  # evaluations without improvement before stopping, in the last stage; 0 is off


@dataclass
class MeshConfig:
    """How the devices share the work (JAX): the size of each axis, one of which may be -1, the rest of the devices. Nothing in
    the result depends on it but rounding."""

    data: int = -1  # splits the rows of a batch; each part has its own copy of the weights
    fsdp: int = 1  # splits the rows of a batch, and weights, gradients and optimizer, gathered a layer at a time
    expert: int = 1  # splits the rows of a batch, and the experts: tokens travel to them
    context: int = 1  # splits each row, for long ones
    tensor: int = 1  # splits heads and feed-forward width
    auto: bool = False  # where no axis is set: choose them, and train.micro_batches, for the devices and their memory; say why


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
    init_part: str = "auto"  # of it: state (goes on), weights (begins at step 0), or auto (weights for other data)


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
    offload_optimizer: str = "none"  # where the optimizer's state lives besides the device: none or cpu
    offload_parameters: str = "none"  # stage 3: where the weights live: none or cpu
    bucket_size: int = 500_000_000  # elements that are reduced or gathered at once
    overlap: bool = True  # reduce gradients while the backward pass goes on


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


# -------------------------------------------------------------------------------------------------- save and load


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
            raise ConfigError(f"{prefix}{key}: no such field{nearest(key, names)}; {where} has {', '.join(sorted(names))}")
        old = getattr(config, key)
        if f"{prefix}{key}" == "train.remat" and isinstance(value, bool):  # runs from before remat had names
            value = "full" if value else "none"
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
            f"{name}: no such config file, run directory or preset{nearest(name, presets())}; presets: {' '.join(presets())}"
        )
    if path.suffix == ".py":
        if variant not in VARIANTS:
            raise UsageError(f"{spec}: no variant {variant!r}{nearest(variant, VARIANTS)}; there are {', '.join(VARIANTS[1:])}")
        return validate(runpy.run_path(str(path))["get_config"](variant))
    if variant:
        raise UsageError(f"{spec}: only presets and .py files have variants")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a config: {str(error).splitlines()[0]}") from error
    return beside(path.parent, validate(from_dict(values)))


def beside(directory: Path, config: Config) -> Config:
    """`config`, found in `directory`, with a tokenizer that lies there as well named by its path: it may have been moved."""
    own = directory / config.data.tokenizer
    if config.data.tokenizer == TOKENIZER and own.is_dir():
        config.data.tokenizer = str(own.resolve())
    return config


# ------------------------------------------------------------------------------------------------------ overrides


def override(config: Config, flags: list[str]) -> Config:
    """A validated copy of `config` with flags such as `--config.model.num_layers=4` applied; see also `lumina.stages.heed`.

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
    names = {flag[len("--config.") :].partition("=")[0] for flag in flags}
    heed(changed.data, names)
    return validate(changed)


def _check_field(config: Any, dotted: str) -> None:
    node, done = config, ""
    for key in dotted.split("."):
        names = [spec.name for spec in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if key not in names:
            whole = [name for name in _all_fields(config) if name.split(".")[-1] == dotted.split(".")[-1]]
            hint = f" (did you mean {whole[0]}?)" if len(whole) == 1 else nearest(dotted, _all_fields(config))
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
