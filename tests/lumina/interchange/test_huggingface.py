"""The mapping onto Llama, Mixtral and Qwen3-MoE, against transformers and an oracle of loops."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from lumina.architecture import tensor_table
from lumina.errors import ConfigError
from lumina.interchange import huggingface as hf
from tests.lumina.interchange.families import FAMILIES, T, V, model_config, write
from tests.lumina.interchange.oracle import logits_TV, random_tensors

torch.set_num_threads(1)
IDS = np.random.default_rng(1).integers(0, V, T)


def load(directory):
    """What transformers makes of a directory, with every tensor found and none left over."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    return model.eval()


def difference(directory, model, tensors):
    """Largest difference of logits, over the largest logit."""
    ours = logits_TV(model, tensors, IDS)
    with torch.no_grad():
        theirs = load(directory)(torch.tensor(IDS)[None]).logits[0].numpy()
    return np.max(np.abs(ours - theirs)) / np.max(np.abs(ours))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same_logits(name, tmp_path):
    form, model = FAMILIES[name]
    tensors = random_tensors(model)
    hf.require_expressible(model, tensors, form)
    write(tmp_path, form, model, tensors)
    assert difference(tmp_path, model, tensors) < 1e-5


def test_shards_are_loaded_as_one(tmp_path):
    form, model = FAMILIES["mixtral"]
    tensors = random_tensors(model)
    write(tmp_path, form, model, tensors, shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 5
    assert files == {path.name for path in tmp_path.glob("*.safetensors")}
    trained = sum(tensor.size for tensor in tensor_table(model) if tensor.trained)
    assert index["metadata"]["total_size"] == 4 * trained
    assert difference(tmp_path, model, tensors) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_are_those_that_transformers_saves(name, tmp_path):
    from safetensors import safe_open

    form, model = FAMILIES[name]
    write(tmp_path / "ours", form, model)
    load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (safe_open(tmp_path / side / "model.safetensors", "np") for side in ("ours", "theirs"))
    with ours as ours, theirs as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        assert all(np.array_equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in ours.keys())  # noqa: SIM118


def test_a_scale_that_is_a_power_of_two_folds_exactly():
    model = model_config(tie_embeddings=True, scale_embeddings=True, d_model=64)
    tensors = random_tensors(model)
    folded, named, about = hf.fold(model, tensors)
    assert about == (8.0, 0.0)
    assert not folded.tie_embeddings
    assert not folded.scale_embeddings
    assert np.array_equal(named["embedding.weight"], 8 * tensors["embedding.weight"])
    assert np.array_equal(named["head.weight"], tensors["embedding.weight"].T)


def test_the_error_of_another_scale_is_told():
    model = model_config(tie_embeddings=False, scale_embeddings=True, d_model=24)
    tensors = random_tensors(model)
    _, named, about = hf.fold(model, tensors)
    assert about.scale == np.float32(math.sqrt(24))
    assert 0 < about.error < 2e-7  # two roundings of half a unit in the last place
    assert np.array_equal(named["head.weight"], tensors["head.weight"])


REFUSED = {
    "depth": ("llama", model_config(), {"mod.pattern": "all"}, "model.mod.pattern = 'all': no format", "--to canonical"),
    "qk-norm in llama": ("llama", model_config(qk_norm=True), {}, "model.qk_norm = True", "--to qwen3_moe"),
    "qk-norm in mixtral": ("mixtral", model_config("all", qk_norm=True), {}, "model.qk_norm = True", "--to qwen3_moe"),
    "no qk-norm in qwen": ("qwen3_moe", model_config("all"), {}, "model.qk_norm = False", "--to mixtral"),
    "no qk-norm, dense": ("qwen3_moe", model_config(), {}, "model.qk_norm = False", "--to llama"),
    "experts in llama": ("llama", model_config("all"), {}, "model.moe.pattern = 'all'", "--to mixtral"),
    "mixed in mixtral": ("mixtral", model_config("1"), {}, "model.moe.pattern = '1'", "--to qwen3_moe"),
    "dense in mixtral": ("mixtral", model_config(), {}, "model.moe.pattern = 'none'", "--to llama"),
    "heads in llama": ("llama", model_config(num_heads=6), {}, "model.num_heads = 6", "model.d_model = 16"),
    "sigmoid": ("mixtral", model_config("all"), {"moe.score": "sigmoid"}, "model.moe.score = 'sigmoid'", "softmax"),
    "temperature": ("mixtral", model_config("all"), {"moe.temperature": 2.0}, "model.moe.temperature = 2.0", "train with 1.0"),
    "scale": ("mixtral", model_config("all"), {"moe.route_scale": 2.0}, "model.moe.route_scale = 2.0", "--to canonical"),
    "shared": ("mixtral", model_config("all"), {"moe.shared_experts": 1}, "model.moe.shared_experts = 1", "--to canonical"),
    "no-ops": ("mixtral", model_config("all"), {"moe.noop_experts": 1}, "model.moe.noop_experts = 1", "--to canonical"),
    "groups": ("mixtral", model_config("all"), {"moe.num_groups": 5}, "model.moe.num_groups = 5", "train with 1"),
    "top-1 in mixtral": ("mixtral", model_config("all", {"top_k": 1}), {}, "model.moe.top_k = 1", "--to qwen3_moe"),
    "as scored in mixtral": ("mixtral", model_config("all", {"renormalise": False}), {}, "model.moe.renormalise", "qwen3_moe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_cannot_express_is_refused_by_name(name):
    form, model, changes, says, works = REFUSED[name]
    for field, value in changes.items():
        group, _, leaf = field.partition(".")
        model = replace(model, **{group: replace(getattr(model, group), **{leaf: value})})
    with pytest.raises(ConfigError, match=f"^{form} cannot express this model") as refused:
        hf.require_expressible(model, {}, form)
    assert says in str(refused.value)
    assert works in str(refused.value)


@pytest.mark.parametrize("bias", [1e-3, -1e-3, math.nan])
def test_a_router_bias_is_refused(bias):
    form, model = FAMILIES["qwen3 mixed"]
    tensors = random_tensors(model)
    hf.require_expressible(model, tensors, form)
    tensors["blocks.2.moe.bias"][3] = bias
    with pytest.raises(ConfigError, match=r"model\.moe\.bias_rate"):
        hf.require_expressible(model, tensors, form)


def test_every_reason_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        hf.require_expressible(model_config("all", {"score": "sigmoid", "top_k": 1}, qk_norm=True), {}, "mixtral")
    assert all(name in str(refused.value) for name in ("qk_norm", "score", "top_k"))
