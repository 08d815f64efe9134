"""`lumina compare` of real models: one model in two backends and in transformers, and what it says of models that differ."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache

import lumina_torch.moe
from lumina import cli
from lumina.config import MoDConfig, load
from lumina.data.rows import segments_and_positions
from lumina.interchange import comparing, exporting
from lumina.interchange.exporting import write_canonical
from lumina.interchange.state import State, backend_of, load_here
from lumina.runs.console import Console
from lumina.runs.directory import RunDirectory
from lumina_jax import certify, generate, routing
from lumina_jax.checkpoint import variables_of
from lumina_jax.mesh import one_device, whole
from lumina_jax.model import by_canonical_name
from lumina_jax.step import init_state
from lumina_torch.checkpoint import from_state
from lumina_torch.side import open_side
from parity_tests.test_interchange import save_jax, save_torch
from tests.lumina.corpora import corpus_of
from tests.lumina.interchange.families import model_config
from tests.lumina.interchange.runs import T, V, run_of, tokenizer

ROWS = 9
MOE = {"dispatch": "dropless"}
TEXT = "def the(cat):\n    return 12 + the - dog\n" * 12


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What is compiled again, for the same model opened once more, is found on disk."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same weights as a canonical directory, a run of JAX and one of PyTorch: layers moe, moe+mod, moe."""
    path = tmp_path_factory.mktemp("compare")
    model = model_config("all", MOE)
    model.mod = MoDConfig(pattern="1", capacity=0.6)
    run_of(path / "canonical", model)
    config, state = load_here(path / "canonical")
    # Another machine's forms, which neither backend has here, are no hindrance.
    model = replace(config.model, attention_form="splash", moe=replace(config.model.moe, grouped_form="blocks"))
    saved = replace(config, model=model)
    made = init_state(config)[1]._replace(variables=variables_of(config, state)[1], step=np.int32(5))
    save_jax(path / "of_jax", config, jax.device_put(made, whole(one_device())), 5)
    twin = from_state(config, state)
    twin.step = 5
    save_torch(path / "of_torch", config, twin, 5)
    for name in ("of_jax", "of_torch"):
        exporting.save(saved, path / name / "config.json")
        tokenizer().save(path / name / "tokenizer")
    return path


