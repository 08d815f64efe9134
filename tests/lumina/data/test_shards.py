import fcntl
import json
import os
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config import DataConfig
from lumina.data import shards
from lumina.data.corpus import open_corpus
from lumina.data.reading.readers import plan
from lumina.data.recipe import Recipe
from lumina.data.records import place
from lumina.data.shards import ShardWriter, TokenStream
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.text import rows_of
from lumina.tokenizer import train_bpe
from lumina.tokenizer_files import load_tokenizer
from tests.lumina.corpora import corpus_of

BYTES = 262  # the smallest vocabulary: 256 bytes and the control tokens
RANDOM = np.random.default_rng(0).integers(0, 1024, 1000)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "RECORD_TOKENS", 64)
    monkeypatch.setattr(shards, "SHARD_RECORDS", 5)


def write(directory, pieces, vocab_size=1024):
    writer = ShardWriter(directory, "train", vocab_size)
    for piece in pieces:
        writer.write(np.asarray(piece))
    return writer.finish()


def stream_of(directory, tokens=RANDOM, vocab_size=1024):
    return TokenStream(directory, "train", write(directory, [tokens], vocab_size))


# --------------------------------------------------------------------------------------------------------- streams


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORD_TOKENS", 64)
        patch.setattr(shards, "SHARD_RECORDS", 5)
        return stream_of(tmp_path_factory.mktemp("shards"))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_any_range_is_read_across_records_and_shards(stream, start, stop):
    start, stop = sorted((start, stop))
    found = stream.read(start, stop)
    assert found.dtype == np.int32
    assert found.tolist() == RANDOM[start:stop].tolist()


def test_what_is_read_belongs_to_the_reader(stream):
    stream.read(0, 10)[:] = -1
    assert stream.read(0, 10).tolist() == RANDOM[:10].tolist()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 1001), (5, 4)])
def test_a_range_outside_the_stream_is_refused(stream, start, stop):
    with pytest.raises(IndexError, match="of a stream of 1000"):
        stream.read(start, stop)


