"""Held-out figures against sums over all tokens in numpy, and the routing they are taken under.

B rows, T positions, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch

from lumina.data.rows import Batches, Rows
from lumina_torch.evaluate import evaluate
from lumina_torch.model import state_by_name
from lumina_torch.step import init_state, make_eval_step
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import T, V, random_batch, tiny

ROWS = 7
TOKENS = np.random.default_rng(1).integers(1, V, ROWS * T + 1).astype(np.int32)
TOKEN_BYTES = np.random.default_rng(2).integers(0, 9, V).astype(np.int32)
NATS = torch.from_numpy(np.random.default_rng(3).uniform(1, 9, V))  # what each target costs a model that only counts


class Stream:
    name, num_tokens = "held_out", len(TOKENS)

    def read(self, start, stop):
        return TOKENS[start:stop]


def held_out(batch_size):
    """Rows in order; 7 are no multiple of 4, so that the last batch of 4 is padded."""
    return Batches(Rows(Stream(), T, document_end_id=0), batch_size, seed=0, shuffle=False)


def counting_step(transformer, batch):
    """Sums as of a model of one depth-routed layer that takes every even target, and is right about it."""
    weights, targets = torch.as_tensor(batch["weights"]).double(), torch.as_tensor(batch["targets"]).long()
    even = (weights * (targets % 2 == 0)).sum()
    text_bytes = (torch.from_numpy(TOKEN_BYTES)[targets] * (weights > 0)).sum()
    return {
        "loss": (weights * NATS[targets]).sum(),
        "correct": even,
        "weight": weights.sum(),
        "taken_L": even[None],
        "text_bytes": text_bytes,
    }


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_figures_are_sums_over_all_tokens_whatever_the_batches(batch_size):
    found = evaluate(counting_step, None, held_out(batch_size).evaluation())
    targets = TOKENS[1:]
    nats, count = float(NATS[targets].sum()), int(np.sum(TOKEN_BYTES[targets]))
    assert (found.pop("tokens"), found.pop("bytes")) == (ROWS * T, count)
    assert found.pop("mod_capacity") == pytest.approx([np.mean(targets % 2 == 0)], rel=1e-12)
    expected = {
        "loss": nats / len(targets),
        "perplexity": math.exp(nats / len(targets)),
        "bits_per_byte": nats / math.log(2) / count,
        "accuracy": np.mean(targets % 2 == 0),
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_watchdog_hears_of_every_batch():
    heard = []
    evaluate(counting_step, None, held_out(4).evaluation(), lambda: heard.append(1))
    assert len(heard) == 2


# --------------------------------------------------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def hybrid():
    """(config, evaluation step, transformer) whose depth routers take about half of the tokens."""
    config = tiny()
    return config, make_eval_step(config, TOKEN_BYTES), init_state(config).transformer


def test_the_step_sums_what_the_oracle_finds_under_causal_routing(hybrid):
    config, step, transformer = hybrid
    batch = random_batch() | {"weights": np.random.default_rng(5).integers(0, 3, (4, T)).astype(np.float32)}
    named = {name: tensor.detach().numpy() for name, tensor in state_by_name(transformer).items()}
    logits, metrics = oracles.transformer(
        config.model, named, batch["inputs"], batch["segments"], batch["positions"], training=False
    )
    top = np.max(logits, axis=-1, keepdims=True)
    nats = top + np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True)) - logits
    nats = np.take_along_axis(nats, batch["targets"][..., None], axis=-1)[..., 0]
    found = step(transformer, batch)
    assert_close(found["loss"], np.sum(batch["weights"] * nats), 5e-6)
    assert float(found["weight"]) == batch["weights"].sum()
    assert int(found["text_bytes"]) == TOKEN_BYTES[batch["targets"][batch["weights"] > 0]].sum()
    assert float(found["correct"]) == np.sum(batch["weights"] * (np.argmax(logits, axis=-1) == batch["targets"]))
    taken_LBT = metrics["mod"]["taken_BT"]
    assert_close(found["taken_L"], np.sum(taken_LBT * batch["weights"], axis=(1, 2)), 1e-6)
    assert np.all((taken_LBT.mean(axis=(1, 2)) > 0) & (taken_LBT.mean(axis=(1, 2)) < 1))


def test_no_token_is_evaluated_with_a_look_at_later_ones(hybrid):
    _, step, transformer = hybrid
    batch, other = random_batch(), random_batch(seed=9)
    weights = np.zeros((4, T), np.float32)
    weights[:, :8] = 1
    changed = {name: np.concatenate([batch[name][:, :8], other[name][:, 8:]], axis=1) for name in ("inputs", "targets")}
    a, b = (float(step(transformer, batch | each | {"weights": weights})["loss"]) for each in ({}, changed))
    assert a == pytest.approx(b, rel=1e-6)


def test_the_same_rows_cost_the_same_in_any_batches(hybrid):
    _, step, transformer = hybrid
    whole, padded = (evaluate(step, transformer, held_out(size).evaluation()) for size in (7, 4))
    assert padded.keys() == whole.keys()
    for name in whole:
        assert padded[name] == pytest.approx(whole[name], rel=1e-6), name


def test_a_model_without_depth_routing_reports_no_capacity():
    config = tiny("dense")
    found = evaluate(make_eval_step(config, TOKEN_BYTES), init_state(config).transformer, held_out(7).evaluation())
    assert "mod_capacity" not in found
    assert abs(found["loss"] - math.log(V)) < 0.1


def test_evaluation_keeps_no_graph(hybrid):
    _, step, transformer = hybrid
    assert not any(tensor.requires_grad for tensor in step(transformer, random_batch()).values())
