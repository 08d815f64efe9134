"""Generation: the cache against none, and the filters against a slow oracle.

T positions, V vocabulary.
"""

import copy
import math
import random

import numpy as np
import pytest
import torch

from lumina.errors import UsageError
from lumina.generation import Sampling
from lumina.tokenizer import train_bpe
from lumina_torch.generate import Generator, filter_logits
from lumina_torch.model import create
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import KINDS, tiny

CONTEXT = 40
PADDED = 320  # rows of the embedding, of which the tokenizer has 300
GREEDY = Sampling(temperature=0.0)
TEXT = "".join(f"def f{i}(x):\n    return x + {i * 37 % 101}\n" for i in range(60)) + "naïve 日本語 😀👍 " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 300)


def make(kind, tokenizer, **parts):
    """(generator, logits of the last token of a sequence by one pass over all of it) of an untrained model.

    It has a head of its own, or it would only repeat the last token.
    """
    config = tiny(kind, **parts, model={"vocab_size": PADDED, "embedding_std": 0.5, "tie_embeddings": False})
    config.data.sequence_length = CONTEXT
    transformer = create(config.model, 0)

    @torch.no_grad()
    def last_logits(tokens):
        tokens_1T = torch.tensor([tokens])
        rows = (tokens_1T, torch.zeros_like(tokens_1T), torch.arange(len(tokens))[None])
        hidden_1TD, _, _ = transformer(*rows, dtype=torch.float32)
        return (hidden_1TD[0, -1] @ transformer.head_DV(torch.float32)).numpy()

    return Generator(config, transformer, tokenizer), last_logits


@pytest.fixture(scope="module")
def hybrid(tokenizer):
    return make("moe+mod", tokenizer)


@pytest.fixture(scope="module")
def generator(hybrid):
    return hybrid[0]


def prompt(length):
    return np.random.default_rng(3).integers(0, 290, length).tolist()


def greedy(last_logits, tokenizer, tokens, count, penalty=1.0):
    """The oracle: the whole prefix again for each token, and the most likely one that may be drawn."""
    tokens, found = list(tokens), []
    end = tokenizer.control["<|document_end|>"]
    allowed = [*range(tokenizer.vocab_size - len(tokenizer.control)), end]
    while len(found) < count and end not in found:
        logits = last_logits(tokens).copy()
        for i in set(tokens):
            logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
        found.append(max(allowed, key=lambda i: (logits[i], -i)))
        tokens.append(found[-1])
    return found


# ------------------------------------------------------------------------------------------------ with and without cache


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_with_the_cache_are_those_without(kind, hybrid, tokenizer):
    generator, last_logits = hybrid if kind == "moe+mod" else make(kind, tokenizer)
    for length in (10, 16, 17):  # a cache begins with 16 places: it grows while decoding, or at once
        expected = greedy(last_logits, tokenizer, prompt(length), 14)
        assert len(expected) == 14
        assert len(set(expected)) > 3
        assert list(generator.tokens(prompt(length), 14, GREEDY)) == expected


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("dense+mod", {"mod": {"scope": "block"}}),
        ("moe+mod", {"mod": {"scope": "block", "predictor_width": 4}, "moe": {"noop_experts": 2, "dispatch": "dropless"}}),
        ("dense+mod", {"mod": {"scope": "block", "router": "random"}}),
    ],
    ids=["block", "block_of_experts_and_no_ops_predicted", "block_at_random"],
)
def test_greedy_tokens_of_routed_blocks_with_the_cache_are_those_without(kind, parts, tokenizer):
    generator, last_logits = make(kind, tokenizer, **parts)
    told = []
    for length in (10, 11, 12, 22):  # of which some may end at once
        expected = greedy(last_logits, tokenizer, prompt(length), 14)
        assert list(generator.tokens(prompt(length), 14, GREEDY)) == expected
        told += expected
    assert len(told) > 20
    assert len(set(told)) > 5


def test_a_prompt_may_be_one_token_and_the_result_may_fill_the_context(hybrid, tokenizer):
    generator, last_logits = hybrid
    expected = greedy(last_logits, tokenizer, [7], CONTEXT - 1)
    assert len(expected) == CONTEXT - 1
    assert list(generator.tokens([7], CONTEXT - 1, GREEDY)) == expected