def test_threads_may_share_a_stream(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_KEPT", 2)  # so that nearly every read goes to the file
    shared = stream_of(tmp_path)
    starts = np.random.default_rng(1).integers(0, 800, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for start, found in zip(starts, pool.map(lambda start: shared.read(start, start + 200), starts), strict=True):
            assert np.array_equal(found, RANDOM[start : start + 200])


def test_shards_are_bounded_and_described(tmp_path, small_shards):
    part = write(tmp_path, [RANDOM])
    assert [shard["records"] for shard in part["shards"]] == [5, 5, 5, 1]
    assert [shard["name"] for shard in part["shards"]] == sorted(path.name for path in tmp_path.iterdir())


def test_how_a_stream_is_handed_over_leaves_no_trace(tmp_path, small_shards):
    parts = []
    for name, pieces in (("a", [RANDOM]), ("b", np.split(RANDOM, [1, 1, 7, 64, 128, 700]))):
        (tmp_path / name).mkdir()
        parts.append(write(tmp_path / name, pieces))
    assert parts[0] == parts[1]


def test_a_stream_that_ends_with_a_whole_record_has_no_empty_one(tmp_path, small_shards):
    part = write(tmp_path, [RANDOM[:640]])
    assert [shard["records"] for shard in part["shards"]] == [5, 5]
    assert TokenStream(tmp_path, "train", part).read(600, 640).tolist() == RANDOM[600:640].tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4"), (200_000, "<u4")])
def test_the_largest_id_survives(tmp_path, vocab_size, dtype):
    part = write(tmp_path, [[0, vocab_size - 1]], vocab_size)
    assert part["dtype"] == dtype
    assert TokenStream(tmp_path, "train", part).read(0, 2).tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("tokens", [[0, 1024], [-1, 3]])
def test_an_id_outside_the_vocabulary_is_refused_not_wrapped(tmp_path, tokens):
    with pytest.raises(DataError, match="outside the tokenizer's 0 to 1023"):
        write(tmp_path, [tokens])


# ---------------------------------------------------------------------------------------------------------- damage


def test_a_flipped_byte_is_refused_by_shard_and_record(tmp_path, small_shards):
    tokens = np.random.default_rng(0).integers(0, 2**16, 1000)  # 16 random bits a token: stored as they are
    part = write(tmp_path, [tokens], 2**16)
    path = tmp_path / "train-00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[content.index(tokens[64 * 7 : 64 * 7 + 4].astype("<u2").tobytes())] ^= 1
    path.write_bytes(content)
    stream = TokenStream(tmp_path, "train", part)
    with pytest.raises(DataError, match=r"train-00001\.arrayrecord: record 2 is corrupt.*delete .* made again"):
        stream.read(64 * 7, 64 * 8)
    assert stream.read(0, 64 * 7).tolist() == tokens[: 64 * 7].tolist()


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_ever_changes_a_token(one_shard, where, bit):
    part, content, path = one_shard
    damaged = bytearray(content)
    damaged[int(where * 1500)] ^= 1 << bit  # the records are in the first 1500 bytes; after them comes padding
    path.write_bytes(damaged)
    try:
        assert TokenStream(path.parent, "train", part).read(0, 500).tolist() == RANDOM[:500].tolist()
    except DataError as error:
        assert path.name in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    part = write(directory, [RANDOM[:500]])
    path = directory / "train-00000.arrayrecord"
    return part, path.read_bytes(), path


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path, content: path.unlink(), "is missing"),
        (lambda path, content: path.write_bytes(content[:-1]), r"has \d+ bytes, not \d+"),
    ],
    ids=["missing", "cut"],
)
def test_a_missing_or_cut_shard_is_refused_when_opened(tmp_path, damage, says):
    part = write(tmp_path, [RANDOM])
    path = tmp_path / "train-00000.arrayrecord"
    damage(path, path.read_bytes())
    with pytest.raises(DataError, match=rf"train-00000\.arrayrecord: {says}"):
        TokenStream(tmp_path, "train", part)


def test_a_shard_of_zeros_is_refused_when_read(tmp_path):
    part = write(tmp_path, [RANDOM])
    path = tmp_path / "train-00000.arrayrecord"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="has 0 records, not 1"):
        TokenStream(tmp_path, "train", part).read(0, 1)


