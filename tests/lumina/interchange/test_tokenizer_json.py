"""tokenizer.json and the chat template, loaded by transformers, against Lumina's own ids."""

import json
from itertools import islice

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.config import DataConfig
from lumina.conversation import ROLES, TEMPLATES, render
from lumina.data.records import Turn
from lumina.data.sources import held_out_texts
from lumina.errors import DataError
from lumina.interchange import tokenizer_json
from lumina.tokenizer import CONTROL_TOKENS, train_bpe
from lumina.tokenizer_files import PATTERNS, load_tokenizer

# What the patterns tell apart, and what engines differ over: line ends, contractions and their odd cases, marks, new scripts.
PARTS = [
    *(
        "a",
        "B",
        "the",
        "1",
        "23",
        "4567",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'S",
        "'\u017f",
        "'LL",
        "é",
        "e\u0301",
        "中",
        "\u0085",
    ),
    *(
        "\u00a0",
        "\u2028",
        "🎉",
        "\u200d",
        "<|user|>",
        "<|",
        "|>",
        "İ",
        "ß",
        "\U00010d40",
        "²",
        "Ⅷ",
        "_",
        "/",
        "\x00",
        "\x1c",
        "ǅ",
    ),
]


# Of conversations: the template refuses what spells a control token.
TEXTS = st.lists(st.sampled_from([part for part in PARTS if part != "<|user|>"]), max_size=8).map("".join)


@pytest.fixture(scope="module")
def texts():
    return [text[:4000] for text in islice(held_out_texts(DataConfig(source="stdlib", held_out=0.5)), 200)]


@pytest.fixture(scope="module")
def bpe(texts):
    return train_bpe(texts, 600)


@pytest.fixture(scope="module")
def pair(bpe, tmp_path_factory):
    """The tokenizer, and transformers' of what is written of it."""
    return bpe, loaded(tmp_path_factory.mktemp("tokenizer"), bpe)


def loaded(directory, tokenizer, template="lumina"):
    tokenizer_json.write(directory, tokenizer, 1 << 20, template)
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def rendered(tokenizer, messages, prompted=False, template="lumina"):
    turns = [Turn(message["role"], message["content"]) for message in messages]
    return render(tokenizer, turns, template, prompted).ids.tolist()


def with_pattern(directory, bpe, name, extra=()):
    """The same ranks, cut by another pattern, as `gpt2` and `o200k_base` are, whose files are not on every machine."""
    from lumina.tokenizer import BPE

    bpe.save(directory)
    ranks = json.loads((directory / "lumina_tokenizer.json").read_text())["ranks"]
    return BPE(name, PATTERNS[name], [rank.encode("latin-1") for rank in ranks], extra)


def as_text(theirs, text):
    return theirs(text, split_special_tokens=True)["input_ids"]


def test_real_text_has_the_same_ids(pair, texts):
    ours, theirs = pair
    for text in texts:
        assert as_text(theirs, text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.text(max_size=20))
@settings(max_examples=300)
def test_any_text_has_the_same_ids(pair, text):
    ours, theirs = pair
    assert as_text(theirs, text) == ours.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "o200k_base"])
def test_the_other_patterns_cut_alike(name, bpe, tmp_path):
    ours = with_pattern(tmp_path, bpe, name)
    theirs = loaded(tmp_path, ours)

    @given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join))
    @settings(max_examples=150)
    def same(text):
        assert as_text(theirs, text) == ours.encode(text)

    same()


def test_runs_of_digits_and_of_spaces_before_a_line_end(pair):
    ours, theirs = pair
    for text in ("1234567890", "a   \nb", "a   \n", "x \n\n  \n y   ", "   ", "\n"):
        assert as_text(theirs, text) == ours.encode(text)


def test_repeated_letters_join_from_the_left(tmp_path):
    ours = train_bpe(["aaa aaaaa aaaaaaa aa " * 50], 256 + 6 + 5)
    theirs = loaded(tmp_path, ours)
    for length in range(1, 40):
        assert as_text(theirs, "a" * length) == ours.encode("a" * length)


