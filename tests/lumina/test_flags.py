"""The command line of the trainers."""

from pathlib import Path

import pytest

from lumina.errors import ConfigError, UsageError
from lumina.flags import parse


def test_fields_are_set_with_an_equals_sign_or_a_space():
    config, *_ = parse("train", ["--config", "debug", "--config.train.steps=60", "--config.train.batch_size", "8"])
    assert (config.train.steps, config.train.batch_size) == (60, 8)


@pytest.mark.parametrize("steps", [10, 1])
def test_a_run_shorter_than_its_warmup_is_refused_with_the_flag_that_works(steps):
    short = ["--config", "debug", f"--config.train.steps={steps}"]
    with pytest.raises(
        ConfigError, match=rf"warmup_steps = 50: must be below train\.steps = {steps}, as with --config"
    ) as refused:
        parse("train", short)
    assert parse("train", [*short, str(refused.value).split()[-1]])[0].train.steps == steps


@pytest.mark.parametrize(
    ("config", "workdir"),
    [("configs/debug.py", "runs/debug"), ("debug:dense", "runs/debug-dense"), ("configs/b14.py:moe", "runs/b14-moe")],
)
def test_the_run_directory_is_named_after_the_config(config, workdir):
    assert parse("train", ["--config", config])[1] == Path(workdir)


def test_changes_are_accepted_only_when_said():
    assert parse("train", ["--config=debug"])[2] is False
    assert parse("train", ["--config=debug", "--accept-changes"])[2] is True


def test_accepting_changes_takes_no_value_and_moves_no_other_flag():
    arguments = ["--config=debug", "--accept-changes", "--config.train.steps", "70", "--workdir=w"]
    config, workdir, accept = parse("train", arguments)
    assert (config.train.steps, workdir, accept) == (70, Path("w"), True)


def test_the_run_directory_can_be_chosen():
    assert parse("train", ["--config=debug", "--workdir=some/where"])[1] == Path("some/where")


@pytest.mark.parametrize(
    "arguments", [["--config", "debug", "--steps=3"], ["--config", "debug", "stray"], ["--config", "debug", "--conf=1"]]
)
def test_unknown_arguments_are_refused(arguments):
    with pytest.raises(UsageError, match="unknown argument"):
        parse("train", arguments)


def test_a_misspelt_flag_is_refused_with_the_nearest_one_and_where_all_are():
    help_ = "see `python -m lumina_jax.train --help`"
    for arguments, said in (
        (["--config", "debug", "--workdri=x"], "--workdri=x: unknown argument (did you mean --workdir?)"),
        (["--confg", "debug"], "--confg: unknown argument (did you mean --config?)"),
        (["--config.train.steps=3"], "missing: --config"),
    ):
        with pytest.raises(UsageError) as refused:
            parse("lumina_jax.train", arguments)
        assert str(refused.value) == f"{said}; {help_}"
