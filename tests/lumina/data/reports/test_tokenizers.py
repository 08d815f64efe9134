import json
import re
from itertools import pairwise

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from lumina.cli import run
from lumina.data.preparing.pipeline import Order
from lumina.data.recipe import Recipe
from lumina.data.records import place
from lumina.data.reports import tokenizers
from lumina.data.reports.tokenizers import HeldOut, compare, frequent_bpe, measured, train, train_sentencepiece
from lumina.errors import ConfigError, DataError, UsageError
from lumina.tokenizer import CONTROL_TOKENS, GPT4_PATTERN, train_bpe
from lumina.tokenizer_files import load_tokenizer

STORY = "the boats came back with the morning and nobody had counted them before they were tied to the old pier again"
WORDS = STORY.split(" ")


def sentence(i):
    return " ".join(WORDS[(i * step + step) % len(WORDS)] for step in range(2, 12)) + f" {i}.\n"


TEXTS = [sentence(i) + sentence(i * 3) for i in range(200)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece tokenizer of the texts."""
    return train_sentencepiece(TEXTS, 330)


def merges_made(texts, ranks):
    """How often the pair of each merge of `ranks` is there when its turn comes, and how often it is merged."""
    split = [[bytes([byte]) for byte in piece.encode()] for text in texts for piece in regex.findall(GPT4_PATTERN, text)]
    there, made = [], []
    for token in ranks[256:]:
        there.append(sum(one + two == token for parts in split for one, two in pairwise(parts)))
        made.append(0)
        for parts in split:
            at = 0
            while at + 1 < len(parts):
                if parts[at] + parts[at + 1] == token:
                    parts[at : at + 2] = [token]
                    made[-1] += 1
                at += 1
    return there, made


# ---------------------------------------------------------------------------------------------------- least frequency


def test_rare_merges_are_left_out_as_counted_merge_by_merge():
    texts = [*TEXTS, "-" * 45 + "\n" + "=" * 19 + "\n\n\n"] * 2
    full = train_bpe(texts, 256 + 300, smaller=True)
    ranks = [full.decode_bytes([i]) for i in range(full.vocab_size - len(CONTROL_TOKENS))]
    there, made = merges_made(texts, ranks)
    assert there == sorted(there, reverse=True)
    overlap = 0
    for least in sorted({*there, *made, 10**6}):
        found = frequent_bpe(full, [texts[:50], texts[50:]], least)
        kept = found.vocab_size - 256 - len(CONTROL_TOKENS)
        assert [found.decode_bytes([i]) for i in range(256 + kept)] == ranks[: 256 + kept]
        assert all(count >= least for count in there[:kept])
        assert all(count < least for count in made[kept:])
        overlap += any(count < least for count in made[:kept])
    assert overlap  # runs of one token
    assert kept == 0
    half = frequent_bpe(full, [texts], there[100])
    assert 256 + 100 < half.vocab_size < full.vocab_size
    assert train_bpe(texts, half.vocab_size).fingerprint == half.fingerprint


def test_control_tokens_stay_when_merges_go():
    full = train_bpe(TEXTS, 400, extra=("<|im_start|>",))
    found = frequent_bpe(full, [TEXTS], 50)
    assert tuple(found.control) == tuple(full.control)
    assert min(found.control.values()) == found.vocab_size - len(full.control)


def test_a_smaller_tokenizer_is_told_of(source, tmp_path, capsys):
    run(["data", "tokenizer", source, "--out", str(tmp_path / "t"), "--vocab-size", "5000", "--min-frequency", "20"])
    told = capsys.readouterr().out
    size = load_tokenizer(str(tmp_path / "t")).vocab_size
    assert size < 1000
    assert f"{size:,} ids instead of 5,000: the text has no more merges that occur 20 times" in told


# ------------------------------------------------------------------------------------------------------ SentencePiece


@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁")))
def test_sentencepiece_loses_nothing(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert sum(pieces.token_bytes()[ids]) == len(text.encode())
    assert all(i < pieces.vocab_size - len(CONTROL_TOKENS) for i in ids)


def test_sentencepiece_is_the_same_each_time_and_as_large_as_asked(pieces):
    again = train_sentencepiece(iter(TEXTS), 330)
    assert again.fingerprint == pieces.fingerprint
    assert again.vocab_size == 330
    assert list(again.control.values()) == list(range(324, 330))
    assert len(again.encode(TEXTS[0])) < 0.8 * len(TEXTS[0])


def test_sentencepiece_takes_lines_of_any_length():
    line = " ".join(TEXTS).replace("\n", " ")
    found = train_sentencepiece([line], 330)
    assert len(line) > 4 * tokenizers.SENTENCE_CHARACTERS
    assert len(found.encode(line)) < 0.7 * len(line)


@pytest.mark.parametrize(
    ("size", "error", "what"),
    [
        (100, ConfigError, "must be at least 264, for a piece beside 256 bytes, the unknown piece and 6 control tokens"),
        (265, ConfigError, r"must be at least \d+, to hold the characters of the text"),
        (10**6, DataError, r"has only enough pieces for \d+; set --vocab-size to at most \d+"),
    ],
)
def test_a_vocabulary_that_sentencepiece_cannot_fill_is_refused_in_words(size, error, what):
    with pytest.raises(error, match=what) as refusal:
        train_sentencepiece(TEXTS, size)
    if works := re.search(r"at (?:most|least) (\d+)(?:, or|, to)", str(refusal.value)):
        assert train_sentencepiece(TEXTS, int(works[1])).vocab_size == int(works[1])


def test_nothing_gives_no_sentencepiece():
    with pytest.raises(DataError, match="hold nothing"):
        train_sentencepiece([], 300)


# --------------------------------------------------------------------------------------------------------- comparison


def test_compression_is_counted_on_the_held_out_texts_alone(source, tmp_path):
    order = Order((source,), Recipe(), 0.2, "lumina")
    tokenizer, found = train(order, "bpe", 320, 0, 1e9, lambda line: None)
    held_out = [text for text in TEXTS if place(text) < 0.2]
    assert 0 < len(held_out) < len(TEXTS)
    assert found["held_out"]["documents"] == len(held_out)
    (row,) = found["compared"]
    tokens = [tokenizer.encode(text) for text in held_out]
    count = sum(map(len, tokens))
    assert row["tokens"] == count
    assert row["bytes_a_token"] == pytest.approx(sum(len(text.encode()) for text in held_out) / count)
    assert row["tokens_a_1000_words"] == pytest.approx(1000 * count / sum(len(text.split()) for text in held_out))
    assert row["ids_used"] == len({i for ids in tokens for i in ids}) / tokenizer.vocab_size
    assert row["lossless"] == 1
    trained_on = [text for text in TEXTS if place(text) >= 0.2]
    assert tokenizer.fingerprint == train_bpe(trained_on, 320).fingerprint


def test_a_sample_is_trained_on(source):
    size = sum(len(json.dumps({"text": text})) + 1 for text in TEXTS)
    tokenizer, found = train(Order((source,), Recipe(), 0.2, "lumina"), "bpe", 300, 0, size / 4, lambda line: None)
    assert found["trained_on_share"] == pytest.approx(0.25)
    part = [text for text in TEXTS if 0.2 <= place(text) <= 0.4]
    assert tokenizer.fingerprint == train_bpe(part, 300).fingerprint


def test_well_known_tokenizers_that_are_missing_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    rows, missing = compare(train_bpe(TEXTS, 300), TEXTS)
    assert [row["name"] for row in rows] == ["bpe-300"]
    assert [line.partition(":")[0] for line in missing] == ["gpt2", "cl100k_base", "o200k_base"]
    assert all("is not on this machine" in line for line in missing)


def test_well_known_tokenizers_at_hand_are_compared(monkeypatch):
    other = train_bpe(TEXTS, 290)

    def load(name, extra=()):
        if name != "gpt2":
            raise DataError(f"{name}: missing")
        return other

    monkeypatch.setattr("lumina.tokenizer_files.load_tokenizer", load)
    rows, missing = compare(train_bpe(TEXTS, 300), TEXTS)
    assert [row["name"] for row in rows] == ["bpe-300", "bpe-290"]
    assert rows[1] == measured(other, TEXTS)
    assert rows[0]["tokens"] < rows[1]["tokens"]
    assert len(missing) == 2


def test_a_tokenizer_that_loses_text_is_seen():
    class Lossy:
        name, vocab_size = "lossy", 4

        def encode_batch(self, texts):
            return [[1] * len(text) for text in texts]

        def decode_bytes(self, ids):
            return b"a" * len(ids)

    assert measured(Lossy(), ["aa", "ab", "a", "b"])["lossless"] == 0.5


def test_what_is_compared_on_is_bounded_and_chosen_by_place(monkeypatch):
    monkeypatch.setattr(tokenizers, "COMPARED_BYTES", 100)
    places = np.random.default_rng(0).permutation(40) / 40
    held_out = HeldOut()
    for i, where in enumerate(places):
        held_out.add(f"text {i:05d}", where)
    lowest = sorted(np.argsort(places)[:10])
    assert held_out.texts() == [f"text {i:05d}" for i in lowest]
    assert held_out.about()["documents"] == 40
    assert held_out.about()["compared_documents"] == 10


# ------------------------------------------------------------------------------------------------------------ command


def test_what_is_made_is_loaded_by_name_of_its_directory(source, tmp_path, capsys):
    out = tmp_path / "made" / "tokenizer"
    run(["data", "tokenizer", source, "--out", str(out), "--vocab-size", "300", "--template", "chatml", "--json"])
    told = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.fingerprint == told["fingerprint"]
    assert {"<|im_start|>", "<|im_end|>"} <= tokenizer.control.keys()
    assert tokenizer.vocab_size == told["vocab_size"] == 300
    assert json.loads((out / "comparison.json").read_text()) == told


def test_a_tokenizer_of_ones_own_is_compared_with_and_those_that_are_missing_take_one_line(
    source, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = train_bpe(["something else " * 9], 262 + 3)
    mine.save(tmp_path / "mine")
    flags = ["--vocab-size", "300", "--compare", str(tmp_path / "mine")]
    run(["data", "tokenizer", source, "--out", str(tmp_path / "t"), *flags])
    told = capsys.readouterr().out
    assert f"bpe-265 of {tmp_path / 'mine'}" in told
    assert told.count("not on this machine") == told.count("gpt2, cl100k_base, o200k_base") == 1
    assert "sha256" not in told
    trained, other = json.loads((tmp_path / "t" / "comparison.json").read_text())["compared"]
    assert (trained["vocab_size"], other["vocab_size"]) == (300, 265)
    assert trained["tokens"] < other["tokens"]


def test_a_tokenizer_to_compare_with_that_there_is_not_is_refused_before_training(source, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "train", None)
    with pytest.raises(DataError, match="no such tokenizer file"):
        run(["data", "tokenizer", source, "--out", str(tmp_path / "t"), "--compare", str(tmp_path / "none")])


def test_sentencepiece_is_made_and_loaded(source, tmp_path, monkeypatch):
    out, said = tmp_path / "t", []
    monkeypatch.setattr(tokenizers.Console, "status", lambda self, line: said.append(line))
    run(["data", "tokenizer", source, "--out", str(out), "--vocab-size", "330", "--kind", "sentencepiece"])
    assert said[-1] == "all is read; SentencePiece chooses its pieces, and tells nothing until it has them"
    assert json.loads((out / "comparison.json").read_text())["name"] == "sentencepiece-330"
    assert load_tokenizer(str(out)).vocab_size == 330


@pytest.mark.parametrize(
    ("flags", "error", "what"),
    [
        (["--held-out", "0"], UsageError, "--held-out = 0.0: must be between"),
        (["--min-frequency", "-1"], UsageError, "--min-frequency = -1"),
        (["--sample-mb", "0"], UsageError, "--sample-mb = 0.0"),
        (["--kind", "sentencepiece", "--min-frequency", "2"], UsageError, "by likelihood, not by frequency"),
        (["--vocab-size", "100"], ConfigError, "--vocab-size = 100: must be at least 262"),
        (["--vocab-size", "9999"], DataError, "--vocab-size = 9999: the text has only"),
        (["--template", "nothing"], ConfigError, "template 'nothing'"),
    ],
)
def test_impossible_options_are_refused_and_nothing_is_left(source, tmp_path, flags, error, what):
    out = tmp_path / "t"
    with pytest.raises(error, match=what):
        run(["data", "tokenizer", source, "--out", str(out), *flags])
    assert not out.exists()


def test_an_out_that_cannot_be_is_refused_before_training(source, monkeypatch):
    monkeypatch.setattr(tokenizers, "train", None)
    with pytest.raises(
        UsageError, match=r"--out /proc/x/y: cannot be made \(No such file or directory: /proc/x\); choose another"
    ):
        run(["data", "tokenizer", source, "--out", "/proc/x/y"])


def test_what_is_there_is_not_written_over(source, tmp_path):
    with pytest.raises(UsageError, match="is there already"):
        run(["data", "tokenizer", source, "--out", str(tmp_path)])
