"""What a run reads of real corpora: rows of texts and of conversations, and what of them is learned."""

from types import SimpleNamespace

import numpy as np
import pytest

from lumina.config import Config, DataConfig, validate
from lumina.data.packing import FORMAT
from lumina.data.rows import PackedRows, Rows
from lumina.errors import ConfigError, DataError
from lumina.runs.directory import RunDirectory
from lumina.runs.evaluation import figures_by_source, held_out_figures
from lumina.runs.text import corpora_of, manifest, open_corpora, read, rows_of
from tests.lumina.corpora import WORDS, chats, texts
from tests.lumina.data.streams import documents

V, T, ALONE = 300, 32, ((0,), 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    texts(path / "texts.jsonl")
    chats(path / "chats.jsonl")
    return path


def config(path, **data):
    made = Config()
    made.model.vocab_size, made.train.batch_size, made.train.steps, made.optim.warmup_steps = V, 4, 50, 0
    made.data.sequence_length, made.data.held_out, made.data.cache_dir = T, 0.2, str(path / "cache")
    made.data.source = f"{path}/texts.jsonl@3, {path}/chats.jsonl@1"
    for name, value in data.items():
        setattr(made.data, name, value)
    return validate(made)


def quiet(line):
    pass


def text_of(path, **data):
    made = config(path, **data)
    return read(made, open_corpora(made, quiet), ALONE)


def learned(text, batches):
    """The texts of the targets that count, of all rows in order, and their weights."""
    found = [(batch["targets"], batch["weights"]) for batch in batches]
    targets, weights = (np.concatenate(each) for each in zip(*found, strict=True))
    return text.tokenizer.decode_bytes(targets[weights > 0]).decode(), targets, weights


def test_all_sources_share_a_tokenizer_and_texts_are_chunks_and_conversations_packed(path):
    text = text_of(path)
    first, second = text.corpora.values()
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint == text.tokenizer.fingerprint
    assert [type(table.rows) for table in text.train.rows.tables] == [Rows, PackedRows]
    assert [type(each.rows) for each in text.held_out.values()] == [Rows, PackedRows]


def test_texts_are_packed_where_the_config_says_so(path):
    text = text_of(path, source=f"{path}/texts.jsonl", rows="packed")
    (table,) = text.train.rows.tables
    _, _, weights = learned(text, [table.rows.gather(np.arange(len(table.rows)))])
    (corpus,) = text.corpora.values()
    assert isinstance(table.rows, PackedRows)
    assert set(np.unique(weights)) <= {0, 1}
    assert weights.sum() == corpus.train.num_tokens - (len(corpus.documents("train")) - 1)  # all but each document's first


def test_of_conversations_the_assistants_words_and_turn_ends_are_learned_and_nothing_else(path):
    text = text_of(path, source=f"{path}/chats.jsonl")
    (table,) = text.train.rows.tables
    said, targets, weights = learned(text, [table.rows.gather(np.arange(len(table.rows)))])
    assert said.isupper()
    assert set(said) <= set("".join(WORDS).upper())
    end = text.tokenizer.control["<|turn_end|>"]
    (corpus,) = text.corpora.values()
    roles = corpus.roles("train").read(0, corpus.train.num_tokens)
    assert np.sum((targets == end) & (weights > 0)) == np.sum((corpus.train.read(0, len(roles)) == end) & (roles == 3))
    assert np.sum(weights > 0) == np.sum(roles == 3)


def test_weights_of_roles_are_those_of_training_and_held_out_tokens_count_as_one(path):
    text = text_of(path, source=f"{path}/chats.jsonl", loss_weights="assistant=1.5,user=0.5")
    (table,), (held_out,) = text.train.rows.tables, text.held_out.values()
    _, _, weights = learned(text, [table.rows.gather(np.arange(len(table.rows)))])
    assert set(np.unique(weights)) == {0, 0.5, 1.5}
    said, _, weights = learned(text, held_out.evaluation())
    assert set(np.unique(weights)) == {0, 1}
    assert "say" in said


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"template": "chatlm"}, r"data\.template 'chatlm': there is none of that name; use lumina"),
        ({"loss_weights": "assistent=1"}, r"data\.loss_weights = 'assistent=1': 'assistent' is no role"),
    ],
)
def test_a_template_or_role_that_there_is_not_is_refused_before_anything_is_read(path, data, says):
    with pytest.raises(ConfigError, match=says):
        open_corpora(config(path, source="gone.txt", **data), quiet)


