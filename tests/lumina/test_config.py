"""Configs: what is refused and how it is said, overrides, variants, save and load."""

import dataclasses
import json
import re
import runpy

import pytest

from lumina import config as c
from lumina.errors import ConfigError, UsageError
from lumina.validation import layer_pattern

DEBUG = c.PRESET_DIRECTORY / "debug.py"
PRESETS = [name for name in c.presets() if name != "auto"]


def refused(flags: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        c.override(c.Config(), flags)
    return str(error.value)


def test_every_field_has_a_comment():
    source = (c.PRESET_DIRECTORY.parent / "lumina" / "config.py").read_text(encoding="utf-8")
    bare = re.findall(r"^    (\w+): (?:int|float|str|bool) = [^#\n]*$", source, re.MULTILINE)
    assert set(bare) <= {"beta1", "beta2", "eps"}  # Adam's own


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_documents_its_command(name):
    c.load(name)
    docstring = (c.PRESET_DIRECTORY / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert f"python -m lumina_jax.train --config configs/{name}.py --workdir runs/{name}" in docstring


@pytest.mark.parametrize("name", ["debug", "b7"])
def test_variants_take_out_experts_or_depth(name):
    hybrid = c.load(f"{name}:hybrid")
    patterns = {
        v: (c.load(f"{name}:{v}").model.moe.pattern, c.load(f"{name}:{v}").model.mod.pattern) for v in ("dense", "moe", "mod")
    }
    assert patterns == {"dense": ("none", "none"), "moe": ("all", "none"), "mod": ("none", "all")}
    assert hybrid == c.load(name)
    assert (hybrid.model.moe.pattern, hybrid.model.mod.pattern) == ("all", "all")


def test_a_dense_variant_is_as_wide_as_the_experts_that_a_token_took():
    assert c.load("debug_200m:dense").model.d_ff == 2 * c.load("debug_200m").model.d_ff


def test_a_dense_family_refuses_sparse_variants():
    with pytest.raises(ConfigError, match="dense family"):
        c.load("tiny:moe")


def test_overrides_take_every_type():
    flags = [
        "--config.model.num_layers=4",
        "--config.model.tie_embeddings=false",
        "--config.optim.learning_rate=1",
        "--config.data.source=a.txt,b.txt",
    ]
    config = c.override(c.Config(), flags)
    assert (config.model.num_layers, config.model.tie_embeddings, config.data.source) == (4, False, "a.txt,b.txt")
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.learning_rate, float)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.model.num_layer=4", "did you mean model.num_layers?"),
        ("--config.num_layers=4", "did you mean model.num_layers?"),
        ("--config.modle.num_layers=4", "did you mean model.num_layers?"),
        ("--config.model.num_layers=many", "model.num_layers=many"),
        ("--config.model.tie_embeddings=maybe", "model.tie_embeddings=maybe"),
        ("--config.model=1", "is a group of fields"),
        ("--config.model.num_layers.deep=1", "no such field"),
        ("--config.optim.schedule=cosin", "did you mean cosine?"),
        ("--config.model.num_kv_heads=3", "multiple of model.num_kv_heads = 3"),
        ("--config.model.num_kv_heads=0", "at least 1"),
        ("--config.model.head_dim=63", "even"),
        ("--config.model.moe.top_k=9", "at most model.moe.num_experts = 8"),
        ("--config.model.moe.pattern=sometimes", "all, none, interleaved"),
        ("--config.model.moe.pattern=0,2", "from 0 to 1"),
        ("--config.model.moe.capacity_factor=0", "above 0"),
        ("--config.model.mod.capacity=0", "above 0 and at most 1"),
        ("--config.model.mod.capacity=1.5", "above 0 and at most 1"),
        ("--config.model.dropout=1", "from 0 to below 1"),
        ("--config.model.moe.dispatch=dropfree", "model.moe.dispatch = 'dropfree': must be one of capacity, dropless"),
        ("--config.model.moe.noop_experts=-1", "model.moe.noop_experts = -1: must be at least 0"),
        ("--config.model.moe.num_groups=0", "model.moe.num_groups = 0: must be at least 1"),
        ("--config.model.moe.num_groups=3", "model.moe.num_groups = 3: must divide model.moe.num_experts = 8"),
        ("--config.model.moe.top_groups=0", "model.moe.top_groups = 0: must be at least 1"),
        ("--config.model.moe.top_groups=2", "model.moe.top_groups = 2: must be at most 1, the num_groups"),
        ("--config.model.moe.balance_over=rows", "model.moe.balance_over = 'rows': must be one of row, micro_batch, batch"),
        (
            "--config.model.moe.grouped_form=block",
            "grouped_form = 'block': must be one of auto, blocks, ragged, grouped_mm, loop",
        ),
        ("--config.model.moe.renormalise=perhaps", "model.moe.renormalise=perhaps"),
        ("--config.model.mod.scope=layer", "model.mod.scope = 'layer': must be one of ffn, block"),
        (
            "--config.model.mod.router=randm",
            "model.mod.router = 'randm': must be one of learned, random (did you mean random?)",
        ),
        ("--config.model.mod.start_capacity=0", "model.mod.start_capacity = 0.0: must be above 0 and at most 1"),
        ("--config.model.mod.start_capacity=1.1", "model.mod.start_capacity = 1.1: must be above 0 and at most 1"),
        ("--config.model.mod.anneal_steps=-1", "model.mod.anneal_steps = -1: must be at least 0"),
        ("--config.model.mod.predictor_width=-1", "model.mod.predictor_width = -1: must be at least 0"),
        ("--config.optim.learning_rate=nan", "finite"),
        ("--config.optim.warmup_steps=1000", "below train.steps = 1000"),
        ("--config.train.micro_batches=5", "multiple of train.micro_batches = 5"),
        ("--config.train.seed=-1", "at least 0"),
        ("--config.train.compute_dtype=float8", "float32, bfloat16, float16"),
        ("--config.data.sequence_length=1", "at least 2"),
        ("--config.data.held_out=1", "between 0 and 1"),
        ("--config.data.workers=-1", "data.workers = -1: must be at least 0"),
        ("--config.mesh.data=0", "mesh.data = 0: must be -1 or at least 1"),
        ("--config.mesh.data=-2", "mesh.data = -2: must be -1 or at least 1"),
        ("--config.mesh.data=2.5", "mesh.data=2.5"),
        ("--config.mesh.date=2", "did you mean mesh.data?"),
        ("--config.checkpoint.every=0", "checkpoint.every = 0: must be at least 1"),
        ("--config.checkpoint.keep=1", "checkpoint.keep = 1: must be at least 2"),
        ("--config.checkpoint.keep_every=-1", "checkpoint.keep_every = -1: must be at least 0"),
        ("--config.checkpoint.backup_every=0", "checkpoint.backup_every = 0: must be at least 1"),
        ("--config.checkpoint.backup_keep=0", "checkpoint.backup_keep = 0: must be at least 1"),
        ("--config.checkpoint.backup_encrypt=perhaps", "checkpoint.backup_encrypt=perhaps"),
        ("--config.guard.spike_sigmas=-1", "guard.spike_sigmas = -1.0: must be at least 0"),
        ("--config.guard.spike_sigmas=inf", "guard.spike_sigmas = inf: must be finite"),
        ("--config.guard.spike_window=1", "guard.spike_window = 1: must be at least 2"),
        ("--config.guard.spike_action=rewin", "did you mean rewind?"),
        ("--config.guard.max_skips=0", "guard.max_skips = 0: must be at least 1"),
        ("--config.guard.max_rewinds=-1", "guard.max_rewinds = -1: must be at least 0"),
        ("--config.guard.hang_seconds=-0.5", "guard.hang_seconds = -0.5: must be at least 0"),
        ("--config.guard.hang_seconds=nan", "guard.hang_seconds = nan: must be finite"),
    ],
)
def test_impossible_values_are_refused_by_name(flag, said):
    message = refused([flag])
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "flag",
    [
        "data.workers=0",
        "mesh.data=-1",
        "mesh.data=1",
        "checkpoint.every=1",
        "checkpoint.keep=2",
        "checkpoint.keep_every=0",
        "checkpoint.backup_every=1",
        "checkpoint.backup_keep=1",
        "guard.spike_sigmas=0",
        "guard.spike_window=2",
        "guard.spike_action=rewind",
        "guard.max_skips=1",
        "guard.max_rewinds=0",
        "guard.hang_seconds=0",
    ],
)
def test_the_least_that_is_possible_is_taken(flag):
    name, _, value = flag.partition("=")
    group, field = name.split(".")
    assert str(getattr(getattr(c.override(c.Config(), [f"--config.{flag}"]), group), field)).removesuffix(".0") == value


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["moe.num_groups=4", "moe.top_k=3"], "model.moe.top_k = 3: must be at most 2, the experts in top_groups groups"),
        (["moe.num_groups=2", "moe.noop_experts=1"], "model.moe.noop_experts = 1: must be 0 with num_groups above 1"),
        (
            ["mod.router=random", "mod.predictor_width=4"],
            "model.mod.predictor_width = 4: must be 0 with model.mod.router = random",
        ),
    ],
)
def test_routing_that_does_not_go_together_is_refused_by_name(flags, said):
    message = refused([f"--config.model.{flag}" for flag in flags])
    assert said in message
    assert "\n" not in message