def compared(capsys, *arguments):
    cli.run(["compare", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def altered(runs, out, change):
    """A canonical directory of the same run with other weights."""
    config, state = load_here(runs / "canonical")
    weights = {name: np.array(array) for name, array in state.weights.items()}
    change(weights)
    out.mkdir()
    write_canonical(out, config, State(5, weights), tokenizer(), {"step": 5})
    return out


def test_one_run_in_two_backends_is_equal(runs, capsys, tmp_path):
    found = compared(capsys, f"jax:{runs}/of_jax", f"torch:{runs}/of_jax", "--rows", ROWS, "--save-logits", tmp_path / "logits")
    assert found["equal"]
    assert found["verdict"] == "equal within float32 rounding"
    assert found["weights"]["differ"] == 0
    assert found["weights"]["tensors"] > 30
    assert 0 < found["logits"]["largest_difference"] < 1e-5
    assert found["text"]["source"] == "held-out text of synthetic"
    assert (found["text"]["rows"], found["tokens"]) == (ROWS, ROWS * T)
    assert [stage["of"] for stage in found["routing"]["stages"]] == ["experts", "depth", "experts", "experts"]
    assert found["routing"]["decisions"] == 4 * ROWS * T
    assert found["routing"]["flips"] == 0
    assert found["greedy"] == {"prompt": 12, "tokens": 12, "equal": True}
    index_N4 = np.load(tmp_path / "logits" / "index.npy", allow_pickle=False)
    a_NV, b_NV = (np.load(tmp_path / "logits" / f"{side}.npy", allow_pickle=False) for side in "ab")
    assert a_NV.shape == b_NV.shape == (ROWS * T, V)
    ended = index_N4[:, 2] == tokenizer().control["<|document_end|>"]
    assert (index_N4[ended, 1] < T - 1).any()  # a row has two documents
    assert not np.array_equal(a_NV, b_NV)  # two computations
    loss = -np.mean(torch.tensor(a_NV).double().log_softmax(-1).numpy()[np.arange(len(a_NV)), index_N4[:, 3]])
    assert found["loss"]["a"]["nats_per_token"] == pytest.approx(loss, rel=1e-6)


def test_the_other_backends_run_is_opened_by_its_own_unless_told(runs, capsys):
    assert [backend_of(runs / name) for name in ("of_jax", "of_torch", "canonical")] == ["jax", "torch", "jax"]
    found = compared(capsys, runs / "of_torch", f"jax:{runs}/of_torch", "--rows", 2)
    assert (found["a"]["backend"], found["b"]["backend"]) == ("torch", "jax")
    assert found["equal"]
    same = compared(capsys, f"torch:{runs}/canonical", f"torch:{runs}/of_torch", "--rows", 2)
    assert same["verdict"] == "equal, bit for bit"


def test_documents_of_a_row_do_not_see_each_other(runs):
    """The rows are packed: their tokens must be given the logits that training gave them."""
    a = opened(runs / "canonical")
    rows, _ = comparing.rows_and_source(a, a, None, "", 8)
    row = next(row for row in rows if row.segments_T[-1])
    again = segments_and_positions(row.inputs_T[None], a.end)
    assert np.array_equal(again[0][0], row.segments_T)
    first = int(np.argmax(row.segments_T > 0))
    other = row._replace(inputs_T=np.where(np.arange(T) < first - 1, 40, row.inputs_T))
    assert np.allclose(a.read(row).logits(first, T), a.read(other).logits(first, T), atol=1e-5)
    assert not np.allclose(a.read(row).logits(0, first), a.read(other).logits(0, first), atol=1e-2)


def opened(path):
    return open_side("torch", path)


# A perturbed layer: the verdict names it, by the weights; where weights tell nothing, by what the routers see or decide.


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("blocks.1.moe.router", "differ from layer 1 on: blocks.1.moe.router is another"),
        ("blocks.2.attention.query", "differ from layer 2 on: blocks.2.attention.query is another"),
        ("embedding.weight", "differ from embedding.weight on"),
    ],
)
def test_a_perturbed_tensor_is_named(runs, tmp_path, capsys, tensor, says):
    def change(weights):
        weights[tensor] *= 1.5

    other = altered(runs, tmp_path / "other", change)
    found = compared(capsys, f"torch:{runs}/of_jax", f"torch:{other}", "--rows", 3)
    assert (found["equal"], found["verdict"]) == (False, says)
    assert found["weights"] == {"tensors": found["weights"]["tensors"], "differ": 1, "first": tensor}
    assert found["kl"]["mean"] > 1e-4
    layer = int(tensor.split(".")[1]) if "blocks" in tensor else 0
    before = [stage for stage in found["routing"]["stages"] if stage["layer"] < layer]
    assert all(stage["flips"] == 0 and stage["largest_change"] == 0 for stage in before)
    assert any(stage["flips"] or stage["largest_change"] for stage in found["routing"]["stages"][len(before) :])


def test_a_backend_that_chooses_other_experts_is_found_out(runs, capsys, monkeypatch):
    """The same weights, and a fault planted in the choice of the last layer alone."""
    own, calls = lumina_torch.moe.route, []

    def route(moe, logits_BTA, bias_A):
        calls.append(1)
        experts_BTk, gates_BTk, scores_BTA = own(moe, logits_BTA, bias_A)
        return (experts_BTk + 1) % 5 if len(calls) % 3 == 0 else experts_BTk, gates_BTk, scores_BTA

    before = opened(runs / "canonical")
    row = comparing.rows_and_source(before, before, TEXT, "", 1)[0][0]
    expected = before.read(row)
    kept, wanted_TV = {name: value.copy() for name, value in expected.told.items()}, expected.logits(0, T)
    monkeypatch.setattr(lumina_torch.moe, "route", route)
    found = before.read(row)
    table = comparing.Routing(before.kinds)
    table.add(0, row, kept, found.told)
    told = table.found()
    assert [stage["flips"] for stage in told["stages"]] == [0, 0, 0, T]
    assert told["first_layer_with_a_flip"] == 2
    apart = float(np.max(np.abs(wanted_TV - found.logits(0, T))))
    logits = {"largest_difference": apart, "largest_difference_before_flips": 0.0}
    about = {"finite": True, "logits": logits, "routing": told, "weights": {"differ": 0}}
    assert comparing.verdict(about) == (
        False,
        "differ from layer 2 on: its experts routing decides otherwise, at no near-tie; the weights are the same",
    )


