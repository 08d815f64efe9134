"""The leak certificate: what it finds in models that are causal, in planted leaks, and in a trained run.

B rows of a batch, T positions, D model width.
"""

import contextlib
import io
import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import lumina_jax.attend
import lumina_jax.attention
import lumina_jax.generate
import lumina_jax.mod
import lumina_jax.moe
import lumina_jax.passes
import lumina_jax.routing
from lumina import cli
from lumina.config import load
from lumina.data.packing import plan
from lumina.data.rows import Batches, PackedRows, Rows
from lumina.errors import NOT_CAUSAL, CheckpointError, DataError, UsageError
from lumina.generation import Sampling
from lumina.runs.certificate import Passes
from lumina.runs.console import Console
from lumina.runs.directory import RunDirectory, config_fingerprint
from lumina.runs.ranks import auroc, foretold, in_top, standard_error
from lumina.runs.text import corpora_of
from lumina.runs.text import held_out as held_out_rows
from lumina.tokenizer import train_bpe
from lumina_jax import certify
from lumina_jax.attend import Form, attend_chunk
from lumina_jax.certify import TOP, Noise, noise_losses, prefixes, swaps
from lumina_jax.generate import Generator
from lumina_jax.mod import MoD, select_top
from lumina_jax.model import CAUSAL, Mode, Variables, merge
from lumina_jax.moe import margin
from lumina_jax.passes import NEAR, Comparison, Forward, is_real, padded, settled, why_final
from lumina_jax.step import init_state, state_shapes
from lumina_jax.train import train_and_evaluate
from tests.lumina.corpora import chats
from tests.lumina.data.streams import Stream
from tests.lumina_jax.tiny import T, V, tiny

