"""What `data` of a config says of stages and mixtures, and what it may not say."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config import Config, DataConfig, override, validate
from lumina.errors import ConfigError
from lumina.mesh import Sizes, check
from lumina.stages import Stage, first_source, lengths, sources, stages


def config(steps=1000, **data):
    made = Config()
    made.train.steps, made.optim.warmup_steps, made.data.sequence_length = steps, 0, 1024
    for name, value in data.items():
        setattr(made.data, name, value)
    return made


def test_a_config_as_before_is_one_stage_of_its_source():
    assert stages(config()) == [Stage(1000, 1024, (("stdlib", 1),))]


def test_files_without_weights_are_one_source():
    assert sources(config(source="a.txt , b/*.jsonl,")) == ["a.txt,b/*.jsonl"]


def test_weights_make_a_mixture_of_the_smallest_whole_numbers():
    (stage,) = stages(config(source="stdlib@0.75, notes/*.txt@0.25"))
    assert stage.mixture == (("stdlib", 3), ("notes/*.txt", 1))


def test_a_revision_is_no_weight():
    assert sources(config(source="hf:owner/name@1f2e3d:train")) == ["hf:owner/name@1f2e3d:train"]


def test_stages_have_steps_lengths_and_mixtures_and_the_last_takes_the_rest():
    spec = "600: stdlib; 300 x 512: stdlib@3, docstrings@1; x 2: hf:a/b:train"
    assert stages(config(stages=spec)) == [
        Stage(600, 1024, (("stdlib", 1),)),
        Stage(300, 512, (("stdlib", 3), ("docstrings", 1))),
        Stage(100, 2, (("hf:a/b:train", 1),)),
    ]
    assert sources(config(stages=spec)) == ["stdlib", "docstrings", "hf:a/b:train"]
    assert lengths(config(stages=spec)) == [1024, 512, 2]


def test_the_modes_are_stages():
    both = {"source": "a", "finetuning": "b"}
    assert stages(config(mode="base_only", **both)) == [Stage(1000, 1024, (("a", 1),))]
    assert stages(config(mode="finetuning_only", **both)) == [Stage(1000, 1024, (("b", 1),))]
    hybrid = stages(config(mode="hybrid", ratio=0.3, **both))
    assert hybrid == [Stage(700, 1024, (("a", 1),)), Stage(300, 1024, (("b", 1),))]
    (mixed,) = stages(config(mode="interleaved", ratio=0.3, **both))
    assert mixed == Stage(1000, 1024, (("a", 7), ("b", 3)))


def test_a_hybrid_always_has_a_step_of_each():
    for steps, ratio in ((2, 0.99), (2, 0.01), (3, 0.999)):
        assert all(stage.steps >= 1 for stage in stages(config(steps, mode="hybrid", ratio=ratio)))


def test_an_interleaved_mixture_keeps_the_shares_within_its_sides():
    (mixed,) = stages(config(mode="interleaved", ratio=0.5, source="a@3,b@1", finetuning="c@1,a@1"))
    total = sum(weight for _, weight in mixed.mixture)
    assert {source: Fraction(weight, total) for source, weight in mixed.mixture} == {
        "a": Fraction(5, 8),
        "b": Fraction(1, 8),
        "c": Fraction(1, 4),
    }


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_what_is_spelled_is_what_is_read(steps, weights):
    mixture = ", ".join(f"s{n}@{weight}" for n, weight in enumerate(weights))
    found = stages(config(sum(steps), stages="; ".join(f"{count}: {mixture}" for count in steps)))
    assert [stage.steps for stage in found] == steps
    for stage in found:
        total = sum(weight for _, weight in stage.mixture)
        assert [Fraction(weight, total) for _, weight in stage.mixture] == [Fraction(w, sum(weights)) for w in weights]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"stages": "600: a; 300: b"}, "its stages have 900 steps, and train.steps = 1000"),
        ({"stages": "600: a; 500: b"}, "its stages have 1100 steps"),
        ({"stages": "1000: a; b"}, "stage 2: no step is left for it"),
        ({"stages": "0: a; b"}, "stage 1: it has no step"),
        ({"stages": "a; 500: b"}, "stage 1 does not say how many steps it has"),
        ({"stages": "900 y 128: stdlib"}, "stage 1 begins with '900 y 128:'; write STEPS: MIXTURE, or STEPS x LENGTH: MIXTURE"),
        ({"stages": "500: a; 1,000 steps: hf:b"}, "stage 2 begins with '1,000 steps:'; write STEPS: MIXTURE"),
        ({"stages": "x 512: a; 500: b"}, "stage 1 does not say how many steps it has"),
        (
            {"stages": "500 x 2048: a; b"},
            "stage 1 has rows of 2048 tokens, which must be from 2 to data.sequence_length = 1024",
        ),
        ({"stages": "500 x 1: a; b"}, "stage 1 has rows of 1 tokens"),
        ({"stages": "500: a; ,"}, "stage 2 = ' ,': names no source"),
        ({"stages": "500: a; b", "mode": "hybrid"}, "has stages of its own, and data.stages is set"),
        ({"source": ""}, "data.source = '': names no source"),
        ({"source": "a@1,b"}, "'b' has no weight, and others of its mixture do; write such as b@3"),
        ({"source": "a@1,b@0"}, "'b@0' has weight 0"),
        ({"source": "a@1,a@2"}, "names a twice"),
        ({"source": "a@0.333333,b@0.666666,c@0.5"}, "repeat after"),
        ({"mode": "both"}, "data.mode = 'both': must be one of base_only"),
        ({"mode": "interleaved", "ratio": 1.0}, "data.ratio = 1.0: must be between 0 and 1"),
        ({"rows": "pakced"}, "did you mean packed"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_work(data, says):
    with pytest.raises(ConfigError) as refused:
        validate(config(**data))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_hybrid_of_one_step_is_refused():
    with pytest.raises(ConfigError, match=r"'hybrid': has two stages, and train\.steps = 1"):
        stages(config(1, mode="hybrid"))


def test_stages_and_weights_can_be_given_as_flags():
    flags = ["--config.data.stages=10 x 16: a.txt, b.txt; c@3,d@1", "--config.data.loss_weights=assistant=1.5,user=1"]
    made = override(config(20), flags)
    assert stages(made) == [Stage(10, 16, (("a.txt,b.txt", 1),)), Stage(10, 1024, (("c", 3), ("d", 1)))]
    assert made.data.loss_weights == "assistant=1.5,user=1"


def test_every_length_must_divide_over_the_mesh():
    made = config(stages="500 x 510: a; b")
    made.model.num_kv_heads = 4
    check(made, Sizes(tensor=2))
    with pytest.raises(ConfigError, match=r"= 510: must be a multiple of 4 for mesh\.tensor = 4"):
        check(made, Sizes(tensor=4))


@pytest.mark.parametrize(
    ("data", "first"),
    [
        ({"source": "a,b"}, "a,b"),
        ({"source": "a@2,b@1"}, "a"),
        ({"source": "hf:o/n@1.0"}, "hf:o/n@1.0"),
        ({"source": "hf:o/n@1.0,b.txt"}, "hf:o/n@1.0,b.txt"),
        ({"source": "hf:o/n@1.0@2,b@1"}, "hf:o/n@1.0"),
        ({"mode": "finetuning_only", "finetuning": "c"}, "c"),
        ({"stages": "10 x 16: d@3, e@1; f"}, "d"),
        ({"stages": "f;"}, "f"),
    ],
)
def test_the_first_source_is_of_the_first_stage_and_revisions_are_no_weights(data, first):
    made = Config(data=DataConfig(**data))
    assert first_source(made.data) == first == sources(made)[0]


@pytest.mark.parametrize("source", ["2024.txt", "2024 notes.txt,hf:a/b", "hf:a/b:train", "3 kinds/a:b.txt", "x: y"])
def test_a_source_is_not_taken_for_a_stage_that_is_written_wrongly(source):
    (stage,) = stages(config(stages=source))
    assert stage.mixture == ((source, 1),)


def test_a_source_beside_stages_is_refused_and_a_third_is_a_third():
    with pytest.raises(ConfigError, match=r"is not read where data\.stages is set"):
        stages(Config(data=DataConfig(source="a", stages="b")))
    (stage,) = stages(Config(data=DataConfig(source="a", mode="interleaved", finetuning="b", ratio=1 / 3)))
    assert stage.mixture == (("a", 2), ("b", 1))


INIT = "--config.checkpoint.init_from=runs/base"
HYBRID = {"mode": "hybrid", "source": "a", "finetuning": "b"}


@pytest.mark.parametrize(
    ("before", "flags", "reads"),
    [
        ({"stages": "500: a; b"}, ["--config.data.source=c"], [["c"]]),
        ({"stages": "500: a; b"}, ["--config.data.source=stdlib"], [["stdlib"]]),
        ({"stages": "500: a; b"}, ["--config.data.source=c", INIT], [["c"]]),
        ({"stages": "500: a; b"}, ["--config.data.mode=hybrid"], [["stdlib"], ["docstrings"]]),
        ({"stages": "500: a; b"}, ["--config.data.rows=packed", INIT], [["a"], ["b"]]),
        (HYBRID, ["--config.data.source=c"], [["c"], ["b"]]),  # another base of the same mode
        (HYBRID, ["--config.data.source=c", INIT], [["c"]]),
        (HYBRID, ["--config.data.source=c", "--config.data.mode=interleaved", INIT], [["c", "b"]]),
        (HYBRID, ["--config.data.source=c", "--config.data.finetuning=d", INIT], [["c"], ["d"]]),
        (HYBRID, ["--config.data.source=c", "--config.data.mode=base_only", "--config.data.stages="], [["c"]]),
        (HYBRID, ["--config.data.stages=600: c; d"], [["c"], ["d"]]),
        (HYBRID, ["--config.data.stages="], [["a"], ["b"]]),
        (HYBRID, [INIT], [["a"], ["b"]]),
        ({"source": "a"}, ["--config.data.stages=600: c; d@1, e@1"], [["c"], ["d", "e"]]),
    ],
)
def test_a_flag_has_the_last_word_on_what_is_read(before, flags, reads):
    made = config(**before)
    found = stages(override(made, flags))
    assert [[source for source, _ in stage.mixture] for stage in found] == reads
    assert made == config(**before)


@pytest.mark.parametrize(
    "flags",
    [
        ["--config.data.source=c"],
        ["--config.data.source=stdlib"],
        ["--config.data.mode=base_only"],
        ["--config.data.source=c", "--config.data.mode=hybrid"],
        ["--config.data.ratio=0.5"],
    ],
)
def test_flags_that_contradict_each_other_are_refused_with_one_to_leave_out(flags):
    with pytest.raises(ConfigError, match=r"is not read beside --config\.data\.stages; leave out one of the two"):
        override(config(), [*flags, "--config.data.stages=500: a; b"])


@pytest.mark.parametrize(
    ("before", "flags", "message"),
    [
        (
            {"mode": "finetuning_only"},
            ["--config.data.source=c"],
            "data.source: is not read where data.mode = 'finetuning_only'",
        ),
        ({}, ["--config.data.finetuning=c"], "data.finetuning: is not read where data.mode = 'base_only'; .* use data.source"),
        ({}, ["--config.data.ratio=0.5"], "data.ratio: is not read where data.mode = 'base_only'"),
        ({"stages": "500: a; b"}, ["--config.data.finetuning=c"], "data.finetuning: is not read where data.stages is set"),
    ],
)
def test_a_flag_that_would_not_be_read_is_refused(before, flags, message):
    with pytest.raises(ConfigError, match=message):
        override(config(**before), flags)


def test_a_run_that_goes_on_keeps_its_mode():
    begun = override(config(**HYBRID), [INIT, "--config.data.mode=hybrid", "--config.data.source=c"])
    assert override(begun, ["--config.data.source=c"]) == begun