def test_a_full_disk_is_not_taken_for_success(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**16, 2**18)  # half a megabyte that does not compress
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UsageError, match=r"train-00000\.arrayrecord: cannot be written .*free disk space"):
            write(tmp_path, [tokens], 2**16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------------------------------------- the corpus


def config(tmp_path, source, **fields):
    return DataConfig(**({"source": str(source), "cache_dir": str(tmp_path / "cache"), "sequence_length": 8} | fields))


def texts_file(tmp_path, texts, name="texts.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def some_texts(n, start=0):
    return [f"document {i} says {i * i}.\n" for i in range(start, start + n)]


def documents(corpus, stream):
    """The texts of a stream, cut at document ends."""
    ids, texts = [], []
    for token in stream.read(0, stream.num_tokens).tolist():
        if token == corpus.document_end_id:
            texts.append(corpus.tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert not ids  # a stream ends with a document's end
    return texts


def test_a_corpus_is_every_document_in_order_each_on_the_side_of_its_hash(tmp_path):
    texts = [*some_texts(100), "spells <|document_end|> out", "ünïcödé 🙂"]
    corpus = corpus_of(config(tmp_path, texts_file(tmp_path, texts), held_out=0.2), BYTES)
    assert documents(corpus, corpus.train) == [text for text in texts if place(text) >= 0.2]
    assert documents(corpus, corpus.held_out) == [text for text in texts if place(text) < 0.2]


def test_the_manifest_tells_what_is_in_the_corpus(tmp_path):
    path = texts_file(tmp_path, some_texts(100))
    path.write_text(path.read_text() + "{\n7\n7\n")
    data = config(tmp_path, path, held_out=0.2)
    corpus = corpus_of(data, BYTES)
    manifest = json.loads((corpus.path / "manifest.json").read_text())
    assert manifest == corpus.manifest
    planned = plan([str(path)], Recipe())
    assert manifest["source"] == {"spec": str(path), "fingerprint": planned.fingerprint, "formats": planned.formats}
    assert manifest["records"] == {"read": 103, "kept": 100}
    assert manifest["sources"][str(path)]["documents"] == 100
    assert manifest["tokenizer"]["fingerprint"] == corpus.tokenizer.fingerprint
    assert manifest["tokenizer"]["vocab_size"] == BYTES
    assert manifest["rejects"]["counts"] == {"not JSON": 1, "not an object": 2}
    assert manifest["rejects"]["examples"][0] == f"{path}:101: not JSON"
    for name, stream in (("train", corpus.train), ("held_out", corpus.held_out)):
        texts = documents(corpus, stream)
        assert manifest[name]["documents"] == len(texts)
        assert manifest[name]["bytes"] == sum(len(text.encode()) for text in texts)
        assert manifest[name]["tokens"] == stream.num_tokens == manifest[name]["bytes"] + len(texts)


def test_the_tokenizer_is_trained_on_training_documents_only(tmp_path):
    texts = some_texts(200)
    corpus = corpus_of(config(tmp_path, texts_file(tmp_path, texts), held_out=0.5), 300)
    assert corpus.tokenizer.fingerprint == train_bpe([text for text in texts if place(text) >= 0.5], 300).fingerprint


def test_a_tokenizer_of_ones_own_is_used(tmp_path):
    train_bpe(some_texts(50), 280).save(tmp_path / "mine")
    corpus = corpus_of(
        config(tmp_path, texts_file(tmp_path, some_texts(50)), tokenizer=str(tmp_path / "mine"), held_out=0.3), 512
    )
    assert corpus.tokenizer.fingerprint == load_tokenizer(str(tmp_path / "mine")).fingerprint
    assert corpus.tokenizer.vocab_size == 280


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    train_bpe(some_texts(50), 280).save(tmp_path / "mine")
    data = config(tmp_path, texts_file(tmp_path, some_texts(50)), tokenizer=str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 270: must be at least tokenizer bpe-280's 280"):
        corpus_of(data, 270)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------------------------ held out


def test_other_documents_and_their_order_do_not_move_a_document(tmp_path):
    few, more = some_texts(40), [*some_texts(60, start=40), *reversed(some_texts(40))]
    small = corpus_of(config(tmp_path, texts_file(tmp_path, few, "few.jsonl"), held_out=0.3), BYTES)
    large = corpus_of(config(tmp_path, texts_file(tmp_path, more, "more.jsonl"), held_out=0.3), BYTES)
    for name in ("train", "held_out"):
        before, after = (set(documents(corpus, getattr(corpus, name))) for corpus in (small, large))
        assert before == after & set(few)


def test_a_text_that_occurs_twice_is_never_on_both_sides(tmp_path):
    corpus = corpus_of(config(tmp_path, texts_file(tmp_path, some_texts(50) * 2), held_out=0.3), BYTES)
    train, held_out = (documents(corpus, stream) for stream in (corpus.train, corpus.held_out))
    assert len(train) + len(held_out) == 100
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(("held_out", "says"), [(0.0001, "held out"), (0.9999, "left for training")])
def test_an_empty_side_is_refused_with_a_fraction_that_works(tmp_path, held_out, says):
    path = texts_file(tmp_path, some_texts(3))
    with pytest.raises(DataError, match=rf"= {held_out}: none of 3 documents is {says}") as refusal:
        corpus_of(config(tmp_path, path, held_out=held_out), BYTES)
    works = float(re.search(r"data\.held_out=([0-9.]+) leaves", str(refusal.value))[1])
    corpus = corpus_of(config(tmp_path, path, held_out=works), BYTES)
    assert len(documents(corpus, corpus.train)) + len(documents(corpus, corpus.held_out)) == 3


def test_a_single_document_is_refused_as_it_cannot_be_split(tmp_path):
    for texts in (["only"], ["only", "only"]):
        with pytest.raises(DataError, match="a single text cannot be split"):
            corpus_of(config(tmp_path, texts_file(tmp_path, texts), held_out=0.5), BYTES)


def test_a_corpus_of_rejects_is_refused_with_their_names(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n")
    with pytest.raises(DataError, match=rf"holds no document: 1 record rejected: 1 not JSON; such as {path}:1: not JSON"):
        corpus_of(config(tmp_path, path), BYTES)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"holds no document$"):
        corpus_of(config(tmp_path, tmp_path / "empty.jsonl"), BYTES)


def test_a_side_shorter_than_a_row_is_refused_and_a_shorter_row_then_works(tmp_path):
    path = texts_file(tmp_path, some_texts(20))
    data = config(tmp_path, path, held_out=0.3)
    corpus = corpus_of(data, BYTES)
    with pytest.raises(DataError, match=r"= 5000: a row takes 5001 tokens, and the train documents have 286; .* at most 285$"):
        rows_of(corpus, "train", data, 5000)
    with pytest.raises(DataError, match=r"the held_out documents have \d+; use .* or a larger data\.held_out"):
        rows_of(corpus, "held_out", data, 200)
    assert len(rows_of(corpus, "held_out", data, 20)) > 0


# --------------------------------------------------------------------------------------------------------- cache


def test_a_second_preparation_neither_trains_nor_tokenises(tmp_path, monkeypatch):
    path = texts_file(tmp_path, [*some_texts(50), ""])
    first = corpus_of(config(tmp_path, path, held_out=0.3), 280)

    def refuse(*_):
        raise AssertionError("made anew")

    monkeypatch.setattr("lumina.tokenizer.train_bpe", refuse)
    monkeypatch.setattr(ShardWriter, "write", refuse)
    lines = []
    second = corpus_of(config(tmp_path, path, held_out=0.3, sequence_length=16), 280, lines.append)
    assert second.path == first.path
    assert second.fingerprint == first.fingerprint
    assert lines == [f"{path}: 1 record rejected: 1 empty text; such as {path}:51: empty text"]


def test_whatever_decides_the_tokens_decides_the_directory(tmp_path):
    path = texts_file(tmp_path, some_texts(50))
    more = texts_file(tmp_path, some_texts(51), "more.jsonl")
    train_bpe(some_texts(9), 265).save(tmp_path / "mine")
    base = corpus_of(config(tmp_path, path, held_out=0.3), BYTES)
    others = [
        corpus_of(config(tmp_path, more, held_out=0.3), BYTES),
        corpus_of(config(tmp_path, path, held_out=0.31), BYTES),
        corpus_of(config(tmp_path, path, held_out=0.3), 270),
        corpus_of(config(tmp_path, path, held_out=0.3, text_field="text"), BYTES),
        corpus_of(config(tmp_path, path, held_out=0.3, tokenizer=str(tmp_path / "mine")), 270),
    ]
    assert len({corpus.path for corpus in [base, *others]}) == 6


def test_the_same_text_elsewhere_is_found_in_the_cache(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    paths = [texts_file(directory, some_texts(50)) for directory in (tmp_path, tmp_path / "elsewhere")]
    one, two = (corpus_of(config(tmp_path, path, held_out=0.3), BYTES) for path in paths)
    assert one.path == two.path


def test_a_corpus_has_the_fingerprint_of_its_tokens_however_they_are_stored(tmp_path, monkeypatch):
    path = texts_file(tmp_path, some_texts(50))
    one = corpus_of(config(tmp_path, path, held_out=0.3, cache_dir=str(tmp_path / "one")), BYTES)
    monkeypatch.setattr(shards, "RECORD_TOKENS", 64)
    two = corpus_of(config(tmp_path, path, held_out=0.3, cache_dir=str(tmp_path / "two")), BYTES)
    three = corpus_of(config(tmp_path, path, held_out=0.4), BYTES)
    assert one.fingerprint == two.fingerprint != three.fingerprint


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_no_half_cache(tmp_path, monkeypatch, error):
    def interrupt(self):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", interrupt)
        with pytest.raises(error):
            corpus_of(config(tmp_path, texts_file(tmp_path, some_texts(50)), held_out=0.3), BYTES)
    assert all(path.name.startswith("tokenizer-") for path in (tmp_path / "cache").iterdir())
    corpus_of(config(tmp_path, tmp_path / "texts.jsonl", held_out=0.3), BYTES)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(tmp_path, monkeypatch):
    dead, living = tmp_path / "cache/.making-dead", tmp_path / "cache/.making-living"
    for directory in (dead, living):
        directory.mkdir(parents=True)
    held = os.open(living, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    now = time.time()
    monkeypatch.setattr("lumina.data.sources.time.time", lambda: now + 120)
    corpus_of(config(tmp_path, texts_file(tmp_path, some_texts(50)), held_out=0.3), BYTES)
    assert living.is_dir()
    assert not dead.exists()
    os.close(held)


def test_the_slower_of_two_processes_takes_what_the_faster_made(tmp_path):
    data = config(tmp_path, texts_file(tmp_path, some_texts(50)), held_out=0.3)
    faster = []

    def overtake(line):
        if ": 50 documents" in line and not faster:
            faster.append(corpus_of(data, BYTES, lambda line: None))
            with (faster[0].path / "manifest.json").open("a") as manifest:
                manifest.write("\n\n")  # to tell the two apart

    slower = corpus_of(data, BYTES, overtake)
    assert slower.path == faster[0].path
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("tokenizer-")] == [slower.path]
    assert (slower.path / "manifest.json").read_text().endswith("\n\n")


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    path = texts_file(tmp_path, some_texts(50))

    def change(line):
        texts_file(tmp_path, some_texts(51))

    with pytest.raises(DataError, match="changed while it was being read"):
        corpus_of(config(tmp_path, path, held_out=0.3), BYTES, change)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("lumina.tokenizer.train_bpe", lambda *_: pytest.fail("worked first"))
    data = config(tmp_path, texts_file(tmp_path, some_texts(50)), cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"file/cache.*cannot be written .*set data\.cache_dir or LUMINA_CACHE"):
        corpus_of(data, BYTES)


def test_the_cache_is_where_the_environment_says_unless_the_config_does(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMINA_CACHE", str(tmp_path / "environment"))
    path = texts_file(tmp_path, some_texts(50))
    assert corpus_of(config(tmp_path, path, held_out=0.3, cache_dir=""), BYTES).path.parent == tmp_path / "environment"
    assert corpus_of(config(tmp_path, path, held_out=0.3), BYTES).path.parent == tmp_path / "cache"


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_manifest_is_refused_by_name(tmp_path, content):
    data = config(tmp_path, texts_file(tmp_path, some_texts(50)), held_out=0.3)
    (corpus_of(data, BYTES).path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: cannot be read as a manifest .* delete .* made again"):
        corpus_of(data, BYTES)


def test_a_swapped_tokenizer_is_refused(tmp_path):
    data = config(tmp_path, texts_file(tmp_path, some_texts(50)), held_out=0.3)
    corpus = corpus_of(data, 280)
    train_bpe(some_texts(9), 262).save(corpus.path / "tokenizer")
    with pytest.raises(DataError, match="its tokens were made with tokenizer"):
        open_corpus(corpus.path)


def test_progress_tells_of_documents_and_rate(tmp_path):
    lines = []
    corpus_of(config(tmp_path, texts_file(tmp_path, some_texts(50)), held_out=0.3), BYTES, lines.append)
    assert lines[0] == "training a tokenizer of 262 ids on 1.8 kB"
    assert re.search(r": 50 documents, [1-9][0-9.]* kB, of which \d+ held out", lines[-1])
