"""The lumina command: what it prints, how it refuses, what it does not import."""

import json
import subprocess
import sys

import pytest

from lumina import cli
from lumina.architecture import counts
from lumina.config import load
from lumina.data.commands import ACTIONS
from lumina.errors import UsageError
from lumina.footprint import footprint

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "torch", "tiktoken", "absl", "numpy"}


def lumina(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lumina.cli", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["sample", "--help"],
        ["params", "debug"],
        ["data", "--help"],
        *(["data", action, "--help"] for action in ACTIONS),
    ],
)
def test_help_and_counting_import_nothing_heavy(arguments):
    code = f"""
import sys, lumina.cli
try:
    lumina.cli.run({arguments})
except SystemExit:
    pass
print(sorted(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.strip(" '[]").split(".")[0] for name in done.stderr.split(",")}
    assert not loaded & HEAVY
    assert "'lumina.data.reading" not in done.stderr
    assert done.stdout


def test_params_prints_a_line_for_each_config(capsys):
    cli.run(["params", "debug", "b14:dense"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["config", "debug", "b14:dense"]
    assert "494 K" in lines[1]
    assert len({len(line) for line in lines}) == 1  # columns are aligned


def test_params_json_holds_the_counted_numbers(capsys):
    cli.run(["params", "b7", "--json", "--config.model.num_layers=4"])
    config = load("b7")
    config.model.num_layers = 4
    row = json.loads(capsys.readouterr().out)["b7"]
    assert {name: row[name] for name in counts(config)._fields} == counts(config)._asdict()
    assert row["memory_bytes"] == footprint(config).total == sum(row[f"{part}_bytes"] for part in footprint(config)._fields)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["params", "debgu"], 2, "did you mean debug?"),
        (["params", "debug", "--jsno"], 2, "--jsno: unknown argument"),
        (["params", "debug", "--config.model.num_layer=1"], 3, "did you mean model.num_layers?"),
        (["sample", "nowhere"], 2, "not a run directory"),
        (["sample", "nowhere", "--config.train.steps=1"], 2, "unknown argument"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, code, said):
    done = lumina(*arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("sampel", "sampel: no such command (did you mean sample?); see `lumina --help`"),
        ("runs verfy x", "verfy: no such command (did you mean verify?); see `lumina runs --help`"),
        ("data", "missing: ACTION; see `lumina data --help`"),
        ("data check x --stpes=all", "--stpes=all: unknown argument (did you mean --steps?); see `lumina data check --help`"),
        ("data prepare x --ouy d", "--ouy: unknown argument (did you mean --out?); see `lumina data prepare --help`"),
        (
            "data tokenizer x --kind wordpiece --out y",
            "--kind wordpiece: must be one of bpe, sentencepiece; see `lumina data tokenizer --help`",
        ),
        (
            "explain b14 --platform tppu",
            "--platform tppu: must be one of cpu, gpu, tpu (did you mean tpu?); see `lumina explain --help`",
        ),
        ("sample x --max-tokens few", "--max-tokens: invalid int value: 'few'; see `lumina sample --help`"),
        ("sample x y", "y: unknown argument; see `lumina sample --help`"),
        ("run --log-file a -- b", "--log-file: unknown argument (did you mean --log?); see `lumina run --help`"),
    ],
)
def test_a_refusal_names_the_nearest_name_and_the_help_of_its_own_command(arguments, said):
    with pytest.raises(UsageError) as refused:
        cli.run(arguments.split())
    assert str(refused.value) == said


def test_sampling_values_are_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"top_p = 1\.5: must be above 0 and at most 1"):
        cli.run(["sample", str(tmp_path), "--top-p", "1.5"])
    with pytest.raises(UsageError, match="--samples = 0"):
        cli.run(["sample", str(tmp_path), "--samples", "0"])
    with pytest.raises(UsageError, match="--max-tokens = 0"):
        cli.run(["sample", str(tmp_path), "--max-tokens", "0"])


def test_sampling_a_run_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    done = lumina("sample", str(tmp_path))
    assert done.returncode == 5
    assert "no whole checkpoint" in done.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m lumina.cli params debug b14 | head -0"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_output_that_nobody_reads_is_not_success():
    code = "from lumina.errors import exit_with\ndef main():\n    raise BrokenPipeError\nexit_with(main)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 141
