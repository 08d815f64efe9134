"""`lumina export`: what it writes is what transformers computes, and what it does not write where that is not so."""

import copy
import importlib.util
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from lumina import cli
from lumina.config import DataConfig
from lumina.conversation import TEMPLATES
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.interchange import exporting, huggingface, state, tokenizer_json, verify
from lumina.tokenizer import train_bpe
from tests.lumina.interchange.families import FAMILIES, model_config
from tests.lumina.interchange.oracle import logits_TV, random_tensors
from tests.lumina.interchange.runs import DATA, T, run_of, tokenizer

torch.set_num_threads(1)


def quiet(_):
    pass


def family(name):
    form, model = FAMILIES[name]
    return form, copy.deepcopy(model)


def exported(tmp_path, name, **changes):
    form, model = family(name)
    made = run_of(tmp_path / "run", model)
    told = exporting.export(tmp_path / "run", form, tmp_path / "out", False, quiet, **changes)
    return model, made, told, tmp_path / "out"


@pytest.mark.parametrize("name", ["llama scaled", "mixtral", "qwen3 mixed"])
def test_what_is_written_is_the_model_with_its_tokenizer(name, tmp_path):
    model, made, told, out = exported(tmp_path, name, shard_bytes=20_000)
    assert json.loads((out / "VERIFY.json").read_text()) == told
    assert told["logits"]["largest_difference"] < 1e-5
    assert told["logits"]["tokens"] > 48
    assert told["logits"]["top_10_overlap"] > 0.99
    assert told["tokenizer"]["equal"]
    assert told["tokenizer"]["texts"] > 300
    assert told["tokenizer"]["chat_equal"]
    assert told["step"] == 5
    assert len(list(out.glob("model-*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)("the cat and the dog")["input_ids"]
    assert ids == tokenizer().encode("the cat and the dog")
    expected = logits_TV(model, made.weights, np.array(ids))
    found = theirs(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.max(np.abs(found - expected)) < 1e-5 * np.max(np.abs(expected))
    control = tokenizer().control
    assert theirs.generation_config.eos_token_id == [control["<|document_end|>"], control["<|turn_end|>"]]
    assert theirs.config.eos_token_id == control["<|document_end|>"]
    assert theirs.config.max_position_embeddings == T


def test_whoever_may_read_the_directory_may_read_its_files(tmp_path):
    _, _, _, out = exported(tmp_path, "llama")
    assert {path.stat().st_mode & 0o777 for path in out.iterdir() if path.is_file()} == {out.stat().st_mode & 0o666}


def test_the_fold_of_the_embedding_and_what_training_drops_are_told(tmp_path):
    _, _, told, _ = exported(tmp_path, "qwen3 mixed")
    assert told["embedding"]["scale"] == pytest.approx(24**0.5, rel=1e-7)
    assert 0 < told["embedding"]["largest_relative_error"] < 2e-7
    assert "drops in training alone" in told["notes"][0]


def test_canonical_keeps_every_bit(tmp_path):
    made = run_of(tmp_path / "run", model_config("1", {"score": "sigmoid"}), whole=True)
    (tmp_path / "run" / "data.json").write_text('{"fingerprint": "of the data"}')
    told = exporting.export(tmp_path / "run", "canonical", tmp_path / "out", False, quiet)
    assert (tmp_path / "out" / "data.json").read_text() == '{"fingerprint": "of the data"}'
    assert "data.json" in json.loads((tmp_path / "out" / "manifest.json").read_text())["manifest"]["files"]
    assert told["optimizer"]
    config, found, manifest = state.load(tmp_path / "out")
    assert config == state.load(tmp_path / "run")[0]
    ours, theirs = state.arrays(made), state.arrays(found)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert manifest["step"] == 5


def leaves_nothing(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def swapped(piece, ours):
    """Gate and up in each other's place."""
    name = piece.ours
    if name.endswith((".gate", ".up")) and ".experts." in name:
        return original(piece, -ours)
    return original(piece, ours)


original = huggingface.to_theirs


def test_another_model_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "to_theirs", swapped)
    with pytest.raises(CheckpointError, match="transformers gives other logits") as refused:
        exported(tmp_path, "mixtral")
    assert refused.value.exit_code == 5
    assert leaves_nothing(tmp_path)


def test_a_difference_just_above_the_tolerance_is_refused(tmp_path, monkeypatch):
    def slightly(piece, ours):
        return original(piece, ours * np.float32(1.00004) if piece.ours == "head.weight" else ours)

    monkeypatch.setattr(huggingface, "to_theirs", slightly)
    with pytest.raises(CheckpointError, match=r"they differ by [34]"):
        exported(tmp_path, "llama")


def test_other_ids_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_json, "oniguruma", lambda pattern: r"\w|\W")
    with pytest.raises(CheckpointError, match="other ids for"):
        exported(tmp_path, "llama")
    assert leaves_nothing(tmp_path)


def test_what_cannot_be_expressed_is_refused_before_an_array_is_read(tmp_path, monkeypatch):
    run_of(tmp_path / "run", model_config("all", {"top_k": 1}))
    monkeypatch.setattr(state, "read_state", lambda source: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"model\.moe\.top_k = 1.*--to qwen3_moe"):
        exporting.export(tmp_path / "run", "mixtral", tmp_path / "out", False, quiet)
    assert leaves_nothing(tmp_path)


def test_a_router_bias_is_refused_once_it_is_read(tmp_path):
    _, model = family("mixtral")
    directory = tmp_path / "made"
    made = run_of(directory, model)
    made.weights["blocks.0.moe.bias"][1] = 0.25
    config = state.load(directory)[0]
    (tmp_path / "run").mkdir()
    exporting.write_canonical(tmp_path / "run", config, made, tokenizer(), {"step": 5})
    with pytest.raises(ConfigError, match=r"biases up to 0\.25"):
        exporting.export(tmp_path / "run", "mixtral", tmp_path / "out", False, quiet)


@pytest.mark.parametrize("missing", ["transformers", "torch"])
def test_without_transformers_nothing_is_exported_but_canonically(missing, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest))
    with pytest.raises(UsageError, match=rf"{missing} not installed.*lumina\[transformers\]"):
        exported(tmp_path, "llama")
    exporting.export(tmp_path / "run", "canonical", tmp_path / "out", False, quiet)


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="exists already; choose another --out"):
        exported(tmp_path, "llama")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_empty_directory_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    assert (exported(tmp_path, "llama")[3] / "config.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "fixed").mkdir(mode=0o500)
    run_of(tmp_path / "run", family("llama")[1])
    with pytest.raises(UsageError, match="cannot be written"):
        exporting.export(tmp_path / "run", "llama", tmp_path / "fixed" / "out", False, quiet)


def test_a_run_whose_files_are_elsewhere_is_verified_on_the_embedded_text(tmp_path):
    form, model = family("llama")
    run_of(tmp_path / "run", model, data=DataConfig(source=str(tmp_path / "gone.txt"), sequence_length=T))
    told = exporting.export(tmp_path / "run", form, tmp_path / "out", False, quiet)
    assert told["text"]["source"] == "stdlib"
    assert told["logits"]["tokens"] == 4 * T


# -------------------------------------------------------------------------------------------------------- comparison


def test_figures_are_those_of_the_definition():
    ours, theirs = np.array([[0.0, 4.0], [1.0, -2.0]]), np.array([[0.0, 4.5], [1.0, -2.0]])
    seen = verify.Comparison()
    seen.add(ours, theirs, np.full(2, np.inf))
    p, q = (np.exp(x[0]) / np.exp(x[0]).sum() for x in (ours, theirs))
    figures = seen.figures()
    assert figures["largest_difference"] == 0.5 / 4
    assert figures["kl_per_token"] == pytest.approx(float(np.sum(p * np.log(p / q))) / 2)
    assert figures["top_10_overlap"] == 1.0


def test_the_overlap_counts_the_ten_likeliest():
    ours = np.arange(40.0)[None]
    theirs = ours.copy()
    theirs[0, [39, 0]] = theirs[0, [0, 39]]
    seen = verify.Comparison()
    seen.add(ours, theirs, np.full(1, np.inf))
    assert seen.figures()["top_10_overlap"] == 0.9


def test_what_follows_a_near_tie_is_left_out_and_counted():
    ours, theirs = np.ones((4, 3)), np.ones((4, 3))
    theirs[2:] = 9.0
    seen = verify.Comparison()
    seen.add(ours, theirs, np.array([1.0, 1.0, 0.0, 1.0]))
    figures = seen.figures()
    assert figures["largest_difference"] == 0
    assert (figures["tokens"], figures["tokens_left_out_after_near_ties"], figures["rows_with_near_ties"]) == (2, 2, 1)


def test_a_model_that_is_all_near_ties_is_not_called_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "NEAR_TIE", 2.0)
    with pytest.raises(CheckpointError, match="too little can be compared"):
        exported(tmp_path, "mixtral")


@pytest.mark.parametrize(("margin", "tied"), [(np.inf, False), (1e-7, True)])
def test_a_continuation_tells_where_it_first_differs_and_by_how_much(margin, tied):
    class Ours:
        def logits(self, ids_T):
            likely = (ids_T + 1) % 7
            likely[15 + 20] = 0  # 16 tokens of prompt, then twenty alike
            return np.eye(7)[likely], np.full(len(ids_T), margin)

    class Theirs:
        def continuation(self, ids_T, count):
            return [int(ids_T[-1] + 1 + i) % 7 for i in range(count)]

    prompt = np.arange(16) % 7
    told = verify.greedy(Ours(), Theirs(), prompt, 7)
    assert told == {"tokens": 64, "equal": False, "first_differs_at": 20, "ahead": 1.0, "after_near_tie": tied}


def test_a_model_that_continues_otherwise_by_more_than_rounding_is_not_written(tmp_path, monkeypatch):
    honest = verify.Theirs.continuation
    monkeypatch.setattr(verify.Theirs, "continuation", lambda *about: [(token + 1) % 50 for token in honest(*about)])
    with pytest.raises(CheckpointError, match="transformers continues otherwise from token 0 on, where our choice is ahead"):
        exported(tmp_path, "llama")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- the command


def test_the_command_tells_what_it_verified(tmp_path, capsys):
    run_of(tmp_path / "run", family("llama")[1])
    command = ["export", str(tmp_path / "run"), "--to", "llama", "--out"]
    cli.run([*command, str(tmp_path / "out")])
    assert "equal" in capsys.readouterr().out
    cli.run([*command, str(tmp_path / "again"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["logits"]["tolerance"] == 1e-5
    assert told["out"] == str(tmp_path / "again")


def test_the_data_is_that_of_the_run(tmp_path):
    _, _, told, _ = exported(tmp_path, "llama")
    assert told["text"] == {"source": DATA.source, "rows": 4, "positions": T}


def test_the_template_of_the_run_is_exported(tmp_path):
    form, model = family("llama scaled")
    run_of(tmp_path / "run", model, data=replace(DATA, template="instruct"))
    told = exporting.export(tmp_path / "run", form, tmp_path / "out", False, quiet)
    assert told["tokenizer"]["chat_equal"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    messages = [{"role": "user", "content": "hi"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "### Instruction:\nhi<|turn_end|>\n\n### Response:\n"


def test_a_models_turns_end_as_its_template_says(tmp_path):
    form, model = family("llama scaled")
    run_of(tmp_path / "run", model)
    config = state.locate(tmp_path / "run").config
    config.data = replace(config.data, template="chatml")
    ours = train_bpe(["some text to learn from " * 9], 270, extra=TEMPLATES["chatml"].extra)
    (tmp_path / "out").mkdir()
    exporting.write(tmp_path / "out", form, config, random_tensors(model), ours, quiet)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [ours.control["<|document_end|>"], ours.control["<|im_end|>"]]