def test_how_documents_were_packed_is_told_once_for_each_source_and_length(path):
    stages = f"10 x 16: {path}/texts.jsonl; 10: {path}/chats.jsonl; {path}/chats.jsonl"
    told, made = [], config(path, source="stdlib", stages=stages)
    read(made, open_corpora(made, quiet), ALONE, told.append)
    assert len(told) == 1
    assert told[0].startswith(f"{path}/chats.jsonl: ")
    assert "packed rows" in told[0]


def test_another_reading_maps_the_plan_that_the_first_made(path, monkeypatch):
    text_of(path)
    monkeypatch.setattr("lumina.runs.text.plan", lambda *arguments: pytest.fail("planned again"))
    text_of(path)


def test_a_directory_that_was_prepared_anew_has_a_plan_of_its_own(tmp_path):
    def rows(lengths, digest):
        stream, ends = documents(lengths)
        corpus = SimpleNamespace(
            path=tmp_path, kind="text", train=stream, documents=lambda side: ends, manifest={"train": {"tokens_sha256": digest}}
        )
        return len(rows_of(corpus, "train", DataConfig(rows="packed"), 8))

    assert (rows([9] * 5, "a" * 64), rows([9] * 7, "b" * 64), rows([9] * 5, "a" * 64)) == (5, 7, 5)


def test_documents_without_two_tokens_are_refused(tmp_path):
    stream, ends = documents([1, 1])
    corpus = SimpleNamespace(path=tmp_path, kind="text", train=stream, documents=lambda side: ends, manifest={})
    with pytest.raises(DataError, match="notes: no train document has two tokens"):
        rows_of(corpus, "train", DataConfig(rows="packed"), 8, "notes")


def test_of_several_sources_the_one_that_is_too_short_is_named(path, tmp_path):
    short = texts(tmp_path / "short.jsonl", 9)
    with pytest.raises(DataError, match=r"^/.*short\.jsonl: data\.sequence_length = 500: a row takes 501 tokens"):
        text_of(path, source=f"{path}/texts.jsonl@1,{short}@1", sequence_length=500)


def test_the_fingerprint_is_of_all_sources_and_of_how_they_are_packed(path, monkeypatch):
    def told(**data):
        return manifest(open_corpora(made := config(path, **data), quiet), made.data)

    texts_alone = f"{path}/texts.jsonl"
    both, one, packed = told(), told(source=texts_alone), told(source=texts_alone, rows="packed")
    (other,) = both["others"].values()
    assert len({both["fingerprint"], other["fingerprint"], one["fingerprint"]}) == 3
    assert "others" not in one
    assert packed == one | {"packing": FORMAT, "fingerprint": packed["fingerprint"]}
    assert packed["fingerprint"] != one["fingerprint"]
    monkeypatch.setattr("lumina.runs.text.FORMAT", FORMAT + 1)
    assert told(source=texts_alone)["fingerprint"] == one["fingerprint"]
    assert told(source=texts_alone, rows="packed")["fingerprint"] != packed["fingerprint"]


def test_the_corpora_of_a_run_are_opened_with_its_tokenizer_and_must_be_the_same(path, tmp_path):
    made, run = config(path), RunDirectory(tmp_path)
    corpora = open_corpora(made, quiet)
    run.record(made, manifest(corpora, made.data), next(iter(corpora.values())).tokenizer)
    found = corpora_of(run, made, quiet)
    assert manifest(found, made.data) == manifest(corpora, made.data)
    with pytest.raises(DataError, match=r"was trained on other data than data\.source"):
        corpora_of(run, config(path, held_out=0.3), quiet)


# ------------------------------------------------------------------------------------------------------- evaluation


def sums(loss, weight, count):
    return {"loss": loss, "correct": weight / 2, "weight": weight, "text_bytes": count, "taken_L": np.zeros(0)}


def test_figures_over_sources_are_weighted_by_tokens():
    totals = {"a": [sums(20.0, 10.0, 30), sums(10.0, 5.0, 15)], "b": [sums(3.0, 3.0, 5)]}
    found = figures_by_source(totals)
    assert (found["loss"], found["tokens"], found["bytes"]) == (33 / 18, 18, 50)
    assert (found["sources"]["a"]["loss"], found["sources"]["b"]["loss"]) == (2.0, 1.0)
    assert "sources" not in figures_by_source({"a": totals["a"]})


def test_held_out_rows_in_which_nothing_counts_have_no_loss_and_no_tokens():
    found = held_out_figures([sums(0.0, 0.0, 0)])
    assert np.isnan(found["loss"])
    assert found["tokens"] == 0
