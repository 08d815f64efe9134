"""Generation: the cache against none, the filters against a slow oracle, and text against bytes.

T positions, V vocabulary.
"""

import copy
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina.errors import UsageError
from lumina.generation import Sampling
from lumina.tokenizer import train_bpe
from lumina_jax.generate import Generator, Knobs, bucket, filter_logits
from lumina_jax.model import Variables, merge
from lumina_jax.step import init_state, state_shapes
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
    graphdef = state_shapes(config)[1]
    variables = jax.jit(lambda: init_state(config)[1].variables)()

    @jax.jit
    def all_logits(tokens_1T):
        model = merge(graphdef, variables)
        positions = jnp.arange(CONTEXT)[None]
        hidden, _, _ = model(tokens_1T, jnp.zeros_like(tokens_1T), positions, dtype=jnp.float32)
        return hidden[0] @ model.head_DV(jnp.float32)

    def last_logits(tokens):
        padded = np.zeros((1, CONTEXT), np.int32)  # attention is causal: what follows is not seen
        padded[0, : len(tokens)] = tokens
        return np.asarray(all_logits(padded))[len(tokens) - 1]

    return Generator(config, graphdef, variables, tokenizer), last_logits


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
    for length in (10, 17):  # prompts that fill buckets of 16 and 32; the first grows past its own while decoding
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
    for length in (10, 11, 12, 13):  # of which some may end at once
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


def test_a_prompt_may_fill_its_bucket(hybrid, tokenizer):
    generator, last_logits = hybrid
    expected = greedy(last_logits, tokenizer, prompt(16), 3)
    assert list(generator.tokens(prompt(16), 3, GREEDY)) == expected


def test_an_empty_prompt_begins_a_document_whose_tokens_do_not_see_the_last_one(hybrid, tokenizer):
    generator, last_logits = hybrid
    (first,) = greedy(last_logits, tokenizer, [generator.end], 1)
    assert first != generator.end
    assert list(generator.tokens([], 9, GREEDY)) == [first, *greedy(last_logits, tokenizer, [first], 8)]


def test_requests_of_the_same_buckets_compile_nothing(generator):
    def compiled():
        return generator._prefill._cache_size(), generator._decode._cache_size()

    list(generator.tokens(prompt(5), 6, Sampling()))
    before = compiled()
    whole_numbers = Sampling(temperature=0, top_p=1, min_p=0, repetition_penalty=2)
    for length, count, sampling in ((9, 7, Sampling(0.5, 3, 0.9, 0.1, 1.2)), (1, 2, GREEDY), (3, 12, whole_numbers)):
        list(generator.tokens(prompt(length), count, sampling))
    assert compiled() == before


@pytest.mark.parametrize(("length", "expected"), [(1, 16), (15, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)])
def test_buckets_are_powers_of_two(length, expected):
    assert bucket(length) == expected


# ---------------------------------------------------------------------------------------------------------- sampling


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(generator):
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


def test_no_sampling_draws_a_forbidden_token_however_likely_it_is():
    logits = jnp.array([0.0, 1.0, 50.0, 90.0])
    allowed = jnp.array([True, True, False, False])
    for knobs in (Knobs(1.0, 0, 1.0, 0.0, 1.0), Knobs(0.0, 3, 0.5, 0.5, 2.0), Knobs(9.0, 1, 1.0, 0.0, 1.0)):
        assert np.isneginf(filter_logits(logits, jnp.zeros(4, bool), allowed, knobs)[2:]).all()


