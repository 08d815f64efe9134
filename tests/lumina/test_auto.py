"""The choice of a preset by memory."""

import pytest

from lumina import auto
from lumina.architecture import counts
from lumina.config import load
from lumina.errors import ConfigError, DataError
from lumina.footprint import footprint


@pytest.fixture
def no_named_encodings(monkeypatch):
    """A machine that has no tokenizer files."""

    def missing(name):
        raise DataError(f"{name} is not here")

    monkeypatch.setattr("lumina.tokenizer_files.load_tokenizer", missing)


@pytest.fixture
def all_named_encodings(monkeypatch):
    monkeypatch.setattr("lumina.tokenizer_files.load_tokenizer", lambda name: None)


def test_the_choice_fits_and_the_next_larger_does_not(all_named_encodings, capsys):
    free = 20 << 30
    chosen = auto.choose(free)
    assert footprint(chosen).total <= free * auto.SHARE
    said = capsys.readouterr().err
    assert "chosen: medium" in said
    assert "passed over: large (1.40 B parameters) needs 27" in said


def test_presets_whose_tokenizer_is_missing_are_passed_over_aloud(no_named_encodings, capsys):
    chosen = auto.choose(20 << 30)
    assert chosen.data.tokenizer == "bpe"
    assert "its tokenizer gpt2 is not at hand" in capsys.readouterr().err


def test_more_memory_never_chooses_a_smaller_model(all_named_encodings):
    sizes = [counts(auto.choose(gib << 30)).total for gib in (1, 2, 8, 32, 200, 5000, 60000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == counts(load("b300")).total


def test_micro_batches_shrink_to_fit(all_named_encodings):
    roomy, tight = auto.choose(64 << 30), auto.choose(35 << 30)
    assert counts(roomy).total == counts(tight).total
    assert tight.train.micro_batches > roomy.train.micro_batches
    assert tight.train.batch_size == roomy.train.batch_size


def test_too_little_memory_is_refused_with_the_figures(all_named_encodings):
    with pytest.raises(ConfigError, match="50 MiB free given: the smallest preset does not fit"):
        auto.choose(50 << 20)


def test_this_machine_has_memory_of_its_own():
    free, where = auto.free_memory()
    assert free > 100 << 20
    assert where in ("on the GPU", "in this machine's memory")


def test_a_gpu_that_does_not_answer_is_no_reason_to_take_the_cpu(monkeypatch):
    def hang(*args, timeout, **kwargs):
        raise auto.subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(auto.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(auto.subprocess, "run", hang)
    with pytest.raises(ConfigError, match="nvidia-smi did not answer within 30 s; name a preset instead"):
        auto.free_memory()