# ----------------------------------------------------------------------------------------------------- Hugging Face


def test_an_export_and_its_run_are_equal_on_a_text(tmp_path, capsys):
    run_of(tmp_path / "run", model_config("0,2", MOE, qk_norm=True))
    exporting.export(tmp_path / "run", "qwen3_moe", tmp_path / "theirs", False, lambda line: None)
    (tmp_path / "text").write_text(TEXT)
    pair = [f"jax:{tmp_path}/run", tmp_path / "theirs", "--text", tmp_path / "text"]
    found = compared(capsys, *pair, "--rows", 0)
    assert found["b"]["backend"] == "hf"
    assert found["verdict"] == "equal within float32 rounding"
    assert found["tokens"] == len(tokenizer().encode(TEXT)) - 1  # no end of a document among them, and none left out
    assert found["text"]["bytes"] == len(TEXT) - len(tokenizer().decode(tokenizer().encode(TEXT)[:1]))
    assert (found["weights"], found["routing"]) == (None, {"why": "not compared: transformers tells no decisions"})
    assert found["greedy"]["equal"]
    cli.run(["compare", str(tmp_path / "theirs"), f"torch:{tmp_path}/run", "--rows", "2"])
    table = capsys.readouterr().out
    assert "held-out text of synthetic" in table
    assert table.splitlines()[-1].split(maxsplit=1) == ["verdict", "equal within float32 rounding"]


# ------------------------------------------------------------------------------------- commands that open either's runs


@pytest.mark.parametrize("name", ["of_jax", "of_torch", "canonical"])
def test_both_backends_sample_from_whatever_was_trained(runs, capsys, name):
    written = []
    for backend in ("jax", "torch"):
        arguments = ["--temperature", "0", "--max-tokens", "9", "--prompt", "the", "--json", "--backend", backend]
        cli.run(["sample", str(runs / name), *arguments])
        written.append(json.loads(capsys.readouterr().out)["text"])
    assert written[0] == written[1] != ""


def test_sampling_takes_the_backend_that_trained(runs, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_backend", lambda name, module: (asked.append((name, module)), generate)[1])
    for name in ("of_jax", "of_torch", "canonical"):
        cli.run(["sample", str(runs / name), "--max-tokens", "1", "--json"])
    assert asked == [("jax", "generate"), ("torch", "generate"), ("jax", "generate")]


@pytest.mark.parametrize("name", ["of_torch", "canonical"])
def test_certificates_and_routing_are_of_the_weights_that_pytorch_trained(runs, name, monkeypatch):
    state, seen = load_here(runs / name)[1], []
    monkeypatch.setattr(certify, "examine", lambda config, graphdef, variables, *rest: (seen.append(variables), {})[1])
    found = certify.certify(str(runs / name), 2, False, Console(0, None))
    assert found["step"] == 5
    assert ("the weights are of lumina_torch" in found["device"]) == (name == "of_torch")
    params = by_canonical_name(load(str(runs / name)).model, seen[0].params)
    assert all(np.array_equal(params[tensor], state.weights[tensor]) for tensor in params)
    corpus = corpus_of_run(runs / name)
    held_out = routing.look(RunDirectory(runs / name), load(str(runs / name)), corpus, 2, False)
    side = opened(runs / name)
    rows = (comparing.Row(t, t, *(a[0] for a in segments_and_positions(t[None], side.end))) for t in held_out.tokens_RT)
    for number, row in enumerate(rows):
        told = side.read(row).told
        assert np.array_equal(held_out.experts_LRTk[:, number], told["experts_LTk"])
        assert np.array_equal(held_out.taken_LRT[:, number], told["taken_LT"])


def corpus_of_run(path):
    config = load(str(path))
    return corpus_of(replace(config.data, tokenizer=str(path / "tokenizer")), config.model.vocab_size)
