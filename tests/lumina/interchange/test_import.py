"""`lumina import`: what comes in is what transformers computes; what our model does not compute is refused by name."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lumina import cli
from lumina.config import load
from lumina.errors import CheckpointError, ConfigError, DataError, UsageError
from lumina.interchange import exporting, importing, state
from lumina.tokenizer_files import load_tokenizer
from tests.lumina.interchange.families import FAMILIES, model_config, write
from tests.lumina.interchange.oracle import logits_TV
from tests.lumina.interchange.runs import T, V, run_of, tokenizer
from tests.lumina.interchange.test_tokenizer_json import copied

torch.set_num_threads(1)


def quiet(_):
    pass


@pytest.fixture
def given(tmp_path):
    """Makes a directory as another program would have left it, by the name of a family."""

    def make(name, **changes):
        form, model = FAMILIES[name]
        model = copy.deepcopy(model)
        model.vocab_size = V
        folded = write(tmp_path / "given", form, model, **changes)
        tokenizer().save(tmp_path / "given" / "tokenizer")
        return tmp_path / "given", *folded

    return make


def imported(directory):
    out = directory.parent / "out"
    told = importing.import_directory(directory, out, quiet)
    return out, told


@pytest.mark.parametrize("name", ["llama tied", "llama scaled", "mixtral", "qwen3 top-1", "qwen3 mixed", "qwen3 dense"])
def test_export_then_import_keeps_every_bit(name, tmp_path):
    form, model = FAMILIES[name]
    model = copy.deepcopy(model)
    made = run_of(tmp_path / "run", model)
    exporting.export(tmp_path / "run", form, tmp_path / "theirs", False, quiet, shard_bytes=30_000)
    out, told = imported(tmp_path / "theirs")
    config, found, manifest = state.load(out)
    assert told["logits"]["largest_difference"] < 1e-5
    assert load_tokenizer(str(out / "tokenizer")).fingerprint == tokenizer().fingerprint
    assert not found.is_whole
    assert manifest["step"] == 0
    if model.scale_embeddings:  # it is in the embedding now
        scale = np.float32(np.sqrt(model.d_model))
        assert np.array_equal(found.weights["embedding.weight"], made.weights["embedding.weight"] * scale)
        tensors = found.weights
        ids = np.arange(T)
        expected = logits_TV(model, made.weights, ids)
        assert np.max(np.abs(logits_TV(config.model, tensors, ids) - expected)) < 1e-5 * np.max(np.abs(expected))
        return
    assert found.weights.keys() == made.weights.keys()
    assert all(found.weights[name].tobytes() == made.weights[name].tobytes() for name in made.weights)
    training = ("dispatch", "renormalise", "pattern", "num_experts", "top_k")  # what a format does not say, or says otherwise
    assert {**vars(config.model), "moe": None} == {**vars(model), "moe": None}
    if model.moe.pattern != "none":
        assert all(getattr(config.model.moe, each) == getattr(model.moe, each) for each in training[2:])


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_transformers_saves_is_read(kind, dtype, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": V}
    sizes |= {"intermediate_size": 40, "head_dim": 8, "max_position_embeddings": 32}
    classes = {"llama": "Llama", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}
    if kind == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
    if kind == "mixtral":
        sizes["num_local_experts"] = 3
    torch.manual_seed(0)
    config = getattr(transformers, f"{classes[kind]}Config")(**sizes, initializer_range=0.2)
    theirs = getattr(transformers, f"{classes[kind]}ForCausalLM")(config).to(dtype)
    theirs.save_pretrained(tmp_path / "given", max_shard_size="20KB")
    assert (tmp_path / "given" / "model.safetensors.index.json").is_file()
    tokenizer().save(tmp_path / "given" / "tokenizer")
    out, told = imported(tmp_path / "given")
    assert told["logits"]["largest_difference"] < 1e-5
    model = load(str(out)).model
    assert model.rope_theta == {"llama": 1e4, "mixtral": 1e6, "qwen3_moe": 1e4}[kind]
    assert model.norm_eps == {"llama": 1e-6, "mixtral": 1e-5, "qwen3_moe": 1e-6}[kind]
    assert model.d_ff == (24 if kind == "qwen3_moe" else 40)
    wide = type(theirs).from_pretrained(tmp_path / "given", local_files_only=True, dtype=torch.float32).eval()
    ids = np.arange(20)
    expected = wide(torch.tensor(ids)[None]).logits[0].detach().numpy()
    found = logits_TV(model, state.load(out)[1].weights, ids)
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))


def test_missing_control_tokens_get_rows_that_are_the_mean(tmp_path):
    ours = copied_into(tmp_path / "given")
    words = ours.vocab_size - 6
    model = model_config(vocab_size=words + 2, tie_embeddings=False)
    _, tensors = write(tmp_path / "given", "llama", model)
    out, told = imported(tmp_path / "given")
    assert told["rows_added"] == 4
    assert told["tokenizer"]["texts"] == 300
    config, found, _ = state.load(out)
    assert config.model.vocab_size == ours.vocab_size
    assert np.array_equal(found.weights["embedding.weight"][: words + 2], tensors["embedding.weight"])
    assert np.array_equal(found.weights["head.weight"][:, : words + 2], tensors["head.weight"])
    assert found.weights["embedding.weight"][-1] == pytest.approx(tensors["embedding.weight"].mean(axis=0), abs=1e-6)
    assert found.weights["head.weight"][:, -4] == pytest.approx(tensors["head.weight"].mean(axis=1), abs=1e-6)
    assert load_tokenizer(config.data.tokenizer).fingerprint == ours.fingerprint


def test_text_in_which_a_document_ends_verifies_a_model_without_a_row_for_that(tmp_path, monkeypatch):
    ours = copied_into(tmp_path / "given")
    write(tmp_path / "given", "llama", model_config(vocab_size=ours.vocab_size - 6))

    def ended(config, tokenizer):
        rows_NT, *rest = exporting.held_out(config, tokenizer)
        rows_NT[:, 3] = tokenizer.control["<|document_end|>"]
        return rows_NT, *rest

    monkeypatch.setattr(importing, "held_out", ended)
    _, told = imported(tmp_path / "given")
    assert told["rows_added"] == 6


def test_what_was_imported_may_be_moved(given, tmp_path):
    out, _ = imported(given("llama tied")[0])
    out.rename(tmp_path / "moved")
    for config in (load(str(tmp_path / "moved")), state.load(tmp_path / "moved")[0]):
        assert load_tokenizer(config.data.tokenizer).fingerprint == tokenizer().fingerprint


def copied_into(directory):
    directory.mkdir()
    return copied(directory)


# --------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "model_type": ("llama", {"model_type": "gpt2"}, "model_type = 'gpt2': must be one of llama, mixtral, qwen3_moe"),
    "rope_scaling": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = "),
    "rope_parameters": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = "),
    "factor": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters = "),
    "partial": ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "window": ("mixtral", {"sliding_window": 4096}, "sliding_window = 4096"),
    "window in qwen": ("qwen3 top-2", {"sliding_window": 4096, "use_sliding_window": True}, "sliding_window = 4096"),
    "layer types": ("qwen3 top-2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = ['sliding"),
    "attention bias": ("llama", {"attention_bias": True}, "attention_bias = True"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = "),
    "exact gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "top-1 mixtral": ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
    "top-1 qwen": ("qwen3 top-1", {"norm_topk_prob": True}, "num_experts_per_tok = 1"),
    "dense width": ("qwen3 mixed", {"intermediate_size": 64}, "intermediate_size = 64"),
    "no width": ("llama", {"hidden_size": "wide"}, "hidden_size = 'wide'"),
    "step 0": ("qwen3 top-2", {"decoder_sparse_step": 0}, "cannot be read as that of a qwen3_moe model"),
    "theta": ("llama", {"rope_theta": "x"}, "cannot be read as that of a llama model"),
    "odd heads": ("llama", {"head_dim": 5}, "model.head_dim = 5"),
    "positions": ("llama", {"max_position_embeddings": None}, "max_position_embeddings = None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_model_does_not_compute_is_refused_by_name(name, given, tmp_path):
    family, changes, says = REFUSED[name]
    directory, _, _ = given(family, **changes)
    with pytest.raises(ConfigError) as refused:
        imported(directory)
    assert says in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given"]


def test_every_second_layer_sparse_is_understood(given):
    directory, _, _ = given("qwen3 mixed", mlp_only_layers=[1], decoder_sparse_step=1)
    values = json.loads((directory / "config.json").read_text())
    model = importing.foreign.model_of(values | {"decoder_sparse_step": 2, "mlp_only_layers": None, "num_hidden_layers": 5})
    assert model.moe.pattern == "1,3"


def retold(directory, change):
    """Change the tensors of a directory's one file, in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def unknown(tensors):
    tensors["model.layers.1.self_attn.q_proj.bias"] = np.zeros(24, np.float32)