def slow_filter(logits, seen, allowed, knobs):
    """The ids that stay, and their logits, by lists in Python; of equals the lower id comes first."""
    changed = {}
    for i in range(len(logits)):
        if allowed[i]:
            value = float(logits[i])
            if seen[i]:
                value = value / knobs.repetition_penalty if value > 0 else value * knobs.repetition_penalty
            changed[i] = value / (knobs.temperature or 1.0)
    order = sorted(changed, key=lambda i: (-changed[i], i))
    total = sum(math.exp(changed[i] - changed[order[0]]) for i in order)
    p = {i: math.exp(changed[i] - changed[order[0]]) / total for i in order}
    among = order[: knobs.top_k] if knobs.top_k else order
    kept, reached = [], 0.0
    for i in among:
        if reached < knobs.top_p and p[i] >= knobs.min_p * p[order[0]]:
            kept.append(i)
        reached += p[i] / sum(p[j] for j in among)
    return {i: changed[i] for i in kept or order[:1]}


@pytest.fixture(scope="module")
def fast_filter():
    return jax.jit(filter_logits)


def check_filter(fast_filter, logits, seen, allowed, knobs):
    expected = slow_filter(logits, seen, allowed, knobs)
    found = np.asarray(fast_filter(jnp.float32(logits), jnp.asarray(seen), jnp.asarray(allowed), knobs))
    assert set(np.flatnonzero(~np.isneginf(found))) == set(expected)
    assert_close([found[i] for i in expected], list(expected.values()), 1e-6)


def test_filters_keep_what_the_slow_oracle_keeps(fast_filter):
    rng = random.Random(0)
    for _ in range(300):
        # Few values, so that ties are common, and settings that no sum of probabilities hits exactly.
        logits = [rng.choice([-2.0, -0.5, 0.0, 0.5, 1.5, 3.0]) for _ in range(12)]
        seen = [rng.random() < 0.3 for _ in range(12)]
        allowed = [i == 4 or rng.random() < 0.8 for i in range(12)]
        top_p, min_p = rng.choice([1.0, rng.uniform(0.01, 0.99)]), rng.choice([0.0, rng.uniform(0.01, 0.99)])
        knobs = Knobs(rng.choice([0.0, 0.7, 2.0]), rng.choice([0, 1, 2, 5, 12, 40]), top_p, min_p, rng.choice([0.7, 1.0, 1.3]))
        check_filter(fast_filter, logits, seen, allowed, knobs)


