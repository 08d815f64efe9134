"""The Llama, Mixtral and Qwen3-MoE formats read back: their config.json as our model, their tensors as ours.

What our model does not compute is refused by name: a file that loads here gives the same logits as in transformers.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lumina.architecture import tensor_table
from lumina.config import Config, ModelConfig, MoEConfig, validate
from lumina.errors import CheckpointError, ConfigError
from lumina.interchange.huggingface import ARCHITECTURES, HIDDEN_ACTS, NORM_EPS, ROPE_THETA, Piece, pieces, to_ours

_PLAIN_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def model_of(values: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes. Raises ConfigError, naming what our model does not have or compute."""
    form = values.get("model_type")
    if form not in ARCHITECTURES:
        raise ConfigError(f"model_type = {form!r}: must be one of {', '.join(ARCHITECTURES)}")
    try:
        return _model_of(values, form)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a value of another type than a field's
        raise ConfigError(f"config.json: cannot be read as that of a {form} model: {error}") from error


def _model_of(values: dict[str, Any], form: str) -> ModelConfig:
    if found := list(_refusals(values, form)):
        raise ConfigError(f"this {form} model cannot be imported: {'; '.join(found)}")
    acts = {act: activation for activation, act in HIDDEN_ACTS.items()}
    heads = _whole(values, "num_attention_heads")
    layers = _whole(values, "num_hidden_layers")
    width = _whole(values, "hidden_size")
    model = ModelConfig(
        vocab_size=_whole(values, "vocab_size"),
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_whole(values, "num_key_value_heads", heads),
        head_dim=_whole(values, "head_dim", width // heads),
        activation=acts[values.get("hidden_act", "silu")],
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        scale_embeddings=False,
        qk_norm=form == "qwen3_moe",
        rope_theta=float(_rope(values).get("rope_theta", values.get("rope_theta") or ROPE_THETA[form])),
        norm_eps=float(values.get("rms_norm_eps", NORM_EPS[form])),
        moe=_experts(values, form, layers),
    )
    model.d_ff = _whole(values, "intermediate_size")
    if form == "qwen3_moe" and model.moe.pattern != "none":
        model.d_ff = _whole(values, "moe_intermediate_size")
    return validate(Config(model=model)).model


def _experts(values: dict[str, Any], form: str, layers: int) -> MoEConfig:
    if form == "llama":
        return MoEConfig()
    sparse = _sparse_layers(values, layers) if form == "qwen3_moe" else list(range(layers))
    top_k = _whole(values, "num_experts_per_tok")
    moe = MoEConfig(
        pattern="all" if len(sparse) == layers else ",".join(map(str, sparse)) or "none",
        num_experts=_number_of_experts(values),
        top_k=top_k,
        dispatch="dropless",
        renormalise=True if form == "mixtral" else bool(values.get("norm_topk_prob", False)),
    )
    return MoEConfig() if moe.pattern == "none" else moe


def _number_of_experts(values: dict[str, Any]) -> int:
    return _whole(values, "num_local_experts" if "num_local_experts" in values else "num_experts")


def _sparse_layers(values: dict[str, Any], layers: int) -> list[int]:
    every, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    return [i for i in range(layers) if i not in dense and (i + 1) % every == 0]


def _refusals(values: dict[str, Any], form: str) -> Iterator[str]:
    """What our model does not have or compute, each as `name = value: why`."""
    rope = _rope(values)
    if set(rope) - _PLAIN_ROPE or rope.get("rope_type", rope.get("type", "default")) != "default":
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        yield f"{name} = {rope!r}: only plain RoPE is computed"
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        yield f"partial_rotary_factor = {partial!r}: whole heads are rotated"
    if values.get("sliding_window") is not None and (form != "qwen3_moe" or values.get("use_sliding_window")):
        yield f"sliding_window = {values['sliding_window']!r}: attention sees the whole document"
    if kinds := set(values.get("layer_types") or []) - {"full_attention"}:
        yield f"layer_types = {sorted(map(str, kinds))}: attention sees the whole document"
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if values.get(name):
            yield f"{name} = {values[name]!r}: there is none"
    act = values.get("hidden_act", "silu")
    if act not in HIDDEN_ACTS.values():
        yield f"hidden_act = {act!r}: must be {' or '.join(HIDDEN_ACTS.values())}"
    if form == "llama":
        return
    top_k = values.get("num_experts_per_tok")
    if top_k == 1 and (form == "mixtral" or values.get("norm_topk_prob")):
        yield "num_experts_per_tok = 1: with gates that are renormalised, and so constant; ours at 1 are not"
    if form == "qwen3_moe":
        sparse, layers = _sparse_layers(values, _whole(values, "num_hidden_layers")), _whole(values, "num_hidden_layers")
        dense, expert = values.get("intermediate_size"), values.get("moe_intermediate_size")
        if 0 < len(sparse) < layers and dense != expert:
            yield f"intermediate_size = {dense!r}: must be moe_intermediate_size = {expert!r}, as all our layers are as wide"


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters = {rope!r}: must be a mapping")
    return rope


def _whole(values: dict[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {name} = {value!r}: must be a whole number of at least 1")
    return value


def canonical(
    model: ModelConfig, form: str, names: Iterable[str], load: Callable[[list[str]], Iterable[tuple[str, np.ndarray]]]
) -> dict[str, np.ndarray]:
    """Our tensors, float32, of a checkpoint with `names`, whose tensors `load` yields in an order of its own.

    Raises CheckpointError for a tensor that is missing, unknown, or of another shape than config.json says.
    """
    wanted = {piece.theirs: piece for piece in pieces(model, form)}
    present = set(names)
    # A tied head may be saved once more, and some tools save what RoPE is computed from.
    known = wanted.keys() | ({"lm_head.weight"} if model.tie_embeddings else set())
    unknown = sorted(name for name in present - known if not name.endswith(".rotary_emb.inv_freq"))
    if missing := sorted(wanted.keys() - present):
        raise CheckpointError(f"{missing[0]}: is missing, with {len(missing) - 1} others; config.json asks for it")
    if unknown:
        raise CheckpointError(f"{unknown[0]}: is a tensor that a {form} model of this config.json does not have")
    table = {tensor.name: tensor for tensor in tensor_table(model)}
    ours = {name: np.zeros(tensor.shape, np.float32) for name, tensor in table.items() if not tensor.trained}
    for name, theirs in load(list(wanted)):
        _place(ours, wanted[name], theirs, table[wanted[name].ours].shape)
    if model.tie_embeddings and "lm_head.weight" in present:
        _require_tied(ours["embedding.weight"], load)
    return {name: ours[name] for name in table}


def _place(ours: dict[str, np.ndarray], piece: Piece, theirs: np.ndarray, shape: tuple[int, ...]) -> None:
    if not np.isfinite(theirs).all():
        raise CheckpointError(f"{piece.theirs}: holds numbers that are not finite")
    if piece.expert is None:
        ours[piece.ours] = to_ours(piece, theirs, shape)
        return
    if piece.ours not in ours:
        ours[piece.ours] = np.empty(shape, np.float32)
    ours[piece.ours][piece.expert] = to_ours(piece, theirs, shape[1:])


def _require_tied(embedding_VD: np.ndarray, load: Callable[[list[str]], Iterable[tuple[str, np.ndarray]]]) -> None:
    for _, head_VD in load(["lm_head.weight"]):
        if not np.array_equal(head_VD, embedding_VD):
            raise CheckpointError("lm_head.weight: differs from the embedding, though tie_word_embeddings is true")
