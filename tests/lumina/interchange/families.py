"""Tiny models of each family, and a directory of one as a user gets it."""

import json

from lumina.config import ModelConfig, MoEConfig
from lumina.interchange import huggingface, safe_tensors
from tests.lumina.interchange.oracle import random_tensors

V, T = 96, 24


def model_config(pattern="none", moe=(), **changes):
    sizes = {"vocab_size": V, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "d_ff": 20, "num_layers": 3}
    routed = {"pattern": pattern, "num_experts": 5, "top_k": 2}
    # Neither theta nor eps is what a format would take for itself, and eps is large enough to tell.
    other = {"rope_theta": 5000.0, "norm_eps": 1e-3, "tie_embeddings": False}
    return ModelConfig(**(sizes | other | changes), moe=MoEConfig(**(routed | dict(moe))))


FAMILIES = {
    "llama": ("llama", model_config()),
    "llama tied": ("llama", model_config(tie_embeddings=True)),
    "llama scaled": ("llama", model_config(tie_embeddings=True, scale_embeddings=True)),
    "llama geglu": ("llama", model_config(activation="geglu")),
    "mixtral": ("mixtral", model_config("all")),
    "mixtral tied geglu": ("mixtral", model_config("all", tie_embeddings=True, activation="geglu")),
    "qwen3 dense": ("qwen3_moe", model_config(qk_norm=True)),
    "qwen3 top-1": ("qwen3_moe", model_config("all", {"top_k": 1}, qk_norm=True)),
    "qwen3 top-2": ("qwen3_moe", model_config("all", qk_norm=True)),
    "qwen3 top-2 as scored": ("qwen3_moe", model_config("all", {"renormalise": False}, qk_norm=True)),
    "qwen3 mixed": ("qwen3_moe", model_config("0,2", qk_norm=True, scale_embeddings=True, d_model=24)),
}


def write(directory, form, model, tensors=None, shard_bytes=safe_tensors.SHARD_BYTES, **changes):
    """A directory with config.json and safetensors, as `lumina export` writes them; `changes` go into config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    model, tensors, _ = huggingface.fold(model, tensors or random_tensors(model))
    values = huggingface.config_json(model, form, T, {}) | changes
    (directory / "config.json").write_text(json.dumps(values))
    found = {piece.theirs: huggingface.to_theirs(piece, tensors[piece.ours]) for piece in huggingface.pieces(model, form)}
    sizes = {name: tensor.nbytes for name, tensor in found.items()}
    safe_tensors.write(directory, sizes, found.__getitem__, shard_bytes)
    return model, tensors