def test_early_stopping_needs_evaluations():
    assert "train.eval_every" in refused(["--config.train.early_stopping=2", "--config.train.eval_every=0"])


def test_an_argument_that_is_no_field_is_refused():
    with pytest.raises(UsageError, match="unknown argument"):
        c.override(c.load("debug"), ["--steps=3"])


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_saved_configs_load_as_they_were(tmp_path, suffix):
    config = c.override(c.load("b14"), ["--config.train.steps=12345", "--config.data.source=x.txt"])
    path = tmp_path / f"config.{suffix}"
    c.save(config, path)
    assert c.load(str(path)) == config


def test_a_run_directory_is_a_config(tmp_path):
    c.save(c.load("debug"), tmp_path / "config.json")
    assert c.load(str(tmp_path)) == c.load("debug")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"model": {"num_layrs": 2}}', "did you mean num_layers?"),
        ('{"model": {"num_layers": "2"}}', "must be of type int"),
        ('{"model": {"num_layers": true}}', "must be of type int"),
        ('{"model": 3}', "must be a mapping"),
        ("[]", "must be a mapping"),
        ("{", "cannot be read as a config"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        c.load(str(path))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_leave_fields_out_keep_the_defaults(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps({"train": {"steps": 7}, "optim": {"warmup_steps": 0}}), encoding="utf-8")
    config = c.load(str(tmp_path / "some.json"))
    assert (config.train.steps, config.model) == (7, c.ModelConfig())


@pytest.mark.parametrize(
    ("spec", "said"), [("debgu", "did you mean debug?"), ("debug:mop", "did you mean mo"), ("no/such.json", "no such config")]
)
def test_names_that_are_nothing_are_refused(spec, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        c.load(spec)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        c.load(str(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("none", []),
        ("interleaved", [1, 3, 5]),
        ("every_3", [2, 5]),
        ("every_1", [0, 1, 2, 3, 4, 5, 6]),
        ("sandwich", [2, 3, 4]),
        ("0, 6", [0, 6]),
    ],
)
def test_patterns_select_layers(pattern, layers):
    assert [i for i, selected in enumerate(layer_pattern(pattern, 7)) if selected] == layers


@pytest.mark.parametrize("pattern", ["every_0", "every_", "7", "-1", "", "1,,2", "1;2"])
def test_patterns_that_mean_nothing_are_refused(pattern):
    with pytest.raises(ConfigError, match=r"model\.moe\.pattern"):
        layer_pattern(pattern, 7, "model.moe.pattern")


def test_ml_collections_applies_flags_to_a_preset_file():
    """The documented way in, without our own parser: config_flags on the dataclass that `get_config` returns."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_dataclass("config", runpy.run_path(str(DEBUG))["get_config"](), flag_values=values)
    values(["train"])
    assert dataclasses.asdict(values["config"].value) == c.to_dict(c.load("debug"))
