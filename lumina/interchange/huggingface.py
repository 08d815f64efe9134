"""What maps a model onto the Llama, Mixtral and Qwen3-MoE formats of Hugging Face: names, shapes, config, refusals.

Theirs are [out, in] with heads flattened and one matrix an expert; ours are [in, out] (lumina.architecture.tensor_table).
RoPE rotates halves in both, so that no row changes its place.
D model width, H query heads, K key/value heads, h head width, F feed-forward width, E experts, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import layer_kinds
from lumina.config import ModelConfig, MoEConfig
from lumina.errors import CheckpointError, ConfigError

Named = Mapping[str, np.ndarray]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
# jax.nn.gelu is the tanh approximation; Hugging Face's plain "gelu" is the exact one, 5e-4 away.
HIDDEN_ACTS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
ROPE_THETA = {"llama": 10_000.0, "mixtral": 1_000_000.0, "qwen3_moe": 10_000.0}  # where a config.json names none
NORM_EPS = {"llama": 1e-6, "mixtral": 1e-5, "qwen3_moe": 1e-6}


class Refusal(NamedTuple):
    """Why a format cannot express a model: the field, its value, and what would make it expressible."""

    name: str
    value: Any
    would_work: str


# --------------------------------------------------------------------------------------------------------- refusals


def refusals(model: ModelConfig, biases: Named, form: str) -> list[Refusal]:
    """Everything of `model` that `form` cannot express. `biases` are the router biases by name."""
    moe, kinds = model.moe, layer_kinds(model)
    sparse = [kind.startswith("moe") for kind in kinds]
    found = []

    def refuse(name: str, value: Any, would_work: str) -> None:
        found.append(Refusal(f"model.{name}", value, would_work))

    if any(kind.endswith("+mod") for kind in kinds):
        refuse("mod.pattern", model.mod.pattern, "no format has Mixture-of-Depths; --to canonical keeps it")
    if model.qk_norm and form != "qwen3_moe":
        refuse("qk_norm", True, f"{form} has no norm over heads; --to qwen3_moe has")
    if not model.qk_norm and form == "qwen3_moe":
        other = "llama" if not any(sparse) else "mixtral"
        refuse("qk_norm", False, f"qwen3_moe always has a norm over heads; train with model.qk_norm=true, or try --to {other}")
    if form == "llama" and model.d_model % model.num_heads:
        refuse("num_heads", model.num_heads, f"transformers' Llama wants a divisor of model.d_model = {model.d_model}")
    if form == "llama" and any(sparse):
        refuse("moe.pattern", moe.pattern, "llama has no experts; try --to mixtral or --to qwen3_moe")
    if form == "mixtral" and not all(sparse):
        other = "qwen3_moe" if any(sparse) else "llama"
        refuse("moe.pattern", moe.pattern, f"in mixtral every layer has experts; try --to {other}")
    if any(sparse):
        found += _router_refusals(moe, biases, form)
    return found


def _router_refusals(moe: MoEConfig, biases: Named, form: str) -> Iterator[Refusal]:
    """What neither format, or not this one, can express of the router and experts."""
    for name, plain, would_work in (
        ("score", "softmax", "their routers are softmax"),
        ("temperature", 1.0, "their routers have no temperature"),
        ("route_scale", 1.0, "their gates have no scale"),
        ("shared_experts", 0, "neither mixtral nor qwen3_moe has experts that every token takes"),
        ("noop_experts", 0, "their choices all do work"),
        ("num_groups", 1, "their choice is not limited to groups"),
    ):
        value = getattr(moe, name)
        if value != plain:
            yield Refusal(f"model.moe.{name}", value, f"{would_work}; train with {plain!r}, or use --to canonical")
    largest = max((float(np.max(np.abs(bias))) for bias in biases.values() if np.any(bias)), default=0.0)
    if largest != 0:  # NaN as well
        what = f"biases up to {largest:.3g}"
        yield Refusal(
            "model.moe.bias_rate", moe.bias_rate, f"the router has {what} that no format has; train with 0, or --to canonical"
        )
    if form == "mixtral" and moe.top_k == 1:
        yield Refusal(
            "model.moe.top_k", 1, "mixtral renormalises its gates, which at 1 are then constant; --to qwen3_moe need not"
        )
    if form == "mixtral" and moe.top_k > 1 and not moe.renormalise:
        yield Refusal("model.moe.renormalise", False, "mixtral always renormalises its gates; --to qwen3_moe need not")


def require_expressible(model: ModelConfig, tensors: Named, form: str) -> None:
    """Raise a ConfigError that names everything `form` cannot express, with what would make it expressible."""
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".moe.bias")}
    if found := refusals(model, biases, form):
        told = "; ".join(f"{each.name} = {each.value!r}: {each.would_work}" for each in found)
        raise ConfigError(f"{form} cannot express this model: {told}")


# ----------------------------------------------------------------------------------------------------------- export


class Folded(NamedTuple):
    """What became of the scale of the embedding."""

    scale: float  # what the embedding was multiplied by
    error: float  # largest relative rounding error of an entry; 0 when the scale is a power of two


def fold(model: ModelConfig, tensors: Named) -> tuple[ModelConfig, dict[str, np.ndarray], Folded]:
    """The same model without `scale_embeddings`: sqrt(D) goes into an embedding of its own, untied from the head."""
    named = dict(tensors)
    if not model.scale_embeddings:
        return model, named, Folded(1.0, 0.0)
    weight_VD = named["embedding.weight"]
    scale = np.float32(math.sqrt(model.d_model))
    scaled_VD = weight_VD * scale  # as the model itself computes it in float32
    if model.tie_embeddings:
        named["head.weight"] = np.ascontiguousarray(weight_VD.T)
    named["embedding.weight"] = scaled_VD
    exact_VD = weight_VD.astype(np.float64) * math.sqrt(model.d_model)
    error_VD = np.abs(scaled_VD - exact_VD) / np.maximum(np.abs(exact_VD), np.finfo(np.float32).tiny)
    error = float(np.max(error_VD, initial=0.0))
    return replace(model, scale_embeddings=False, tie_embeddings=False), named, Folded(float(scale), error)


def config_json(model: ModelConfig, form: str, positions: int, control: Mapping[str, int]) -> dict[str, Any]:
    """config.json of the folded `model`.

    Args:
        form: llama, mixtral or qwen3_moe, which can express it.
        positions: T that it was trained with.
        control: ids of the control tokens; empty when they are not known.
    """
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[form]],
        "model_type": form,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": HIDDEN_ACTS[model.activation],
        "max_position_embeddings": positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": control.get("<|document_end|>"),
        "pad_token_id": control.get("<|padding|>"),
        "initializer_range": model.embedding_std,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if form != "mixtral":
        values["attention_bias"] = False
    if form == "llama":
        values["mlp_bias"] = False
    else:
        values |= {"sliding_window": None, "num_experts_per_tok": model.moe.top_k, "output_router_logits": False}
    if form == "mixtral":
        values |= {"num_local_experts": model.moe.num_experts, "router_jitter_noise": 0.0}
    if form == "qwen3_moe":
        kinds = layer_kinds(model)
        values |= {
            "num_experts": model.moe.num_experts,
            "moe_intermediate_size": model.d_ff,
            "norm_topk_prob": model.moe.renormalise and model.moe.top_k > 1,
            "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"],
            "decoder_sparse_step": 1,
            "use_sliding_window": False,
        }
    return values


class Piece(NamedTuple):
    """One tensor of theirs, and where it lies in ours."""

    theirs: str
    ours: str
    expert: int | None  # which of the leading axis of ours
    inputs: int  # how many axes of ours, after an expert's, are the input; 0: a vector, or a table of rows, kept as it is


_FEEDFORWARD = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def pieces(model: ModelConfig, form: str) -> Iterator[Piece]:
    """Every tensor of the folded `model` in `form`, from input to output."""
    yield Piece("model.embed_tokens.weight", "embedding.weight", None, 0)
    for i, kind in enumerate(layer_kinds(model)):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        yield Piece(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.scale", None, 0)
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            yield Piece(f"{theirs}.self_attn.{letter}_proj.weight", f"{ours}.attention.{name}", None, 1)
        yield Piece(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.output", None, 2)
        if model.qk_norm:
            for letter, name in (("q", "query"), ("k", "key")):
                yield Piece(f"{theirs}.self_attn.{letter}_norm.weight", f"{ours}.attention.{name}_norm.scale", None, 0)
        yield Piece(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feedforward_norm.scale", None, 0)
        if kind == "dense":
            for name, projection in _FEEDFORWARD.items():
                yield Piece(f"{theirs}.mlp.{projection}.weight", f"{ours}.feedforward.{name}", None, 1)
            continue
        block, names = ("block_sparse_moe", _MIXTRAL) if form == "mixtral" else ("mlp", _FEEDFORWARD)
        yield Piece(f"{theirs}.{block}.gate.weight", f"{ours}.moe.router", None, 1)
        for j in range(model.moe.num_experts):
            for name, projection in names.items():
                yield Piece(f"{theirs}.{block}.experts.{j}.{projection}.weight", f"{ours}.moe.experts.{name}", j, 1)
    yield Piece("model.norm.weight", "final_norm.scale", None, 0)
    if not model.tie_embeddings:
        yield Piece("lm_head.weight", "head.weight", None, 1)


def to_theirs(piece: Piece, ours: np.ndarray) -> np.ndarray:
    """Their [out, in] matrix of our tensor."""
    tensor = ours if piece.expert is None else ours[piece.expert]
    if not piece.inputs:
        return np.ascontiguousarray(tensor)
    width = math.prod(tensor.shape[: piece.inputs])
    return np.ascontiguousarray(tensor.reshape(width, -1).T)


def to_ours(piece: Piece, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Our [in, out] tensor of `shape`, an expert's without its axis; raises CheckpointError if theirs does not fit."""
    width = math.prod(shape[: piece.inputs])
    expected = (math.prod(shape) // width, width) if piece.inputs else shape
    if theirs.shape != expected:
        raise CheckpointError(f"{piece.theirs}: has shape {list(theirs.shape)}, not {list(expected)} as config.json says")
    return np.ascontiguousarray(theirs.T if piece.inputs else theirs).reshape(shape)
