"""Tokenizers: the same ranks and ids as plain Python gives, nothing lost, and no text that becomes a control token."""

import collections
import itertools
import os
import subprocess
import sys

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from lumina import tokenizer as module
from lumina.errors import ConfigError, DataError
from lumina.tokenizer import BPE, CONTROL_TOKENS, GPT4_PATTERN, StreamDecoder, train_bpe
from lumina.tokenizer_files import NAMED_ENCODINGS, PATTERNS, load_tokenizer
from tests.lumina.tokenizer_samples import (
    ALL,
    CORPUS,
    LOSSLESS,
    MARK_SPACES,
    hostile_text,
    many,
    ranks_of,
    slow_merges,
    small_alphabet,
    some,
    write_all,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of what `load_tokenizer` can read."""
    return write_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def loaded(files):
    return {name: load_tokenizer(str(path)) for name, path in files.items()}


def slow_train(texts, num_merges):
    """Byte-pair encoding as the paper has it: merge the most frequent pair, ties by the lower ids."""
    words = [list(piece.encode()) for text in texts for piece in regex.findall(GPT4_PATTERN, text)]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(num_merges):
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[a] + tokens[b])
    return tokens


# ---------------------------------------------------------------------------------------------------------- training


@some
@given(st.lists(small_alphabet, max_size=8), st.integers(0, 40))
def test_training_gives_the_ranks_of_a_plain_python_trainer(texts, num_merges):
    expected = slow_train(texts, num_merges)
    tokenizer = train_bpe(texts, len(expected) + len(CONTROL_TOKENS))
    assert ranks_of(tokenizer) == expected


def test_training_on_real_text_gives_the_ranks_of_a_plain_python_trainer():
    assert ranks_of(train_bpe([CORPUS[:20_000]], 256 + 60 + len(CONTROL_TOKENS))) == slow_train([CORPUS[:20_000]], 60)


def test_another_process_with_other_hashing_and_threads_trains_the_same_ids():
    program = (
        "import argparse, pathlib; from lumina.tokenizer import train_bpe;"
        "text = pathlib.Path(argparse.__file__).read_text(encoding='utf-8');"
        "print(train_bpe(text.splitlines(keepends=True), 1000).fingerprint)"
    )

    def train(**environment):
        return subprocess.check_output([sys.executable, "-c", program], env=os.environ | environment, text=True)

    assert train(PYTHONHASHSEED="1", RAYON_NUM_THREADS="1") == train(PYTHONHASHSEED="2", RAYON_NUM_THREADS="5")


def test_the_order_of_the_texts_does_not_change_the_ids():
    lines = CORPUS.splitlines(keepends=True)
    assert train_bpe(lines, 900).fingerprint == train_bpe(reversed(lines), 900).fingerprint


def test_a_vocabulary_without_room_for_bytes_and_control_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 261: must be at least 262"):
        train_bpe([CORPUS], 261)


def test_a_corpus_with_too_few_pairs_is_refused_with_the_vocabulary_that_works():
    with pytest.raises(DataError, match=r"only 2 pairs to merge.* at most 264"):
        train_bpe(["abc"], 1000)
    assert train_bpe(["abc"], 264).encode("abc") == [257]


def test_lone_surrogates_in_the_corpus_are_learned_as_what_they_encode_to():
    assert train_bpe(["\ud800\ud800"], 264).fingerprint == train_bpe(["\ufffd\ufffd"], 264).fingerprint


def test_a_corpus_whose_pairs_could_overflow_their_counts_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_TRAINING_BYTES", 10)
    with pytest.raises(DataError, match="train it on a sample"):
        train_bpe(["12345", "1234é", "1"], 300)


# ---------------------------------------------------------------------------------------------------------- encoding


@many
@given(small_alphabet)
def test_bpe_ids_are_those_of_a_plain_python_encoder(loaded, text):
    ranks = {token: rank for rank, token in enumerate(ranks_of(loaded["bpe"]))}
    words = regex.findall(GPT4_PATTERN, text)
    assert loaded["bpe"].encode(text) == [ranks[part] for word in words for part in slow_merges(ranks, word.encode())]


@pytest.mark.parametrize("name", ALL)
@some
@given(hostile_text)
def test_no_text_encodes_to_a_control_token_or_a_special_token_of_the_file(loaded, name, text):
    tokenizer = loaded[name]
    without_text = {i for i, size in enumerate(tokenizer.token_bytes()) if size == 0}
    assert without_text >= set(tokenizer.control.values())
    assert without_text.isdisjoint(tokenizer.encode(text))


@pytest.mark.parametrize("name", LOSSLESS)
@some
@given(hostile_text)
def test_any_text_survives_encoding_and_decoding(loaded, name, text):
    if name in MARK_SPACES:
        text = text.replace("▁", "")  # means a space to them
    tokenizer = loaded[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ALL)
def test_surrogate_pairs_are_joined_and_lone_surrogates_replaced(loaded, name):
    tokenizer = loaded[name]
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b\ud800c\udc00")) == "a😀b\ufffdc\ufffd"


@pytest.mark.parametrize("name", ALL)
def test_a_batch_gives_the_ids_of_its_texts(loaded, name):
    texts = ["", "one", "<s>\n" * 3, CORPUS[:500]]
    assert loaded[name].encode_batch(texts) == [loaded[name].encode(text) for text in texts]
    assert loaded[name].encode_batch([]) == []


@many
@given(st.text())
def test_token_bytes_sum_to_the_bytes_of_the_text(loaded, text):
    assert loaded["bpe"].token_bytes()[loaded["bpe"].encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("text", [" " * 1_000_001 + "x", "a" * 600_000, "\n" * 600_000], ids=["spaces", "letters", "lines"])
def test_a_very_long_run_of_one_character_neither_crashes_nor_gets_lost(loaded, text):
    assert loaded["bpe"].decode(loaded["bpe"].encode(text)) == text
    assert train_bpe([text], 264).vocab_size == 264


@pytest.mark.parametrize("pattern", NAMED_ENCODINGS)
@some
@given(st.lists(st.text("a.1/ \r\n", max_size=9), min_size=9, max_size=20))
def test_cutting_a_long_text_at_the_end_of_a_line_changes_no_id(loaded, monkeypatch, pattern, lines):
    monkeypatch.setattr(module, "LONGEST_PIECE", 40)
    text = "".join(line + "x\ny" for line in lines)
    tokenizer = BPE("", PATTERNS[pattern], ranks_of(loaded["bpe"]))
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


# ---------------------------------------------------------------------------------------------------------- decoding


def test_control_tokens_are_the_last_ids_shown_by_name_and_without_bytes(loaded):
    for tokenizer in loaded.values():
        size = tokenizer.vocab_size
        assert tokenizer.control == {token: size - len(CONTROL_TOKENS) + i for i, token in enumerate(CONTROL_TOKENS)}
        ids = [size - 3, *tokenizer.encode("hi"), size - 1]
        assert tokenizer.decode(ids) == "<|user|>hi<|turn_end|>"
        assert tokenizer.decode_bytes(ids) == b"hi"


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("text", ["👩‍👩‍👧 naïve 日本語のテキスト 🇫🇷", "  two spaces", "\n\n中", " "])
def test_streaming_gives_the_text_without_breaking_a_character(loaded, name, text):
    stream = StreamDecoder(loaded[name])
    parts = [stream.feed(i) for i in loaded[name].encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == text
    assert stream.flush() == ""


def test_streaming_gives_a_character_with_the_id_that_completes_it(loaded):
    stream = StreamDecoder(loaded["bpe"])
    single = {token: i for i, token in enumerate(ranks_of(loaded["bpe"]))}
    assert [stream.feed(single[bytes([byte])]) for byte in "é!".encode()] == ["", "é", "!"]


@pytest.mark.parametrize("name", ALL)
@some
@given(data=st.data())
def test_streaming_any_ids_gives_what_decode_gives(loaded, name, data):
    tokenizer = loaded[name]
    ids = data.draw(
        st.lists(st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from([*tokenizer.control.values()])))
    )
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("outside", [-1, 700])
def test_an_id_outside_the_vocabulary_is_refused(loaded, outside):
    with pytest.raises(DataError, match=rf"token id {outside}: .* ids 0 to 699"):
        loaded["bpe"].decode([outside])