B, N = 4, 10  # of the last batch two rows are filling
TEXT = "".join(f"def f{i}(x):\n    return x + {i * 37 % 101}\n" for i in range(60))
QUIET = Console(0, None)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What is compiled again, for another examination of the same model, is found on disk."""
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
def tokenizer():
    return train_bpe([TEXT], V)


@pytest.fixture(scope="module")
def held_out(tokenizer):
    stream = Noise(V - len(tokenizer.control), N * T + 1, seed=5)
    stream._tokens[[20, 50, 51, 100]] = tokenizer.control["<|document_end|>"]
    return Rows(stream, T, tokenizer.control["<|document_end|>"])


@pytest.fixture(scope="module")
def packed(tokenizer):
    """Conversations, each in two halves of which only the second is learned; most rows have a rest that nothing fills."""
    ends = np.cumsum([10, 12, 9, 14, 11, 10, 3, 9, 13])
    stream = Noise(V - len(tokenizer.control), int(ends[-1]), seed=6)
    stream._tokens[ends - 1] = tokenizer.control["<|document_end|>"]
    begins = np.concatenate([[0], ends])
    codes = np.concatenate([np.arange(n) >= n // 2 for n in np.diff(begins)])
    return PackedRows(stream, plan(begins, T), Stream(codes), np.array([0, 1], np.float32))


SUBJECTS = {
    "hybrid": {"kind": "moe+mod"},
    "block": {"kind": "dense+mod", "mod": {"scope": "block", "capacity": 0.3, "predictor_width": 4}},
    "random": {"kind": "dense+mod", "mod": {"router": "random"}},
    "dense": {"kind": "dense"},
    "one layer": {"kind": "dense", "model": {"num_layers": 1}},
    "depth alone": {"kind": "dense+mod"},
    "experts": {"kind": "moe"},
}


@cache
def untrained(name):
    """(config, graph definition, variables) of a model whose logits and depth decisions are far from all alike."""
    settings = SUBJECTS[name]
    sizes = {"embedding_std": 0.5, "tie_embeddings": False, **settings.get("model", {})}
    config = tiny(settings["kind"], model=sizes, mod=settings.get("mod", ()))
    return config, state_shapes(config)[1], jax.jit(lambda: init_state(config)[1].variables)()


@cache
def forward(name):
    return of(untrained(name))


def of(subject, dtype=jnp.float32):
    return Forward(*subject[1:], dtype, Passes(QUIET, 1))


def examine(subject, tokenizer, held_out):
    return certify.examine(*subject, tokenizer, held_out, 0, QUIET)


@partial(jax.jit, static_argnames=("graphdef", "mode"))
def compiled_logits(graphdef, variables, inputs, segments, positions, mode):
    model = merge(graphdef, variables)
    hidden, _, _ = model(inputs, segments, positions, dtype=jnp.float32, mode=mode)
    return hidden @ model.head_DV(jnp.float32)


def logits_of(name, batch, mode):
    rows = (batch[key] for key in ("inputs", "segments", "positions"))
    return np.asarray(compiled_logits(*untrained(name)[1:], *rows, mode))


def batches_of(held_out):
    return list(Batches(held_out, B, seed=0, shuffle=False).evaluation())


# ------------------------------------------------------------------------------------------------------- of ranks


def slow_auroc(score, member):
    pairs = [(a > b) + 0.5 * (a == b) for a, m in zip(score, member, strict=True) if m
             for b, n in zip(score, member, strict=True) if not n]  # fmt: skip
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("values", [3, 10**6], ids=["many ties", "no ties"])
def test_auroc_is_the_share_of_pairs_in_order_with_ties_counted_half(values):
    draw = np.random.default_rng(values)
    for _ in range(20):
        score, member = draw.integers(0, values, 40) / 7, draw.random(40) < 0.3
        assert auroc(score, member) == pytest.approx(slow_auroc(score, member), abs=1e-12)
    assert slow_auroc([1, 2, 3], [False, True, True]) == 1 == auroc(np.array([1, 2, 3]), np.array([False, True, True]))


def test_auroc_of_one_kind_alone_is_undefined():
    assert auroc(np.array([1.0, 2]), np.array([True, True])) is None
    assert auroc(np.array([1.0, 2]), np.array([False, False])) is None


def test_precision_recall_f1_and_agreement_are_those_of_the_counts():
    logit, member = np.array([[2.0, 1, -1, 3], [-2, -1, 1, 0]]), np.array([[1, 0, 1, 1], [0, 1, 0, 1]], bool)
    found = foretold(logit, member)  # decided 4, members 5, both 2
    expected = {"precision": 2 / 4, "recall": 2 / 5, "f1": 4 / 9, "agreement": 3 / 8}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert foretold(-np.ones((1, 2)), np.array([[True, False]]))["precision"] is None


def test_the_top_of_a_row_is_what_the_model_selects():
    logit_BT = np.random.default_rng(0).integers(0, 4, (6, 11)).astype(np.float32)  # with ties
    for count in (1, 5, 11):
        assert [np.flatnonzero(row).tolist() for row in in_top(logit_BT, count)] == select_top(logit_BT, count).tolist()


# ------------------------------------------------------------------------------------------------- what is causal

EXAMINED = ("hybrid", "block", "random", "dense")


@pytest.fixture(scope="module")
def found(tokenizer, held_out):
    return {name: examine(untrained(name), tokenizer, held_out) for name in EXAMINED}


@pytest.mark.parametrize("name", EXAMINED)
def test_a_causal_model_passes(found, name):
    certificate = found[name]
    assert certificate["causal"], certificate["failed"]
    assert certificate["failed"] == []
    assert certificate["rows"] == N
    for measure in ("prefix", "suffix"):
        assert certificate["measures"][measure]["relative"] <= 1e-5
        assert certificate["measures"][measure]["largest_logit"] > 1


@pytest.mark.parametrize(("name", "why"), [("random", "at random"), ("dense", "no depth")])
def test_without_learned_depth_routing_the_control_is_not_applicable(found, name, why):
    for measure in ("prefix", "suffix"):
        control = found[name]["measures"][measure]["control"]
        assert not control["applicable"]
        assert why in control["why"]


@pytest.mark.parametrize("name", ["hybrid", "block"])
def test_under_top_k_routing_the_same_measures_are_refused(found, name):
    for measure in ("prefix", "suffix"):
        control = found[name]["measures"][measure]["control"]
        assert control["refused"]
        assert control["relative"] > 1e-3
        assert control["flips"] > 0
        assert "control" in control["label"]


def test_depth_that_takes_every_token_sees_no_future():
    assert "every token" in certify.why_no_control(tiny("moe+mod", mod={"capacity": 1.0}).model, T, T)
    assert "every token" in certify.why_no_control(tiny("moe+mod", mod={"capacity": 0.95}).model, T, T)  # rounded up
    assert not certify.why_no_control(tiny("moe+mod", mod={"capacity": 0.93}).model, T, T)
    assert "every token" in certify.why_no_control(tiny("moe+mod", mod={"capacity": 0.6}).model, T, 10)  # of packed rows
    assert not certify.why_no_control(tiny("moe+mod", mod={"capacity": 0.6}).model, T, 11)


def test_without_depth_routing_there_is_no_top_k_figure(found):
    measures = found["dense"]["measures"]
    assert measures["depth"] is None
    for name in ("cross_entropy", "noise"):
        assert "top_k" not in measures[name]
    assert "gap" not in measures["cross_entropy"]


def test_depth_is_measured_by_layer_against_the_top_of_the_training_states(found, held_out):
    depth = found["hybrid"]["measures"]["depth"]
    run, inputs = forward("hybrid"), batches_of(held_out)
    for index, layer in enumerate(depth["layers"]):
        for mode, told, taken in ((TOP, layer, None), (CAUSAL, layer["of_causal_states"], layer["realised_capacity"])):
            score, member, took = [], [], []
            for batch in inputs:
                each = run.hidden(batch, mode)[1]
                for row in range(int(batch["weights"][:, 0].sum())):
                    logit = each["logit_BT"][index][row]
                    order = sorted(range(T), key=lambda t: (-logit[t], t))
                    score += logit.tolist()
                    member += [t in order[:10] for t in range(T)]  # ceil(0.6 * 16)
                    took += each["taken_BT"][index][row].tolist()
            assert told["auroc"] == pytest.approx(slow_auroc(score, member))
            assert told["agreement"] == pytest.approx(np.mean([(s > 0) == m for s, m in zip(score, member, strict=True)]))
            if taken is not None:
                assert taken == pytest.approx(np.mean(took))
    assert depth["share_of_top"] == 10 / T
    assert depth["tokens"] == N * T


def test_where_a_predictor_decides_only_the_training_states_have_a_known_top(found):
    assert all("of_causal_states" not in layer for layer in found["block"]["measures"]["depth"]["layers"])


def test_the_gap_is_paired_by_row(found, held_out):
    quality = found["hybrid"]["measures"]["cross_entropy"]
    losses = {}
    for mode in (CAUSAL, TOP):
        rows = []
        for batch in batches_of(held_out):
            logits = logits_of("hybrid", batch, mode).astype(np.float64)
            own = np.take_along_axis(logits, batch["targets"][:, :, None], axis=2)[:, :, 0]
            loss = np.log(np.exp(logits).sum(axis=2)) - own
            rows += loss[batch["weights"][:, 0] > 0].mean(axis=1).tolist()
        losses[mode] = np.array(rows)
    gap = losses[TOP] - losses[CAUSAL]
    assert quality["causal"]["nats_per_token"] == pytest.approx(losses[CAUSAL].mean(), rel=1e-5)
    assert quality["gap"]["nats_per_token"] == pytest.approx(gap.mean(), rel=1e-3)
    assert quality["gap"]["standard_error"] == pytest.approx(np.sqrt(gap.var(ddof=1) / N), rel=1e-3)
    assert "never a figure of quality" in quality["top_k"]["label"]


def test_of_packed_conversations_only_what_holds_text_is_measured(tokenizer, packed):
    certificate = examine(untrained("hybrid"), tokenizer, packed)
    assert certificate["causal"], certificate["failed"]
    lengths = [packed.plan.lengths[a:b].sum() for a, b in itertools.pairwise(packed.plan.rows)]
    text = np.arange(T) < np.array(lengths)[:, None]
    assert certificate["rows"] == len(lengths) > B
    assert certificate["tokens"] == text.sum() < 0.8 * text.size
    losses, counts, taken = [], [], []
    for batch in batches_of(packed):
        real = is_real(batch)
        logits = logits_of("hybrid", batch, CAUSAL).astype(np.float64)
        loss = np.log(np.exp(logits).sum(axis=2)) - np.take_along_axis(logits, batch["targets"][:, :, None], axis=2)[:, :, 0]
        losses += (loss * batch["weights"]).sum(axis=1)[real].tolist()
        counts += batch["weights"].sum(axis=1)[real].tolist()
        taken.append(forward("hybrid").hidden(batch, CAUSAL)[1]["taken_BT"][:, real])
    quality, depth = (certificate["measures"][name] for name in ("cross_entropy", "depth"))
    assert quality["tokens"] == sum(counts) < text.sum()
    assert quality["causal"]["nats_per_token"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert depth["tokens"] == text.sum()
    for layer, taken_NT in zip(depth["layers"], np.concatenate(taken, axis=1), strict=True):
        assert layer["realised_capacity"] == pytest.approx(taken_NT[text].mean())
    assert prefixes(forward("dense"), batches_of(packed), [T - 1], CAUSAL)["tokens"] == text[:, : T - 1].sum()
    n = len(lengths)
    points = [1 + row * (length - 1) // n for row, length in enumerate(lengths)]
    assert swaps(forward("dense"), batches_of(packed), V, CAUSAL)["tokens"] == 3 * sum(points)


def test_prompts_of_packed_rows_are_of_one_conversation(packed):
    batches = batches_of(packed)
    documents = [
        packed.stream.read(start, start + length).tolist()
        for start, length in zip(packed.plan.starts, packed.plan.lengths, strict=True)
    ]
    for length in (3, T):
        for prompt in certify._prompts(batches, length):
            assert any(prompt == each[: len(prompt)] for each in documents)


def test_the_standard_error_is_that_of_a_ratio():
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 30, (4000, 50))
    sums = counts * 2.0 + draw.normal(size=counts.shape) * np.sqrt(counts)
    spread = np.std(sums.sum(axis=1) / counts.sum(axis=1))
    assert np.mean([standard_error(*each) for each in zip(sums, counts, strict=True)]) == pytest.approx(spread, rel=0.05)
    means = draw.normal(size=20)
    assert standard_error(means * 7, np.full(20, 7)) == pytest.approx(np.std(means, ddof=1) / np.sqrt(20))


def test_the_difference_of_prefixes_is_that_of_the_logits(held_out):
    batch = batches_of(held_out)[0]
    short = {name: batch[name][:, :5] for name in batch}
    whole, alone = logits_of("hybrid", batch, TOP)[:, :5], logits_of("hybrid", short, TOP)
    found = prefixes(forward("hybrid"), [batch], [5], TOP)
    assert found["relative"] == pytest.approx(np.abs(whole - alone).max() / np.abs(whole).max(), rel=1e-3)
    assert found["tokens"] == 5 * B
    row, position, _ = np.unravel_index(np.argmax(np.abs(whole - alone)), whole.shape)
    assert found["where"] == {"row": row, "position": position}


def test_every_batch_and_every_length_of_prefixes_has_its_turn(held_out):
    seen = []

    class Watched(Forward):
        def hidden(self, batch, mode):
            seen.append((int(batch["inputs"][0, 0]), batch["inputs"].shape[1]))
            return super().hidden(batch, mode)

    batches = batches_of(held_out)
    watched = Watched(*untrained("dense")[1:], jnp.float32, Passes(QUIET, 1))
    for lengths in ([4, 8, 12, 15], [7]):
        seen.clear()
        found = prefixes(watched, batches, lengths, CAUSAL)
        assert {length for _, length in seen} == {T, *lengths}
        assert {first for first, _ in seen} == {int(batch["inputs"][0, 0]) for batch in batches}
        assert found["holds"]


# --------------------------------------------------------------------------------------------------- planted leaks


def test_causal_routing_that_takes_the_top_of_a_row_is_refused(monkeypatch, tokenizer, held_out):
    honest = MoD.__call__
    monkeypatch.setattr(
        MoD, "__call__", lambda self, z, real, positions, layer, _, row: honest(self, z, real, positions, layer, True, row)
    )
    certificate = examine(untrained("depth alone"), tokenizer, held_out)
    assert not certificate["causal"]
    assert {"prefixes alone", "swapped suffixes"} <= {each.partition(":")[0] for each in certificate["failed"]}
    for name in ("prefix", "suffix"):
        measure = certificate["measures"][name]
        assert measure["precision"] == "float32"
        assert "no near-tie" in measure["settled"]
        assert measure["flips"] > 0


def test_a_choice_that_knows_where_the_text_of_a_row_ends_is_refused(monkeypatch, tokenizer):
    """The last token before what is empty ends its document: rows as full as packed ones show it nowhere else."""
    stream = Noise(V - len(tokenizer.control), 15 * 12, seed=6)
    stream._tokens[14::15] = tokenizer.control["<|document_end|>"]
    rows = PackedRows(stream, plan(np.arange(0, 15 * 13, 15), T))
    honest = MoD.__call__

    def knows(self, z_BTD, real_BT, *others):
        return honest(self, z_BTD, real_BT & jnp.pad(real_BT[:, 1:], ((0, 0), (0, 1)), constant_values=True), *others)

    assert examine(untrained("depth alone"), tokenizer, rows)["causal"]
    monkeypatch.setattr(MoD, "__call__", knows)
    certificate = examine(untrained("depth alone"), tokenizer, rows)
    assert not certificate["causal"]
    assert "swapped suffixes" in {each.partition(":")[0] for each in certificate["failed"]}


@pytest.fixture
def peeking(monkeypatch):
    """Attention sees one token too many."""

    def attend(q, k, v, segments, form):
        return attend_chunk(q, k, v, segments, segments, 1)

    monkeypatch.setattr(lumina_jax.attention, "attend", attend)


def test_attention_that_sees_the_next_token_is_refused(peeking, tokenizer, held_out):
    certificate = examine(untrained("one layer"), tokenizer, held_out)
    failed = {each.partition(":")[0] for each in certificate["failed"]}
    assert {"prefixes alone", "swapped suffixes", "generation"} <= failed
    where = certificate["measures"]["suffix"]["where"]
    assert where["position"] == (1 + np.arange(N) * (T - 1) // N)[where["row"]] - 1  # the token before the point, no other


def test_a_leak_in_one_row_and_token_is_found_wherever_it_is(monkeypatch, held_out):
    batches = batches_of(held_out)
    honest = Forward.hidden

    def leaking(self, batch, mode):
        hidden_BTD, depth = honest(self, batch, mode)
        last = jnp.asarray(batch["inputs"])[:, -1].astype(hidden_BTD.dtype)  # what the row ends with
        return hidden_BTD.at[1, 0, 0].add(1e-2 * last[1]), depth

    run = forward("dense")
    assert swaps(run, batches, V, CAUSAL)["holds"]
    monkeypatch.setattr(Forward, "hidden", leaking)
    found = swaps(run, batches, V, CAUSAL)
    assert not found["holds"]
    assert found["where"]["position"] == 0
    assert found["where"]["row"] % B == 1
    assert not prefixes(run, batches, [8], CAUSAL)["holds"]


def copying():
    """A model that says its input again."""
    config = tiny("dense", model={"embedding_std": 3.0, "d_model": 32})
    return config, state_shapes(config)[1], jax.jit(lambda: init_state(config)[1].variables)()


def test_labels_that_are_the_inputs_are_caught_by_random_tokens(monkeypatch, tokenizer, held_out):
    subject = copying()

    def found():
        noise = Batches(Rows(Noise(V, N * T + 1), T, held_out.document_end_id), B, seed=0, shuffle=False)
        return noise_losses(of(subject), noise, {"causal": CAUSAL}, V)

    honest = found()
    assert honest["holds"]
    assert honest["causal"]["nats_per_token"] > honest["log_vocabulary"] == math.log(V)
    rows = Batches._of

    def leaking(self, numbers):
        batch = rows(self, numbers)
        return batch | {"targets": batch["inputs"]}

    monkeypatch.setattr(Batches, "_of", leaking)
    leaked = found()
    assert not leaked["holds"]
    assert leaked["causal"]["nats_per_token"] < 0.5 * math.log(V)
    assert leaked["causal"]["above_in_standard_errors"] < -20
    certificate = examine(subject, tokenizer, held_out)
    assert any(each.startswith("random tokens") for each in certificate["failed"])


def test_a_model_that_predicts_nothing_has_log_v_on_random_tokens(held_out):
    config, graphdef, variables = untrained("dense")
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: 0 * a if "head" in jax.tree_util.keystr(path) else a, variables.params
    )
    noise = Batches(Rows(Noise(V, N * T + 1), T, 0), B, seed=0, shuffle=False)
    found = noise_losses(of((config, graphdef, Variables(params, variables.biases))), noise, {"causal": CAUSAL}, V)
    assert found["causal"]["nats_per_token"] == pytest.approx(math.log(V), rel=1e-6)
    assert found["holds"]


def test_random_tokens_are_of_the_whole_vocabulary_and_always_the_same():
    tokens = Noise(7, 7000).read(0, 7000)
    assert np.bincount(tokens).min() > 850
    assert np.array_equal(tokens[10:20], Noise(7, 7000).read(10, 20))


def test_tokens_of_the_cache_that_are_not_the_likeliest_are_refused(monkeypatch, tokenizer, held_out):
    honest = Generator.tokens

    def wrong(self, prompt, count, sampling):
        tokens = list(honest(self, prompt, count, sampling))
        return [*tokens[:-1], (tokens[-1] + 1) % 290]

    monkeypatch.setattr(Generator, "tokens", wrong)
    certificate = examine(untrained("dense"), tokenizer, held_out)
    assert [each.partition(":")[0] for each in certificate["failed"]] == ["generation"]
    assert certificate["measures"]["generation"]["different_tokens"] == 4


def test_weights_that_are_not_numbers_are_refused(tokenizer, held_out):
    config, graphdef, variables = untrained("dense")
    broken = Variables(jax.tree.map(lambda a: a * jnp.nan, variables.params), variables.biases)
    certificate = examine((config, graphdef, broken), tokenizer, held_out)
    assert len(certificate["failed"]) == 4


# ------------------------------------------------------------------------------------------------------- rounding


class Fixed:
    """Stands for a pass: the differences it is told."""

    kinds = ("dense+mod",)

    def __init__(self, difference_BT, logit_BT):
        self.told = [np.float64(difference_BT), np.float64(logit_BT)]

    def differences(self, one_BTD, other_BTD):
        return self.told


def test_flips_of_depth_are_counted_with_their_margins_where_tokens_count():
    one = {"taken_BT": np.array([[[True, False, True]]]), "logit_BT": np.array([[[1e-7, -2.0, 5.0]]])}
    other = {"taken_BT": np.array([[[False, False, False]]]), "logit_BT": np.array([[[-3e-7, -2.0, 4.0]]])}
    comparison = Comparison()
    comparison.add(Fixed([[1e-7, 0, 9]], [[1, 2, 50]]), (None, one), (None, other), np.array([[True, True, False]]), 8)
    found = comparison.found("float32")
    assert (found["flips"], found["decisions"], found["tokens"]) == (1, 2, 2)
    assert found["largest_margin_of_a_flip"] == pytest.approx(3e-7)
    assert found["largest_depth_logit"] == 2.0
    assert found["relative"] == pytest.approx(5e-8)
    assert not found["holds"]  # a flip is measured again in float64, however small the difference that it made


def test_a_difference_that_is_not_a_number_is_never_small():
    comparison = Comparison()
    for value in (math.nan, 1e-9):
        comparison.add(Fixed([[value]], [[1.0]]), (None, {}), (None, {}), np.array([[True]]), 0)
    assert math.isnan(comparison.difference)
    assert not comparison.found("float32")["holds"]


def test_what_only_rounding_moved_is_settled_in_float64():
    asked = []

    def measure(run):
        asked.append(run.name)
        value = 1 + jnp.asarray(1e-10, run.dtype)  # lost in float32
        return {"holds": bool(value > 1), "of": run.name, "relative": 5e-5}

    found = settled(measure, forward("dense"))
    assert asked == ["float32", "float64"]
    assert (found["holds"], found["of"], found["in_float32"]["of"]) == (True, "float64", "float32")
    assert found["settled"].startswith("float64 counts")
    asked.clear()
    assert settled(lambda run: {"holds": True, "of": run.name}, forward("dense")) == {"holds": True, "of": "float32"}


def leaking_in(monkeypatch, dtype):
    """Attention sees all that follows in this precision, and nothing in others."""

    def attend(q, k, v, segments, form):
        return attend_chunk(q, k, v, segments, segments, T if q.dtype == dtype else 0)

    monkeypatch.setattr(lumina_jax.attention, "attend", attend)


@pytest.mark.parametrize("name", ["dense", "hybrid", "experts"])
def test_a_leak_in_float32_alone_is_not_forgiven(monkeypatch, held_out, name):
    leaking_in(monkeypatch, jnp.float32)
    batches, run = batches_of(held_out), of(untrained(name))
    for measure in (
        partial(prefixes, batches=batches, lengths=[8, 15], mode=CAUSAL),
        partial(swaps, batches=batches, vocab_size=V, mode=CAUSAL),
    ):
        found = settled(measure, run)
        assert found["relative"] > 0.1
        assert (found["holds"], found["precision"]) == (False, "float32")
        assert found["settled"].startswith("float32 counts: ")
        if name != "dense":
            assert found.get("flips", 0) + found["expert_flips"] > 0  # which alone would have forgiven it
            assert found["relative_before_flips"] > NEAR
            near_ties = found | {"largest_margin_of_a_first_flip": 0.0}
            assert "before any choice differed" in why_final(near_ties, run)


@pytest.mark.parametrize("name", ["hybrid", "experts"])
def test_choices_that_a_leak_moved_everywhere_are_told_by_their_margins(monkeypatch, held_out, name):
    leaking_in(monkeypatch, jnp.float32)
    found = prefixes(of(untrained(name)), batches_of(held_out), [8, 15], CAUSAL)
    assert found["largest_margin_of_a_first_flip"] > 10 * NEAR
    assert "no near-tie" in why_final(found | {"relative_before_flips": 0.0}, forward(name))


def test_routing_alone_forgives_nothing(held_out):
    found = prefixes(forward("hybrid"), batches_of(held_out)[:1], [8], CAUSAL)
    assert found["flips"] == found["expert_flips"] == 0
    assert "no choice" in why_final(found | {"holds": False, "relative": 5e-5}, forward("hybrid"))


def tie_of_depth(batch):
    """The model "depth alone" with the first layer's decision about token 3 of row 0 within rounding of 0."""
    config, graphdef, variables = untrained("depth alone")
    logit = forward("depth alone").hidden(batch, CAUSAL)[1]["logit_BT"][0, 0, 3]
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: a.at[0].add(-logit) if jax.tree_util.keystr(path).endswith("['mod']['bias'].value") else a,
        variables.params,
    )
    return config, graphdef, Variables(params, variables.biases)


