"""Options of steps: refused at once where their step is not taken or their value is none, recorded where they decide."""

import argparse
import json
from dataclasses import fields

import pytest

from lumina import cli
from lumina.data.recipe import STEPS, Recipe, add_recipe, recipe_of
from lumina.errors import UsageError


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_recipe(parser)
    return recipe_of(parser.parse_args(flags))


VALUES = {"languages": "en", "redact": "email", "against": "x.txt"}
OF_STEPS = [(spec.name, spec.metadata["step"]) for spec in fields(Recipe) if spec.metadata["step"]]


@pytest.mark.parametrize(("name", "step"), OF_STEPS)
def test_an_option_of_a_step_that_is_not_taken_is_refused_with_the_steps_that_take_it(name, step):
    default = next(spec.default for spec in fields(Recipe) if spec.name == name)
    flags = f"--{name.replace('_', '-')}", str(VALUES.get(name, default))  # also when it is the default
    works = ",".join(each for each in STEPS if each in ("control", step, "exact"))
    with pytest.raises(UsageError, match=f"^{flags[0]} {flags[1]}: needs the step {step}; use --steps {works}$"):
        parsed(*flags)
    more = [] if name == "against" or step != "decontaminate" else ["--against", "x.txt"]
    assert getattr(parsed(*flags, "--steps", works, *more), name) == (VALUES.get(name) or default)


def test_every_option_that_says_its_step_in_its_help_has_it():
    assert {step for _, step in OF_STEPS} == {"redact", "length", "language", "decontaminate", "near"}
    assert len(OF_STEPS) == len(fields(Recipe)) - 5  # format, text_field, max_record_mb, max_conversations and steps


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "controll"], "'controll' is no step"),
        (["--steps", "redact", "--redact", "emial"], "--redact: 'emial' is not known"),
        (["--steps", "language", "--languages", "english"], "--languages: 'english' is not known"),
        (["--steps", "length", "--min-characters", "9", "--max-characters", "8"], "no text is between"),
        (["--steps", "decontaminate"], "--against: --steps decontaminate compares with"),
        (["--steps", "decontaminate", "--against", "x.txt", "--against-ngram", "2"], "at least 5"),
        (["--steps", "near", "--near-threshold", "2"], "--near-threshold 2.0: must be above 0"),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "check", "tokenizer", "show"])
def test_a_value_that_is_none_is_refused_before_anything_is_read_or_made(tmp_path, command, flags, says):
    made = ["--out", str(tmp_path / "out")] if command in ("prepare", "tokenizer") else []
    with pytest.raises(UsageError, match=says):
        cli.run(["data", command, str(tmp_path / "nothing is here"), *made, *flags])
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_has_the_options_of_the_steps_that_were_taken_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} of them"}) + "\n" for i in range(40)))
    asked = ["--vocab-size", "262", "--held-out", "0.2", "--workers", "0", "--steps", "redact,exact", "--redact", "email"]
    cli.run(["data", "prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), *asked])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["redact"] == "email"
    assert manifest["order"]["recipe"] == manifest["recipe"]
    gone = [name for name, step in OF_STEPS if step != "redact"]
    assert not manifest["recipe"].keys() & set(gone)
    assert manifest["recipe"].keys() == {spec.name for spec in fields(Recipe)} - set(gone)
