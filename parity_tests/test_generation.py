"""Greedy continuations and causal routing, with a key/value cache in both frameworks; and what bfloat16 makes of both.

B rows, T positions, V vocabulary.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lumina_jax.generate
import lumina_jax.model
import lumina_torch.generate
import lumina_torch.model
from lumina.generation import Sampling
from lumina.tokenizer import train_bpe
from parity_tests.lanes import record
from parity_tests.pairs import CASES, pair
from tests.lumina_jax.tiny import random_batch

CASES = CASES | {
    name: replace(CASES[case], model=replace(CASES[case].model, mod=replace(CASES[case].model.mod, **change)))
    for name, case, change in (
        ("hybrid, predicted", "hybrid", {"predictor_width": 4}),
        ("hybrid of blocks, at random", "hybrid of blocks, dropless", {"router": "random"}),
    )
}
DECODED = [case for case in CASES if "capacity" not in case]  # which matters in training alone
GREEDY = Sampling(temperature=0.0)


def legible(config):
    """The case with a head of its own, or an untrained model would only repeat the last token."""
    model = replace(config.model, tie_embeddings=False, embedding_std=0.5)
    return replace(config, model=model, data=replace(config.data, sequence_length=40))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["".join(f"def f{i}(x):\n    return x + {i * 37 % 101}\n" for i in range(60))], 300)


@pytest.mark.parametrize("case", DECODED)
def test_greedy_tokens_are_the_same(case, tokenizer):
    config = legible(CASES[case])
    graphdef, state, twin = pair(config)
    ours = lumina_jax.generate.Generator(config, graphdef, state.variables, tokenizer)
    others = lumina_torch.generate.Generator(config, twin.transformer, tokenizer)
    differing, distinct = 0, set()
    for seed, length in enumerate((9, 12)):
        prompt = np.random.default_rng(seed).integers(0, 290, length).tolist()
        expected, found = (list(g.tokens(prompt, 20, GREEDY)) for g in (ours, others))
        differing += sum(a != b for a, b in zip(expected, found, strict=True))
        distinct |= set(expected)
    assert len(distinct) > 3
    record("generation", case, differing)


@pytest.mark.parametrize("case", [case for case in DECODED if case != "dense"])
def test_causal_routing_is_the_same(case):
    config, batch = legible(CASES[case]), random_batch()
    graphdef, state, twin = pair(config)
    rows = [batch[name] for name in ("inputs", "segments", "positions")]
    mode = lumina_jax.model.Mode(tell=True)
    model = lumina_jax.model.merge(graphdef, state.variables)
    expected = jax.jit(lambda *rows: model(*rows, dtype=jnp.float32, mode=mode)[1])(*rows)
    with torch.no_grad():
        tensors = (torch.tensor(np.array(row), dtype=torch.long) for row in rows)
        found = twin.transformer(*tensors, dtype=torch.float32, mode=lumina_torch.model.Mode(tell=True))[1]
    for group, name in (("mod", "taken_BT"), ("moe", "experts_BTk")):
        if group in expected:
            chosen = np.asarray(expected[group][name])
            assert len(np.unique(chosen)) > 1
            assert np.array_equal(found[group][name].numpy(), chosen)


@pytest.mark.parametrize("case", ["dense", "moe top-2, dropless", "mod", "hybrid"])
def test_bfloat16_gives_nearly_the_same_distribution(case):
    config, batch = legible(CASES[case]), random_batch()
    graphdef, state, twin = pair(config)
    rows = [batch[name] for name in ("inputs", "segments", "positions")]

    @jax.jit
    def logits(variables, *rows):
        model = lumina_jax.model.merge(graphdef, variables)
        return (model(*rows, dtype=jnp.bfloat16)[0] @ model.head_DV(jnp.bfloat16)).astype(jnp.float32)

    ours = torch.tensor(np.array(logits(state.variables, *rows)))
    with torch.no_grad():
        tensors = (torch.tensor(np.array(row), dtype=torch.long) for row in rows)
        hidden_BTD = twin.transformer(*tensors, dtype=torch.bfloat16)[0]
        others = (hidden_BTD @ twin.transformer.head_DV(torch.bfloat16)).float()
    assert not torch.equal(ours, others)
    p, q = ours.log_softmax(-1), others.log_softmax(-1)
    record("bf16, KL", case, float((p.exp() * (p - q)).sum(-1).mean()))
    record("bf16, cosine", case, 1 - float(torch.cosine_similarity(ours.flatten(), others.flatten(), dim=0)))