def misshaped(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ascontiguousarray(tensors["model.layers.1.mlp.up_proj.weight"].T)


def infinite(tensors):
    tensors["model.norm.weight"][3] = np.inf


def whole(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (missing, "up_proj.weight: is missing"),
        (unknown, "q_proj.bias: is a tensor that a llama model"),
        (misshaped, r"up_proj.weight: has shape \[16, 20\], not \[20, 16\]"),
        (infinite, "model.norm.weight: holds numbers that are not finite"),
        (whole, "model.norm.weight is of type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, says, given):
    directory, _, _ = given("llama")
    retold(directory, change)
    with pytest.raises(CheckpointError, match=says):
        imported(directory)


def test_a_tied_head_may_be_saved_if_it_is_the_embedding(given):
    directory, _, tensors = given("llama tied")
    retold(directory, lambda theirs: theirs.update({"lm_head.weight": tensors["embedding.weight"].copy()}))
    imported(directory)
    retold(directory, lambda theirs: theirs.update({"lm_head.weight": tensors["embedding.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from the embedding"):
        importing.import_directory(directory, directory.parent / "again", quiet)


@pytest.mark.parametrize(
    "lead", ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "..", "model.bin", ""]
)
def test_an_index_that_leads_outside_is_refused(lead, given, tmp_path):
    directory, _, _ = given("llama", shard_bytes=4000)
    save_file({"model.norm.weight": np.ones(16, np.float32)}, tmp_path / "outside.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = lead
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="as a part; a part is a"):
        imported(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}'])
def test_a_broken_index_is_refused(text, given):
    directory, _, _ = given("llama", shard_bytes=4000)
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read as an index"):
        imported(directory)


def test_a_part_that_lacks_what_the_index_says_is_refused(given):
    directory, _, _ = given("llama", shard_bytes=4000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    at = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(file for file in files if file != at)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"has no model\.norm\.weight"):
        imported(directory)


def test_a_damaged_file_is_refused(given):
    directory, _, _ = given("llama")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        imported(directory)


def test_a_pickle_is_never_opened(given):
    directory, _, _ = given("llama")
    (directory / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was loaded",)

    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, a pickle, which is never loaded"):
        imported(directory)


def test_an_adapter_beside_the_weights_is_not_applied(given):
    directory, _, _ = given("llama")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somewhere/else"}')
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    with importing.weights_alone(directory, ["model.safetensors"]) as alone:
        assert sorted(path.name for path in alone.iterdir()) == ["config.json", "model.safetensors"]
    imported(directory)


def test_what_transformers_itself_cannot_load_is_told_in_a_line(given):
    directory, _, _ = given("llama", attention_dropout="much")
    with pytest.raises(CheckpointError, match=r"^transformers cannot load this llama model: .*; nothing was written$"):
        imported(directory)


def test_a_directory_without_a_tokenizer_or_config_is_refused(given, tmp_path):
    directory, _, _ = given("llama")
    (directory / "tokenizer" / "lumina_tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        imported(directory)
    with pytest.raises(UsageError, match=r"has no config\.json"):
        importing.import_directory(tmp_path / "nowhere", tmp_path / "out", quiet)
    (directory / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        imported(directory)


def test_another_model_than_transformers_computes_is_not_written(given, monkeypatch, tmp_path):
    directory, _, _ = given("llama")
    monkeypatch.setattr(importing.foreign, "NORM_EPS", {"llama": 0.1})
    values = json.loads((directory / "config.json").read_text())
    del values["rms_norm_eps"]
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="transformers gives other logits"):
        imported(directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given"]


def test_a_run_may_begin_from_what_was_imported(given, tmp_path):
    from lumina.runs.directory import RunDirectory
    from lumina.runs.origin import Origin

    out, _ = imported(given("mixtral")[0])
    config = load(str(out))
    config.checkpoint.init_from, config.checkpoint.init_part = str(out), "weights"
    origin = Origin.of(config, RunDirectory(tmp_path / "run"))
    begun, _ = origin.load()
    assert begun.step == 0
    assert np.array_equal(begun.weights["embedding.weight"], state.load(out)[1].weights["embedding.weight"])


def test_the_command_tells_what_it_verified(given, capsys):
    directory, _, _ = given("llama")
    cli.run(["import", str(directory), "--out", str(directory.parent / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["logits"]["largest_difference"] < 1e-5