def tie_of_experts(batch):
    """The model "experts" with the choice of the first layer for token 3 of row 0 within rounding of another."""
    config, graphdef, variables = untrained("experts")
    kept, honest = [], lumina_jax.moe.margin

    def watched(moe, preference_BTA):
        kept.append(preference_BTA)
        return honest(moe, preference_BTA)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(lumina_jax.moe, "margin", watched)
        of(untrained("experts")).hidden(batch, CAUSAL)
    preference = np.asarray(kept[0])[0, 3]
    order = np.argsort(-preference)
    gap = preference[order[1]] - preference[order[2]]
    return config, graphdef, Variables(variables.params, jax.tree.map(lambda a: a.at[0, order[2]].add(gap), variables.biases))


@pytest.mark.parametrize("made", [tie_of_depth, tie_of_experts])
def test_a_near_tie_that_rounding_decides_is_forgiven(monkeypatch, held_out, made):
    batch = batches_of(held_out)[0]
    subject = made(batch)

    def rounded(x):
        """As if whole rows and prefixes were added up in another order."""
        return x * (1 + (2e-6 if x.shape[1] == T else -2e-6)) if x.dtype == jnp.float32 else x

    wide, honest = lumina_jax.mod.at_least_float32, lumina_jax.moe.route
    monkeypatch.setattr(lumina_jax.mod, "at_least_float32", lambda x: rounded(wide(x)))
    monkeypatch.setattr(lumina_jax.moe, "route", lambda moe, logits, bias: honest(moe, rounded(logits), bias))
    found = settled(partial(prefixes, batches=[batch], lengths=[8], mode=CAUSAL), of(subject))
    in_float32 = found["in_float32"]
    assert in_float32.get("flips", 0) + in_float32.get("expert_flips", 0) > 0
    assert in_float32["relative"] > NEAR > in_float32["largest_margin_of_a_first_flip"]
    assert (found["holds"], found["precision"]) == (True, "float64")
    assert found["settled"].startswith("float64 counts")