def test_of_equal_logits_the_lower_ids_stay(fast_filter):
    found = fast_filter(jnp.zeros(12), jnp.zeros(12, bool), jnp.ones(12, bool), Knobs(1.0, 3, 1.0, 0.0, 1.0))
    assert np.flatnonzero(found == 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("knobs", [Knobs(1.0, 0, 1e-9, 0.0, 1.0), Knobs(1.0, 1, 1e-9, 1.0, 1.0), Knobs(1e-6, 0, 1.0, 1.0, 1.0)])
def test_the_most_likely_token_always_stays(fast_filter, knobs):
    logits = jnp.array([0.0, 1, 2, 9, 4, 5, 6, 7, 8, 8, 8, 8])
    found = fast_filter(logits, jnp.zeros(12, bool), jnp.ones(12, bool), knobs)
    assert np.flatnonzero(~np.isneginf(found)).tolist() == [3]


def test_a_repetition_penalty_lowers_positive_and_negative_logits(fast_filter):
    logits = [2.0, -2.0, 2.0, -2.0] + [0.0] * 8
    found = fast_filter(jnp.float32(logits), jnp.arange(12) < 2, jnp.ones(12, bool), Knobs(1.0, 0, 1.0, 0.0, 2.0))
    assert found[:4].tolist() == [1.0, -4.0, 2.0, -2.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(setting, value):
    with pytest.raises(UsageError, match=rf"{setting} = {value}: must be"):
        Sampling(**{setting: value})


# ------------------------------------------------------------------------------------------------------- beginning and end


def test_too_long_a_request_is_refused_with_what_would_fit(generator):
    with pytest.raises(
        UsageError, match=r"30 prompt tokens and 11 new ones exceed the 40 positions .* at most 10 new ones fit"
    ):
        list(generator.tokens(prompt(30), 11, GREEDY))


def test_the_document_end_is_the_last_token(generator):
    tokens = list(generator.tokens(prompt(10), 14, GREEDY))
    ending = copy.copy(generator)
    ending.end = tokens[5]
    assert tokens.index(ending.end) == 5
    assert list(ending.tokens(prompt(10), 14, GREEDY)) == tokens[:6]


def test_no_new_tokens_are_none(generator):
    assert list(generator.tokens(prompt(5), 0, GREEDY)) == []


class Scripted(Generator):
    """Says given tokens, whatever it is asked."""

    def __init__(self, tokenizer, ids):
        self.tokenizer, self.ids, self.end = tokenizer, ids, tokenizer.control["<|document_end|>"]

    def tokens(self, prompt, max_tokens, sampling):
        yield from self.ids


def bytes_of(tokenizer, text):
    """A token a byte."""
    single = {piece: i for i in range(300) if len(piece := tokenizer.decode_bytes([i])) == 1}
    return [single[bytes([b])] for b in text.encode()]


def test_multi_byte_characters_stream_whole(tokenizer):
    text = "aé日😀b"
    pieces = list(Scripted(tokenizer, bytes_of(tokenizer, text)).text("", 99, GREEDY))
    assert [piece for piece in pieces if piece] == list(text)


def test_an_unfinished_character_is_shown_at_the_end_as_unknown(tokenizer):
    ids = bytes_of(tokenizer, "a日")[:-1]
    assert "".join(Scripted(tokenizer, ids).text("", 99, GREEDY)) == "a\ufffd"


def test_text_ends_at_the_document_end(tokenizer):
    end = tokenizer.control["<|document_end|>"]
    ids = [*tokenizer.encode("one"), end, *tokenizer.encode("two")]
    assert "".join(Scripted(tokenizer, ids).text("", 99, GREEDY)) == "one"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([], "def f(x):\n    return x\n"),
        (["return"], "def f(x):\n    "),
        (["\n\n", "x)"], "def f("),
        (["x\n", "x"], "def f("),
        (["):\n    re"], "def f(x"),
        (["def"], ""),
        (["x\n\n"], "def f(x):\n    return x\n"),
        (["nowhere"], "def f(x):\n    return x\n"),
    ],
)
@pytest.mark.parametrize("by", ["token", "byte"])
def test_text_ends_before_the_first_stop_string_however_it_is_cut_into_tokens(tokenizer, stop, expected, by):
    text = "def f(x):\n    return x\n"
    ids = bytes_of(tokenizer, text) if by == "byte" else tokenizer.encode(text)
    assert "".join(Scripted(tokenizer, ids).text("", 99, GREEDY, stop)) == expected


def test_nothing_of_a_stop_string_is_shown_before_it_is_ruled_out(tokenizer):
    pieces = Scripted(tokenizer, bytes_of(tokenizer, "ab12ab123")).text("", 99, GREEDY, ["123"])
    shown = [piece for piece in pieces if piece]
    assert shown == ["a", "b", "12a", "b"]


def test_text_continues_the_prompt_it_is_given(generator, tokenizer):
    ids = tokenizer.encode("def f(x)")
    expected = tokenizer.decode_bytes(generator.tokens(ids, 8, GREEDY)).decode("utf-8", "replace")
    assert "".join(generator.text("def f(x)", 8, GREEDY)) == expected


def test_the_first_two_tokens_of_a_document_are_drawn_independently(tokenizer):
    generator, _ = make("dense", tokenizer)
    params = jax.tree_util.tree_map_with_path(
        lambda path, a: 0 * a if "final_norm" in jax.tree_util.keystr(path) else a, generator.variables.params
    )
    generator.variables = Variables(params, generator.variables.biases)  # every token is as likely as any other
    pairs = [list(generator.tokens([], 2, Sampling(temperature=1.0, seed=seed))) for seed in range(8)]
    assert any(first != second for first, second in pairs)
