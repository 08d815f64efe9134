"""Tokenizers from files: the ids are those of the libraries, and what is damaged, missing or unknown is refused."""

import base64
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tiktoken_ext import openai_public

from lumina import tokenizer_files
from lumina.errors import ConfigError, DataError
from lumina.tokenizer import BPE, CONTROL_TOKENS, FILE, GPT4_PATTERN, train_bpe
from lumina.tokenizer_files import NAMED_ENCODINGS, PATTERNS, load_tokenizer
from tests.lumina.tokenizer_samples import ALL, CORPUS, ranks_of, sentencepiece_model, visible, write_all


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of what `load_tokenizer` can read."""
    return write_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def loaded(files):
    return {name: load_tokenizer(str(path)) for name, path in files.items()}


# ---------------------------------------------------------------------------------------------------- files and names


def test_hugging_face_gives_real_text_the_same_ids_from_the_same_merges(loaded):
    assert loaded["huggingface_bpe"].encode(CORPUS) == loaded["bpe"].encode(CORPUS)


@pytest.mark.parametrize("name", ["sentencepiece_bpe", "sentencepiece_unigram", "huggingface_unigram", "huggingface_nfkc"])
def test_ids_of_ordinary_text_are_those_of_the_library(files, loaded, name):
    if name.startswith("sentencepiece"):
        expected = sentencepiece.SentencePieceProcessor(model_file=str(files[name])).encode(CORPUS)
    else:
        expected = tokenizers.Tokenizer.from_file(str(files[name])).encode(CORPUS, add_special_tokens=False).ids
    assert loaded[name].encode(CORPUS) == expected


def test_a_special_token_that_merges_would_make_is_not_made(files, loaded, tmp_path):
    merged = next(token.decode() for token in ranks_of(loaded["bpe"]) if len(token) > 2 and token.isalpha())
    file = tokenizers.Tokenizer.from_file(str(files["huggingface_bpe"]))
    file.add_special_tokens([merged])
    file.save(str(tmp_path / "merged.json"))
    tokenizer = load_tokenizer(str(tmp_path / "merged.json"))
    assert file.token_to_id(merged) not in tokenizer.encode(merged)
    assert tokenizer.decode(tokenizer.encode(merged)) == merged


def test_text_unknown_to_a_model_without_bytes_is_shown_as_replaced(files, tmp_path):
    (tmp_path / "few.model").write_bytes(sentencepiece_model("unigram", byte_fallback=False))
    values = json.loads(files["huggingface_unigram"].read_text())
    values["model"]["byte_fallback"] = False
    (tmp_path / "few.json").write_text(json.dumps(values))
    for name in ("few.model", "few.json"):
        tokenizer = load_tokenizer(str(tmp_path / name))
        assert tokenizer.decode(tokenizer.encode("a\u0e01b")) == "a\ufffdb"


@pytest.mark.parametrize("name", ALL)
def test_a_saved_tokenizer_loads_from_its_directory_alone(loaded, name, tmp_path):
    loaded[name].save(tmp_path / "copy")
    again = load_tokenizer(str((tmp_path / "copy").rename(tmp_path / "moved")))
    assert (again.name, again.fingerprint) == (loaded[name].name, loaded[name].fingerprint)
    assert again.encode(CORPUS[:2000]) == loaded[name].encode(CORPUS[:2000])


def test_different_tokenizers_have_different_fingerprints(loaded):
    assert len({tokenizer.fingerprint for tokenizer in loaded.values()}) == len(loaded)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["ranks"].reverse(),
        lambda values: values["ranks"].pop(),
        lambda values: values["ranks"].remove("a"),
        lambda values: values["ranks"].append(values["ranks"][300]),
        lambda values: values["ranks"].append(""),
        lambda values: values["ranks"].append("中"),
        lambda values: values.update(pattern="."),
        lambda values: values.update(pattern="("),
        lambda values: values.update(format="lumina-tokenizer-0"),
        lambda values: values.update(kind="pickle"),
        lambda values: values["control"].reverse(),
        lambda values: values.pop("fingerprint"),
        lambda values: values.pop("ranks"),
    ],
)
def test_a_changed_file_is_refused(files, tmp_path, change):
    values = json.loads((files["bpe"] / FILE).read_text())
    change(values)
    (tmp_path / FILE).write_text(json.dumps(values))
    with pytest.raises(DataError, match=FILE):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("ranks", [[b"a"], [b""], []], ids=["twice", "empty", "missing"])
def test_ranks_that_cannot_encode_every_text_are_refused(ranks):
    single = [bytes([byte]) for byte in range(256 if ranks else 255)]
    with pytest.raises(ValueError, match="ranks hold a token twice, or an empty one, or lack bytes"):
        BPE("", GPT4_PATTERN, single + ranks)


def test_a_changed_copy_of_another_librarys_file_is_refused(loaded, tmp_path):
    loaded["huggingface_unigram"].save(tmp_path)
    copy = tmp_path / "tokenizer.json"
    copy.write_text(copy.read_text().replace("-4.0", "-5.0", 1))
    with pytest.raises(DataError, match="was changed"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["empty.model", "noise.model", "empty.json", "noise.json", "list.json", "noise.tiktoken"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, name):
    content = {"empty": b"", "noise": bytes(range(256)), "list": b"[]"}[name.split(".")[0]]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_tokenizer(str(tmp_path / name))


def test_a_decoder_that_gives_no_bytes_to_a_token_is_refused(files, tmp_path):
    values = json.loads(files["huggingface_unigram"].read_text()) | {
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}
    }
    (tmp_path / "words.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"words\.json: its decoder \(WordPiece\)"):
        load_tokenizer(str(tmp_path / "words.json"))


def test_truncation_padding_and_dropout_in_a_file_are_not_applied(files, loaded, tmp_path):
    file = tokenizers.Tokenizer.from_file(str(files["huggingface_bpe"]))
    file.enable_truncation(5)
    file.enable_padding(length=3000)
    values = json.loads(file.to_str())
    values["model"]["dropout"] = 0.5
    (tmp_path / "changed.json").write_text(json.dumps(values))
    assert load_tokenizer(str(tmp_path / "changed.json")).encode(CORPUS[:2000]) == loaded["huggingface_bpe"].encode(
        CORPUS[:2000]
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(files, monkeypatch):
    for package, name in (("tokenizers", "huggingface_bpe"), ("sentencepiece", "sentencepiece_bpe")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=f"pip install {package}"):
            load_tokenizer(str(files[name]))


def test_importing_the_module_imports_no_tokenizer_library():
    program = (
        "import sys, lumina.tokenizer_files; print({'tiktoken', 'rustbpe', 'tokenizers', 'sentencepiece'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"


@pytest.mark.parametrize("name", NAMED_ENCODINGS)
def test_named_encodings_have_the_address_hash_and_pattern_of_tiktoken(monkeypatch, name):
    asked = {}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: asked.update({url: expected_hash}))
    monkeypatch.setattr(
        openai_public,
        "data_gym_to_mergeable_bpe_ranks",
        lambda encoder_json_file, encoder_json_hash, **_: asked.update({encoder_json_file: encoder_json_hash}),
    )
    made = openai_public.ENCODING_CONSTRUCTORS[name]()
    address, sha256 = tokenizer_files._FILES[name]
    assert asked == {tokenizer_files._PUBLIC + address: sha256}
    assert made["pat_str"] == PATTERNS[name]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def public_file(bpe, name):
    """What the public file of the named encoding would be, had it the ranks of `bpe`."""
    ranks = ranks_of(bpe)
    if name == "gpt2":
        return json.dumps({visible(token): i for i, token in enumerate(ranks)} | {"<|endoftext|>": len(ranks)}).encode()
    return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(ranks))


@pytest.mark.parametrize("name", NAMED_ENCODINGS)
@pytest.mark.parametrize("how", ["cache name", "public name", "path"])
def test_a_named_encoding_is_read_from_its_public_file(loaded, monkeypatch, cache, name, how):
    content = public_file(loaded["bpe"], name)
    address = tokenizer_files._FILES[name][0]
    monkeypatch.setitem(tokenizer_files._FILES, name, (address, hashlib.sha256(content).hexdigest()))
    cache_name = hashlib.sha1((tokenizer_files._PUBLIC + address).encode(), usedforsecurity=False).hexdigest()
    file = cache / (cache_name if how == "cache name" else address.split("/")[-1])
    file.write_bytes(content)
    tokenizer = load_tokenizer(str(file) if how == "path" else name)
    ranks = {token: rank for rank, token in enumerate(ranks_of(loaded["bpe"]))}
    reference = tiktoken.Encoding(name, pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.name == name
    assert tokenizer.encode(CORPUS) == reference.encode_ordinary(CORPUS)


@pytest.mark.parametrize("name", NAMED_ENCODINGS)
def test_a_named_encoding_that_is_not_here_is_refused_with_the_place_to_put_it(cache, name):
    with pytest.raises(DataError, match=r"nothing is downloaded") as refusal:
        load_tokenizer(name)
    assert str(cache / tokenizer_files._FILES[name][0].split("/")[-1]) in str(refusal.value)


def test_a_damaged_file_of_a_named_encoding_is_refused_and_left_where_it_is(loaded, cache):
    file = cache / "cl100k_base.tiktoken"
    file.write_bytes(public_file(loaded["bpe"], "cl100k_base"))
    with pytest.raises(DataError, match=r"cl100k_base\.tiktoken: sha256 .* is not that of"):
        load_tokenizer("cl100k_base")
    assert file.exists()


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(DataError, match="gpt3: no such tokenizer file; give one, or gpt2, cl100k_base, o200k_base"):
        load_tokenizer("gpt3")


# ---------------------------------------------------------------------------------------------- further control tokens

FURTHER = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("name", ALL)
def test_further_control_tokens_come_last_and_change_no_other_id(files, loaded, name, tmp_path):
    plain, more = loaded[name], load_tokenizer(str(files[name]), FURTHER)
    assert list(more.control.items()) == [
        *plain.control.items(),
        *zip(FURTHER, itertools.count(plain.vocab_size), strict=False),
    ]
    assert more.vocab_size == plain.vocab_size + 2 == len(more.token_bytes())
    assert more.encode(CORPUS[:2000] + FURTHER[0]) == plain.encode(CORPUS[:2000] + FURTHER[0])
    assert more.decode([more.control[FURTHER[1]]]) == FURTHER[1]
    assert more.fingerprint != plain.fingerprint
    more.save(tmp_path)
    for again in (load_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path), FURTHER[1:])):
        assert (again.control, again.fingerprint) == (more.control, more.fingerprint)


def test_without_further_control_tokens_the_fingerprint_is_that_of_the_first_release(loaded):
    ranks = [token.decode("latin-1") for token in ranks_of(loaded["bpe"])]
    decides = ["lumina-tokenizer-1", "bpe", list(CONTROL_TOKENS), {"pattern": GPT4_PATTERN, "ranks": ranks}]
    assert loaded["bpe"].fingerprint == hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def test_a_saved_tokenizer_can_be_given_further_control_tokens(loaded, tmp_path):
    loaded["bpe"].save(tmp_path)
    more = load_tokenizer(str(tmp_path), FURTHER)
    assert more.control[FURTHER[0]] == loaded["bpe"].vocab_size
    more.save(tmp_path / "more")
    assert load_tokenizer(str(tmp_path / "more")).control == more.control


def test_training_counts_further_control_tokens_in_the_vocabulary(loaded):
    more = train_bpe([CORPUS], 702, extra=FURTHER)
    assert more.vocab_size == 702
    assert more.encode(CORPUS[:2000]) == loaded["bpe"].encode(CORPUS[:2000])
    with pytest.raises(ConfigError, match="must be at least 264, 256 bytes and 8 control tokens"):
        train_bpe([CORPUS], 263, extra=FURTHER)


def test_special_tokens_of_a_file_keep_their_ids_as_control_tokens(files, tmp_path):
    file = tokenizers.Tokenizer.from_file(str(files["huggingface_bpe"]))
    file.add_special_tokens(list(FURTHER[:1]))
    file.save(str(tmp_path / "tokenizer.json"))
    plain, more = (load_tokenizer(str(tmp_path / "tokenizer.json"), extra) for extra in ((), FURTHER))
    assert more.control[FURTHER[0]] == file.token_to_id(FURTHER[0])
    assert more.control[FURTHER[1]] == plain.vocab_size == more.vocab_size - 1
    assert more.decode([more.control[FURTHER[0]]]) == FURTHER[0]
    assert plain.decode([more.control[FURTHER[0]]]) == ""
    assert not set(more.encode(FURTHER[0])) & set(more.control.values())
    more.save(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).control == more.control


@pytest.mark.parametrize("token", ["im_start", "<|Im|>", "<||>", "<|a b|>"])
def test_a_control_token_of_another_form_is_refused(token):
    with pytest.raises(ConfigError, match="must be lower-case letters, digits and _ in bars"):
        train_bpe([], 263, extra=(token,))