def test_an_empty_prompt_begins_a_document_whose_tokens_do_not_see_the_last_one(hybrid, tokenizer):
    generator, last_logits = hybrid
    (first,) = greedy(last_logits, tokenizer, [generator.end], 1)
    assert first != generator.end
    assert list(generator.tokens([], 9, GREEDY)) == [first, *greedy(last_logits, tokenizer, [first], 8)]


def test_two_requests_at_once_do_not_mix_their_caches(generator):
    alone = list(generator.tokens(prompt(5), 8, GREEDY))
    one, other = generator.tokens(prompt(5), 8, GREEDY), generator.tokens(prompt(9), 8, Sampling(1.5))
    assert [token for token, _ in zip(one, other, strict=True)] == alone


def test_generation_keeps_no_graph_and_changes_no_weight(generator):
    before = {name: p.detach().clone() for name, p in generator.transformer.named_parameters()}
    list(generator.tokens(prompt(5), 3, GREEDY))
    for name, p in generator.transformer.named_parameters():
        assert p.grad is None
        assert p.requires_grad
        assert torch.equal(p, before[name])


# ---------------------------------------------------------------------------------------------------------- sampling


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(generator):
    torch.manual_seed(5)
    a, b, c = (list(generator.tokens(prompt(5), 8, Sampling(temperature=1.5, seed=seed))) for seed in (3, 3, 4))
    assert a == b
    assert a != c


def test_keeping_one_token_is_greedy_at_any_temperature(generator):
    expected = list(generator.tokens(prompt(5), 8, GREEDY))
    for sampling in (Sampling(3.0, top_k=1), Sampling(3.0, top_p=1e-6), Sampling(3.0, min_p=1.0)):
        assert list(generator.tokens(prompt(5), 8, sampling)) == expected


@pytest.mark.parametrize("penalty", [0.3, 1e6])
def test_a_repetition_penalty_counts_prompt_and_new_tokens(hybrid, tokenizer, penalty):
    generator, last_logits = hybrid
    found = list(generator.tokens(prompt(5), 11, Sampling(temperature=0.0, repetition_penalty=penalty)))
    assert found == greedy(last_logits, tokenizer, prompt(5), 11, penalty)
    repeats = any(token in [*prompt(5), *found[:i]] for i, token in enumerate(found))
    assert repeats == (penalty < 1)  # which makes them likelier


def test_only_text_and_document_end_are_ever_drawn(generator, tokenizer):
    drawn = {token for seed in range(60) for token in generator.tokens(prompt(5), 11, Sampling(temperature=1e4, seed=seed))}
    # Almost uniform: of 320 ids, 620 draws would miss the 25 others with a probability below 1e-20.
    assert drawn <= {*range(tokenizer.vocab_size - len(tokenizer.control)), generator.end}
    assert len(drawn) > 200


def test_draws_have_the_frequencies_of_the_softmax(hybrid):
    generator, last_logits = hybrid
    kept = [1, 4, 9]
    generator = copy.copy(generator)
    generator._allowed_V = torch.zeros(PADDED, dtype=torch.bool)
    generator._allowed_V[kept] = True
    logits = last_logits(prompt(5))[kept].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    drawn = [next(generator.tokens(prompt(5), 1, Sampling(temperature=1.0, seed=seed))) for seed in range(400)]
    found = np.array([drawn.count(i) for i in kept]) / 400
    assert np.abs(found - expected).max() < 5 * math.sqrt(0.25 / 400)  # five standard errors


def slow_filter(logits, seen, allowed, sampling):
    """The ids that stay, and their logits, by lists in Python; of equals the lower id comes first."""
    changed = {}
    for i in range(len(logits)):
        if allowed[i]:
            value = float(logits[i])
            if seen[i]:
                value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
            changed[i] = value / (sampling.temperature or 1.0)
    order = sorted(changed, key=lambda i: (-changed[i], i))
    total = sum(math.exp(changed[i] - changed[order[0]]) for i in order)
    p = {i: math.exp(changed[i] - changed[order[0]]) / total for i in order}
    among = order[: sampling.top_k] if sampling.top_k else order
    kept, reached = [], 0.0
    for i in among:
        if reached < sampling.top_p and p[i] >= sampling.min_p * p[order[0]]:
            kept.append(i)
        reached += p[i] / sum(p[j] for j in among)
    return {i: changed[i] for i in kept or order[:1]}