def test_control_tokens_have_their_ids_and_ordinary_text_never_becomes_one(pair):
    ours, theirs = pair
    assert theirs.eos_token_id == ours.control["<|document_end|>"]
    assert theirs.pad_token_id == ours.control["<|padding|>"]
    assert set(theirs.all_special_ids) == set(ours.control.values())
    for token, i in ours.control.items():
        assert theirs.convert_tokens_to_ids(token) == i
        assert not set(as_text(theirs, f"a{token}b")) & set(ours.control.values())
        assert theirs(token)["input_ids"] == [i]  # so that a rendered conversation has them; see tokenizer_config


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is\n\n<|this|>?  \n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Ünïcode 🎉 {{ messages }}"},
]


@pytest.mark.parametrize("prompted", [False, True])
def test_the_template_gives_the_ids_of_render(pair, prompted):
    ours, theirs = pair
    expected = rendered(ours, MESSAGES, prompted)
    found = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompted, return_dict=False)
    assert found == expected
    control = [i for i in expected if i in ours.control.values()]
    names = [name for m in MESSAGES for name in (f"<|{m['role']}|>", "<|turn_end|>")] + ["<|assistant|>"] * prompted
    assert [ours.decode([i]) for i in control] == names


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pattern", ["cl100k_base", "gpt2", "o200k_base"])
def test_each_template_gives_every_text_the_ids_of_render(pattern, template, bpe, tmp_path):
    ours = with_pattern(tmp_path, bpe, pattern, TEMPLATES[template].extra)
    theirs = loaded(tmp_path, ours, template)

    @given(st.lists(st.tuples(st.sampled_from(ROLES), TEXTS), min_size=1, max_size=3), st.booleans())
    @settings(max_examples=60, deadline=None)
    def same(turns, prompted):
        messages = [{"role": role, "content": text} for role, text in turns]
        found = theirs.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
        assert found == rendered(ours, messages, prompted, template)

    same()
    with pytest.raises(Exception, match="spells the control token"):
        theirs.apply_chat_template([{"role": "user", "content": [*ours.control][-1]}])


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_message_that_spells_a_control_token_is_refused_by_the_template_and_text_to_us(pair, token):
    ours, theirs = pair
    messages = [{"role": "user", "content": f"a{token}"}]
    with pytest.raises(Exception, match="spells the control token"):
        theirs.apply_chat_template(messages)
    ids = rendered(ours, messages)
    assert [i for i in ids if i in ours.control.values()] == [ours.control["<|user|>"], ours.control["<|turn_end|>"]]
    assert ours.decode(ids) == f"<|user|>a{token}<|turn_end|>"


def test_an_unknown_role_is_refused_by_both(pair):
    ours, theirs = pair
    with pytest.raises(Exception, match="role tool: must be one of system, user, assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": ""}])
    with pytest.raises(DataError, match="role 'tool': must be one of system, user, assistant"):
        rendered(ours, [{"role": "tool", "content": ""}])


def copied(directory, extra=()):
    """A tokenizer.json of somebody else's, which begins each text with a token of its own."""
    model = tokenizers.models.BPE()
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", *extra],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(["some text to learn from, some more text " * 20], trainer)
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    theirs.save(str(directory / "tokenizer.json"))
    return load_tokenizer(str(directory / "tokenizer.json"))


def test_a_copied_tokenizer_is_handed_through(tmp_path):
    ours = copied(tmp_path)
    theirs = loaded(tmp_path, ours)
    for text in ("some more text", "<s> and <|user|>", "Ünïcode 🎉"):
        assert as_text(theirs, text) == ours.encode(text)
    messages = [{"role": "user", "content": "some text"}]
    assert theirs.apply_chat_template(messages, return_dict=False) == rendered(ours, messages)


def test_a_copied_tokenizer_with_a_control_token_of_its_own_is_refused(tmp_path):
    ours = copied(tmp_path, ["<|user|>"])
    with pytest.raises(DataError, match=r"<\|user\|> as id 1, and Lumina as"):
        tokenizer_json.write(tmp_path, ours, 128)


def test_a_copied_tokenizer_keeps_its_own_ids_of_a_templates_tokens(tmp_path):
    copied(tmp_path, ["<|im_start|>"])
    ours = load_tokenizer(str(tmp_path / "tokenizer.json"), TEMPLATES["chatml"].extra)
    assert ours.control["<|im_start|>"] == 1
    theirs = loaded(tmp_path, ours, "chatml")
    found = theirs.apply_chat_template(MESSAGES, return_dict=False)
    assert found == rendered(ours, MESSAGES, template="chatml")
