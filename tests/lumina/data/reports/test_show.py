"""`lumina data show`: the tokens of a record, which of them are learned, and what is said of a record that is none."""

import io
import json

import pytest

from lumina import cli
from lumina.conversation import TEMPLATES, parse, render
from lumina.data.records import Turn
from lumina.errors import ConfigError, UsageError
from lumina.tokenizer import train_bpe
from lumina.tokenizer_files import load_tokenizer

RECORDS = [
    {"messages": [{"role": "human", "content": "What is\n2 + 2?"}, {"role": "gpt", "content": "4 é\x1b[2J"}]},
    {"prompt": "Hi", "chosen": "Hello there", "rejected": "Go away"},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"text": "Just a text"},
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("show")
    (directory / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS), encoding="utf-8")
    train_bpe(["What is there? Hello there, " * 9], 270).save(directory / "tokenizer")
    return directory


@pytest.fixture
def told(places, capsys):
    def run(*options):
        cli.run(["data", "show", str(places / "chats.jsonl"), *options])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("template", TEMPLATES)
def test_json_has_the_ids_roles_and_weights_of_the_renderer(told, places, template):
    place = str(places / "tokenizer")
    asked = "--tokenizer", place, "--loss-weights", "assistant=1.5,user=1", "--steps", "none"
    found = json.loads(told("--json", "--template", template, *asked))
    tokenizer = load_tokenizer(place, TEMPLATES[template].extra)
    turns = [Turn("user", "What is\n2 + 2?"), Turn("assistant", "4 é\x1b[2J")]
    (side,) = found["sides"]
    rendered = render(tokenizer, turns, template)
    assert side["ids"] == [*rendered.ids, tokenizer.control["<|document_end|>"]]
    assert parse(tokenizer, side["ids"], template) == turns
    names = ["none", "system", "user", "assistant", "text"]
    assert side["roles"] == [*(names[code] for code in rendered.roles), "none"]
    assert side["weights"] == [{"none": 0, "user": 1, "assistant": 1.5}[role] for role in side["roles"]]
    assert [turn["start"] for turn in side["turns"]] == list(rendered.turns)
    assert found["template"] == template


def test_text_marks_what_is_learned_and_cannot_steer_a_terminal(told, places):
    text = told("--tokenizer", str(places / "tokenizer"), "--steps", "none")
    assert "\x1b" not in text
    assert "conversation, template lumina, tokenizer bpe-270" in text
    assert " tokens, 9 of them learned" in text
    assert "     267 <|user|>" in text
    assert "\n     268 <|assistant|> *52 4 *32 · *195 \\xc3 *169 \\xa9 *27 \\x1b *91 [" in text
    assert "*269 <|turn_end|>  264 <|document_end|>" in text


def test_more_than_one_weight_has_another_mark(told):
    text = told("--loss-weights", "assistant=1.5,user=1", "--template", "chat")
    assert "*87 W" in text
    assert "+52 4" in text


def test_colours_are_for_weights(places, told, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = told("--loss-weights", "assistant=1.5,user=1")
    assert "\x1b[33m52 4\x1b[0m" in text
    assert "\x1b[32m87 W\x1b[0m" in text
    assert "\x1b[90m" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in told("--loss-weights", "assistant=1.5,user=1")


def test_a_tokenizer_is_trained_where_none_is_named(told, capsys):
    assert "tokenizer of bytes, as there is little text" in told()
    cli.run(["data", "show", "synthetic"])
    assert "tokenizer bpe-512 trained on the first records" in capsys.readouterr().out


def test_both_sides_of_a_preference(told):
    found = json.loads(told("--record", "2", "--json"))
    assert [side["side"] for side in found["sides"]] == ["chosen", "rejected"]
    assert found["kind"] == "preference"
    assert "\nrejected: " in told("--record", "2")


def test_a_rejected_record_is_told_with_its_kind(told):
    assert ":3: rejected: role tool\n" in told("--record", "3")
    assert json.loads(told("--record", "3", "--json"))["why"] == "role tool"


def test_a_record_is_shown_as_the_steps_leave_it_and_what_they_did_is_told(told, places):
    place = str(places / "tokenizer")
    found = json.loads(told("--tokenizer", place, "--json"))
    others = "exact not tried: that takes the other documents"
    assert found["steps"] == ["control changed it", others]
    assert "\\x1b" not in found["sides"][0]["pieces"]
    assert "[" in found["sides"][0]["pieces"]
    assert f"\nsteps: control changed it; {others}\n" in told("--tokenizer", place)
    assert json.loads(told("--record", "4", "--steps", "redact,length", "--json"))["steps"] == [
        "redact, length left it as it was"
    ]
    assert "steps" not in told("--steps", "none")


def test_what_is_redacted_is_not_shown(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "ask bob.smith@example.com"}) + "\n" + json.dumps({"text": "?"}))
    cli.run(["data", "show", str(tmp_path / "a.jsonl"), "--steps", "redact", "--redact", "email", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert "".join(found["sides"][0]["pieces"]) == "ask\u00b7[EMAIL]<|document_end|>"
    assert found["steps"] == ["redact changed it"]


def test_a_record_that_a_step_removes_is_told_with_the_step_and_why(told):
    steps = "--steps", "control,length", "--min-characters", "12"
    why = "removed by length: shorter than 12 characters"
    assert told("--record", "4", *steps).endswith(f"chats.jsonl:4: {why}\n")
    found = json.loads(told("--record", "4", *steps, "--json"))
    assert (found["kind"], found["why"], found["steps"]) == ("removed", why, [])
    assert "shorter" not in told("--record", "2", *steps)


def test_all_of_a_text_is_learned(told):
    (side,) = json.loads(told("--record", "4", "--json"))["sides"]
    assert set(side["roles"]) == {"text"}
    assert set(side["weights"]) == {1.0}


def test_standard_input_is_shown(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "one"}\n{"text": "two"}\n')))
    cli.run(["data", "show", "-", "--record", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["name"] == "<stdin>:2"


def test_what_cannot_be_shown_is_refused(told):
    with pytest.raises(UsageError, match=r"--record 5: .*chats.jsonl has 4"):
        told("--record", "5")
    with pytest.raises(UsageError, match="--record 0: the first is 1"):
        told("--record", "0")
    with pytest.raises(ConfigError, match="template 'alpaca'"):
        told("--template", "alpaca")
    with pytest.raises(ConfigError, match="loss_weights = 'tool=1'"):
        told("--loss-weights", "tool=1")


def test_long_records_are_printed_in_part_and_told_so(tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "Why?", "response": "ab " * 2000}), encoding="utf-8")
    tokenizer = train_bpe([], 262)
    tokenizer.save(tmp_path / "bytes")
    cli.run(["data", "show", str(tmp_path / "long.jsonl"), "--tokenizer", str(tmp_path / "bytes")])
    text = capsys.readouterr().out
    assert "  ... 5,009 more tokens; --json has all" in text
    assert max(len(line) for line in text.splitlines()[1:]) <= 128  # the first has the file's name
