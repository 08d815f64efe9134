"""Held-out figures against sums over all tokens in numpy, and the routing they are taken under.

B rows, T positions, V vocabulary.
"""

import math

import jax
import numpy as np
import pytest

from lumina.data.rows import Batches, Rows
from lumina.mesh import Sizes
from lumina_jax.evaluate import evaluate
from lumina_jax.mesh import mesh_of
from lumina_jax.model import by_canonical_name
from lumina_jax.step import init_state, make_eval_step, state_shapes
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import T, V, random_batch, tiny

ROWS = 7
TOKENS = np.random.default_rng(1).integers(1, V, ROWS * T + 1).astype(np.int32)
TOKEN_BYTES = np.random.default_rng(2).integers(0, 9, V).astype(np.int32)
NATS = np.random.default_rng(3).uniform(1, 9, V)  # what each target costs a model that only counts


class Stream:
    name, num_tokens = "held_out", len(TOKENS)

    def read(self, start, stop):
        return TOKENS[start:stop]


def held_out(batch_size):
    """Rows in order; 7 are no multiple of 4, so that the last batch of 4 is padded."""
    return Batches(Rows(Stream(), T, document_end_id=0), batch_size, seed=0, shuffle=False)


def counting_step(variables, batch):
    """Sums as of a model without depth routing whose loss depends on the target alone; it is right about even targets."""
    weights, targets = batch["weights"].astype(np.float64), batch["targets"]
    return {
        "loss": np.sum(weights * NATS[targets]),
        "correct": np.sum(weights * (targets % 2 == 0)),
        "weight": np.sum(weights),
        "taken_L": np.zeros(0),
        "text_bytes": np.sum(TOKEN_BYTES[targets] * (weights > 0)),
    }


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_figures_are_sums_over_all_tokens_whatever_the_batches(batch_size):
    found = evaluate(counting_step, None, held_out(batch_size).evaluation())
    targets = TOKENS[1:]
    nats, count = np.sum(NATS[targets]), int(np.sum(TOKEN_BYTES[targets]))
    assert found.pop("tokens") == ROWS * T
    assert found.pop("bytes") == count
    expected = {
        "loss": nats / len(targets),
        "perplexity": math.exp(nats / len(targets)),
        "bits_per_byte": nats / math.log(2) / count,
        "accuracy": np.mean(targets % 2 == 0),
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_only_the_first_rows_are_read_when_asked():
    found = evaluate(counting_step, None, held_out(4).evaluation(5))
    assert (found["tokens"], found["bytes"]) == (5 * T, TOKEN_BYTES[TOKENS[1 : 5 * T + 1]].sum())
    assert found["loss"] == pytest.approx(NATS[TOKENS[1 : 5 * T + 1]].mean(), rel=1e-12)


def test_depth_capacity_is_averaged_by_the_tokens_of_each_batch():
    def step(variables, batch):
        shares = np.array([0.25, 1.0]) if batch["weights"].all() else np.array([0.5, 0.0])
        return counting_step(variables, batch) | {"taken_L": shares * batch["weights"].sum()}

    found = evaluate(step, None, held_out(4).evaluation())["mod_capacity"]  # a batch of 4 rows, and one of 3
    assert found == pytest.approx([(4 * 0.25 + 3 * 0.5) / 7, 4 / 7], rel=1e-12)


def test_a_model_without_depth_routing_reports_no_capacity():
    assert "mod_capacity" not in evaluate(counting_step, None, held_out(4).evaluation())


def test_a_diverged_model_has_a_perplexity_all_the_same():
    def step(variables, batch):
        return counting_step(variables, batch) | {"loss": 1e6 * batch["weights"].sum()}

    assert math.isfinite(evaluate(step, None, held_out(4).evaluation())["perplexity"])


# --------------------------------------------------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def hybrid():
    """(config, compiled evaluation step, variables) whose depth routers take about half of the tokens."""
    config = tiny()
    shapes, graphdef = state_shapes(config)
    variables = jax.jit(lambda: init_state(config)[1].variables)()
    return config, jax.jit(make_eval_step(config, graphdef, TOKEN_BYTES)), variables


def test_the_step_sums_what_the_oracle_finds_under_causal_routing(hybrid):
    config, step, variables = hybrid
    batch = random_batch() | {"weights": np.random.default_rng(5).integers(0, 3, (4, T)).astype(np.float32)}
    named = by_canonical_name(config.model, variables.params) | by_canonical_name(config.model, variables.biases)
    logits, metrics = oracles.transformer(
        config.model, named, batch["inputs"], batch["segments"], batch["positions"], training=False
    )
    top = np.max(logits, axis=-1, keepdims=True)
    nats = top + np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True)) - logits
    nats = np.take_along_axis(nats, batch["targets"][..., None], axis=-1)[..., 0]
    found = step(variables, batch)
    assert_close(found["loss"], np.sum(batch["weights"] * nats), 5e-6)
    assert float(found["weight"]) == batch["weights"].sum()
    assert int(found["text_bytes"]) == TOKEN_BYTES[batch["targets"][batch["weights"] > 0]].sum()
    assert float(found["correct"]) == np.sum(batch["weights"] * (np.argmax(logits, axis=-1) == batch["targets"]))
    taken_LBT = metrics["mod"]["taken_BT"]
    assert_close(found["taken_L"], np.sum(taken_LBT * batch["weights"], axis=(1, 2)), 1e-6)
    assert np.all((taken_LBT.mean(axis=(1, 2)) > 0) & (taken_LBT.mean(axis=(1, 2)) < 1))


def test_no_token_is_evaluated_with_a_look_at_later_ones(hybrid):
    _, step, variables = hybrid
    batch, other = random_batch(), random_batch(seed=9)
    weights = np.zeros((4, T), np.float32)
    weights[:, :8] = 1
    changed = {name: np.concatenate([batch[name][:, :8], other[name][:, 8:]], axis=1) for name in ("inputs", "targets")}
    a, b = (float(step(variables, batch | each | {"weights": weights})["loss"]) for each in ({}, changed))
    assert a == pytest.approx(b, rel=1e-6)


def test_eight_devices_sum_what_one_does(hybrid):
    config, step, variables = hybrid
    mesh = mesh_of(Sizes(data=8), jax.devices())
    weights = np.random.default_rng(5).integers(0, 3, (8, T)).astype(np.float32)
    weights[3] = 0  # a device that has padding alone
    batch = random_batch(8) | {"weights": weights}
    several = jax.jit(make_eval_step(config, state_shapes(config)[1], TOKEN_BYTES, mesh))(variables, batch)
    one = step(variables, batch)
    assert set(several) == set(one)
    for name in one:
        assert_close(several[name], one[name], 1e-6)
    assert int(several["text_bytes"]) == TOKEN_BYTES[batch["targets"][weights > 0]].sum()


def test_a_watchdog_hears_of_every_batch():
    heard = []
    evaluate(counting_step, None, held_out(4).evaluation(), lambda: heard.append(1))
    assert len(heard) == 2


def test_the_same_rows_cost_the_same_in_any_batches(hybrid):
    _, step, variables = hybrid
    whole, padded = (evaluate(step, variables, held_out(size).evaluation()) for size in (7, 4))
    assert padded.keys() == whole.keys()
    for name in whole:
        assert padded[name] == pytest.approx(whole[name], rel=1e-6), name