def test_another_form_of_attention_in_float64_settles_nothing(monkeypatch, held_out):
    run = of(untrained("dense"))
    run.hidden(batches_of(held_out)[0], CAUSAL)
    assert not why_final({"relative": 5e-5}, run)
    monkeypatch.setitem(lumina_jax.attend.FORMS, "quick", Form("quick", dtypes=("float32",), length_multiple=T))
    monkeypatch.setitem(lumina_jax.attend.PREFERRED, "cpu", "quick")
    assert why_final({"relative": 5e-5}, run).startswith("attention over 16 tokens would be chunked in float64, and not quick")
    run.lengths = {T + 1}
    assert not why_final({"relative": 5e-5}, run)


@pytest.mark.parametrize("name", ["hybrid", "block"])
def test_passes_with_the_cache_are_those_without(held_out, name):
    batch, run = batches_of(held_out)[0], forward(name)
    one = {key: batch[key][:1] for key in ("inputs", "segments", "positions")} | {"segments": np.zeros((1, T), np.int32)}
    one["positions"] = np.arange(T, dtype=np.int32)[None]
    comparison = Comparison()
    reached = comparison.add(
        run, run.hidden(one, CAUSAL), padded(run.decoded(one["inputs"][0, :12].tolist(), 5), T), np.arange(T)[None] < 12, 0
    )
    found = comparison.found("float32")
    assert found["relative"] < 1e-5
    assert found["tokens"] == 12
    assert found["flips"] == found.get("expert_flips", 0) == 0
    assert not reached.any()