def kept(logits, sampling, seen=None, allowed=None):
    """(ids that stay, the logits)."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    none, every = torch.zeros(len(logits), dtype=torch.bool), torch.ones(len(logits), dtype=torch.bool)
    seen, allowed = (none if seen is None else torch.tensor(seen)), (every if allowed is None else torch.tensor(allowed))
    found = filter_logits(logits, seen, allowed, sampling)
    return torch.nonzero(~found.isneginf()).flatten().tolist(), found


def test_filters_keep_what_the_slow_oracle_keeps():
    rng = random.Random(0)
    for _ in range(300):
        # Few values, so that ties are common, and settings that no sum of probabilities hits exactly.
        logits = [rng.choice([-2.0, -0.5, 0.0, 0.5, 1.5, 3.0]) for _ in range(20)]
        seen = [rng.random() < 0.3 for _ in range(20)]
        allowed = [i == 4 or rng.random() < 0.8 for i in range(20)]
        top_p, min_p = rng.choice([1.0, rng.uniform(0.01, 0.99)]), rng.choice([0.0, rng.uniform(0.01, 0.99)])
        temperature, top_k, penalty = rng.choice([0.0, 0.7, 2.0]), rng.choice([0, 1, 2, 5, 20, 40]), rng.choice([0.7, 1.0, 1.3])
        sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
        expected = slow_filter(logits, seen, allowed, sampling)
        ids, found = kept(logits, sampling, seen, allowed)
        assert set(ids) == set(expected)
        assert_close([found[i] for i in expected], list(expected.values()), 1e-6)


def test_of_equal_logits_the_lower_ids_stay():
    assert kept([0.0] * 500, Sampling(1.0, top_k=3))[0] == [0, 1, 2]


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0, 1e-9), Sampling(1.0, 1, 1e-9, 1.0), Sampling(1e-6, 0, 1.0, 1.0)])
def test_the_most_likely_token_always_stays(sampling):
    assert kept([0.0, 1, 2, 9, 4, 5, 6, 7, 8, 8, 8, 8], sampling)[0] == [3]


def test_a_repetition_penalty_lowers_positive_and_negative_logits():
    seen = [True, True, False, False]
    assert kept([2.0, -2.0, 2.0, -2.0], Sampling(1.0, repetition_penalty=2.0), seen)[1].tolist() == [1.0, -4.0, 2.0, -2.0]


def test_no_sampling_draws_a_forbidden_token_however_likely_it_is():
    for sampling in (Sampling(1.0), Sampling(0.0, 3, 0.5, 0.5, 2.0), Sampling(9.0, 1)):
        assert set(kept([0.0, 1.0, 50.0, 90.0], sampling, allowed=[True, True, False, False])[0]) <= {0, 1}


# ------------------------------------------------------------------------------------------------------- beginning and end


def test_too_long_a_request_is_refused_with_what_would_fit(generator):
    with pytest.raises(UsageError, match=r"30 prompt tokens and 11 new ones exceed .* at most 10 new ones fit"):
        list(generator.tokens(prompt(30), 11, GREEDY))


def test_the_document_end_is_the_last_token(generator):
    tokens = list(generator.tokens(prompt(10), 14, GREEDY))
    ending = copy.copy(generator)
    ending.end = tokens[5]
    assert tokens.index(ending.end) == 5
    assert list(ending.tokens(prompt(10), 14, GREEDY)) == tokens[:6]


def test_text_continues_the_prompt_it_is_given(generator, tokenizer):
    ids = tokenizer.encode("def f(x)")
    expected = tokenizer.decode_bytes(generator.tokens(ids, 8, GREEDY)).decode("utf-8", "replace")
    assert "".join(generator.text("def f(x)", 8, GREEDY)) == expected


def test_the_first_two_tokens_of_a_document_are_drawn_independently(tokenizer):
    generator, _ = make("dense", tokenizer)
    with torch.no_grad():
        generator.transformer.final_norm.scale.zero_()  # every token is as likely as any other
    pairs = [list(generator.tokens([], 2, Sampling(temperature=1.0, seed=seed))) for seed in range(8)]
    assert any(first != second for first, second in pairs)