def test_a_cache_that_is_wrong_in_float32_alone_is_not_forgiven(monkeypatch, tokenizer, held_out):
    honest = lumina_jax.attention.attend_cached
    monkeypatch.setattr(
        lumina_jax.attention, "attend_cached", lambda q, *others: honest(-3 * q if q.dtype == jnp.float32 else q, *others)
    )
    config, *parts = untrained("hybrid")
    found = settled(partial(certify.generation, config, tokenizer, batches_of(held_out)), of((config, *parts)))
    assert (found["holds"], found["precision"]) == (False, "float32")
    assert found["different_tokens"] > 0
    assert found["settled"].startswith("float32 counts: ")


def test_the_margin_of_a_choice_is_to_the_next_alternative_or_group():
    model = tiny("moe").model.moe
    preference = jnp.array([[[0.5, 0.1, 0.4, 0.3]]])
    assert margin(model, preference).item() == pytest.approx((0.4 - 0.3) / 0.4)
    grouped = replace(model, num_groups=2, top_groups=1)  # 0.6 against 0.7
    assert margin(grouped, preference).item() == pytest.approx(1 / 7, rel=1e-5)
    assert margin(replace(model, top_k=4), preference).item() == math.inf


def test_float64_is_that_in_earnest(held_out):
    with jax.enable_x64(True):
        found = prefixes(of(untrained("hybrid"), jnp.float64), batches_of(held_out), [5, 15], CAUSAL)
    assert found["precision"] == "float64"
    assert found["relative"] < 1e-13


def test_the_depth_capacity_is_that_of_the_last_step_trained():
    config = tiny("moe+mod", mod={"capacity": 0.5, "anneal_steps": 80}, steps=100)
    found = [certify.as_trained(config, step).model.mod.capacity for step in (0, 1, 40, 41, 80, 81)]
    assert found == [1.0, 1.0, 0.8125, 0.75, 0.5625, 0.5]  # eight falls, one every ten steps
    assert config.model.mod.anneal_steps == 80


# ----------------------------------------------------------------------------------------------------- a trained run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny("moe+mod", steps=6, eval_every=3)
    config.data.source, config.checkpoint.every, config.mesh.data = "synthetic", 3, 1
    config.monitor.sample_tokens = 4
    directory = RunDirectory(tmp_path_factory.mktemp("runs") / "hybrid")
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        patch.setattr("lumina_jax.device.matmul_peak", lambda dtype: 1e12)
        assert train_and_evaluate(config, directory.path) == 0
    return directory


def certified(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        cli.run(["certify", *map(str, arguments)])
    return exit.value.code, capsys.readouterr().out


def test_the_command_prints_and_writes_the_certificate(run, capsys):
    code, printed = certified(capsys, run.path, "--rows", 0, "--json")
    certificate = json.loads(printed)
    assert code == 0
    assert json.loads((run.path / "certificate.json").read_text()) == certificate
    assert certificate["step"] == 6
    assert certificate["config"] == config_fingerprint(load(str(run.path)))
    assert certificate["data"] == json.loads(run.data.read_text())["fingerprint"]
    assert certificate["jax"] == jax.__version__
    result = json.loads(run.result.read_text())["held_out"]
    quality, depth = (certificate["measures"][name] for name in ("cross_entropy", "depth"))
    assert quality["causal"]["nats_per_token"] == pytest.approx(result["loss"], rel=1e-6)
    assert quality["causal"]["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert (quality["tokens"], quality["bytes"]) == (result["tokens"], result["bytes"])
    assert [layer["realised_capacity"] for layer in depth["layers"]] == pytest.approx(result["mod_capacity"], rel=1e-6)


def test_a_run_of_conversations_is_judged_by_the_rows_that_it_evaluates_on(tmp_path, monkeypatch, capsys):
    config = tiny("dense+mod", steps=1, optim={"warmup_steps": 0})
    config.data.source, config.data.held_out, config.mesh.data = chats(tmp_path / "chats.jsonl"), 0.2, 1
    config.data.cache_dir, config.monitor.sample_tokens = str(tmp_path / "cache"), 1
    monkeypatch.setattr("lumina_jax.device.matmul_peak", lambda dtype: 1e12)
    assert train_and_evaluate(config, tmp_path / "run") == 0
    capsys.readouterr()
    code, printed = certified(capsys, tmp_path / "run", "--rows", 0, "--json")
    quality = json.loads(printed)["measures"]["cross_entropy"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())["held_out"]
    assert code == 0
    assert (quality["tokens"], quality["bytes"]) == (result["tokens"], result["bytes"])
    assert quality["causal"]["nats_per_token"] == pytest.approx(result["loss"], rel=1e-6)
    run = RunDirectory(tmp_path / "run")
    corpora = corpora_of(run, load(str(run.path)), lambda line: None)
    seen = lumina_jax.routing.look(run, config, *corpora.values(), 9999, False)
    (evaluated,) = held_out_rows(config, corpora).values()
    batches = list(evaluated.evaluation())
    assert np.array_equal(seen.tokens_RT, np.concatenate([batch["inputs"][is_real(batch)] for batch in batches]))
    assert quality["tokens"] < seen.filled_RT.sum() < seen.filled_RT.size


def test_a_leak_exits_6_and_says_what_failed(run, capsys, peeking):
    code, printed = certified(capsys, run.path, "--rows", 6, "--best")
    assert code == NOT_CAUSAL == 6
    assert "NOT causal" in printed
    assert "swapped suffixes: " in printed
    assert "NOT causal" in (run.path / "certificate.html").read_text()
    assert not json.loads((run.path / "certificate.json").read_text())["causal"]


def test_the_model_examined_is_that_of_the_stage_of_annealing(monkeypatch, run, tmp_path):
    annealed = RunDirectory(tmp_path / "annealed")
    shutil.copytree(run.path, annealed.path)
    config = json.loads(run.config.read_text())
    # Trained elsewhere: neither form runs here.
    config["model"]["mod"] |= {"capacity": 0.25, "anneal_steps": 8}
    config["train"]["steps"] = 9
    config["model"] |= {"attention_form": "splash"}
    config["model"]["moe"]["grouped_form"] = "ragged"
    annealed.config.write_text(json.dumps(config))
    taken = []
    honest = Forward.hidden

    def watched(self, batch, mode):
        hidden_BTD, depth = honest(self, batch, mode)
        if mode == TOP:
            real_B = np.sum(batch["segments"] >= 0, axis=1)
            taken.append((batch["inputs"].shape[1], real_B, depth["taken_BT"].sum(axis=2)))
        return hidden_BTD, depth

    monkeypatch.setattr(Forward, "hidden", watched)
    certificate = certify.certify(str(annealed.path), 4, False, QUIET)
    share = 1 - 0.75 * 5 / 8  # five falls of eight before step 5, the last of six
    assert certificate["measures"]["depth"]["share_of_top"] == math.ceil(share * T) / T
    assert {length for length, *_ in taken} >= {T, T // 4}
    for length, real_B, count_LB in taken:
        assert (count_LB == np.minimum(math.ceil(share * length), real_B)).all()


def test_other_data_than_the_run_began_with_is_refused(run, tmp_path):
    other = RunDirectory(tmp_path / "other")
    other.path.mkdir()
    (other.path / "tokenizer").symlink_to(run.tokenizer)
    other.config.write_text(run.config.read_text())
    other.data.write_text(json.dumps(json.loads(run.data.read_text()) | {"fingerprint": "0" * 64}))
    with pytest.raises(DataError, match=r"trained on other data .* held out is not known"):
        certify.certify(str(other.path), 4, False, QUIET)
    other.data.write_text(run.data.read_text())
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        certify.certify(str(other.path), 4, False, QUIET)


def test_a_stream_that_takes_ascii_alone_gets_the_certificate(monkeypatch, run, found, tmp_path):
    named = tmp_path / "läufe"
    named.mkdir()
    (named / "config.json").write_text(run.config.read_text())
    about = {"step": 6, "checkpoint": "newest", "config": "", "data": "", "tokenizer": "", "jax": "", "device": "cpu"}
    monkeypatch.setattr(certify, "certify", lambda path, *others: {**about, "run": path, **found["hybrid"]})
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with pytest.raises(SystemExit):
        cli.run(["certify", str(named)])
    stream.flush()
    assert rb"l\xe4ufe, step 6" in stream.buffer.getvalue()


def test_random_tokens_are_64_rows_however_few_are_asked_for(found):
    assert found["dense"]["rows"] == N
    assert found["dense"]["measures"]["noise"]["tokens"] == 64 * T


def test_the_generator_keeps_float64(tokenizer):
    config, graphdef, variables = untrained("dense")
    with jax.enable_x64(True):
        generator = Generator(config, graphdef, variables, tokenizer)
        generator.dtype = jnp.float64
        kept, honest = [], lumina_jax.generate.filter_logits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lumina_jax.generate, "filter_logits", lambda x, *others: kept.append(x.dtype) or honest(x, *others))
            list(generator.tokens([1, 2], 2, Sampling(temperature=0.0)))
    assert set(kept) == {jnp.dtype("float64")}


@pytest.mark.parametrize("rows", ["-1", "1"])
def test_too_few_rows_are_refused_before_anything_is_loaded(run, rows):
    with pytest.raises(UsageError, match=f"--rows = {rows}: must be at least 2"):
        cli.run(["certify", str(run.path), "--rows", rows])


def test_routing_modes_are_those_of_evaluation():
    assert list(certify.ROUTINGS.values()) == [Mode(training=False, top=False), Mode(training=False, top=True)]
