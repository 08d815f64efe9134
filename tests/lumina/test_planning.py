"""`lumina plan` without a compiler: what it tells, refuses and chooses; and what it says of a compiler's findings."""

import json

import pytest

from lumina import cli, planning
from lumina.config import load, override
from lumina.errors import ConfigError, UsageError
from lumina.footprint import footprint
from lumina.layout import with_mesh
from lumina.mesh import Sizes, resolve
from lumina.planning import memory_of, plan, times
from lumina.roofline import Bounds, model_flops
from lumina.topology import parse

SPLIT = ["--config.mesh.data=1", "--config.mesh.fsdp=64", "--config.train.micro_batches=4"]


def test_a_plan_as_json_has_every_figure_with_its_source(capsys):
    cli.run(["plan", "b14", "--topology", "v5p:4x4x4", "--analytic", "--json", *SPLIT])
    found = json.loads(capsys.readouterr().out)
    estimate = footprint(override(load("b14"), SPLIT), Sizes(fsdp=64))
    assert found["memory"]["estimate"] == {**estimate._asdict(), "total": estimate.total}
    assert found["memory"]["fits"] is True
    assert found["mesh"] == Sizes(fsdp=64)._asdict()
    assert found["constants"]["source"].startswith("https://cloud.google.com/tpu/docs/v5p")
    assert {each["kind"] for each in found["collectives"]} == {"all_gather", "reduce_scatter", "all_reduce"}


def test_the_table_says_whether_it_fits_and_what_binds(capsys):
    cli.run(["plan", "b14", "--topology", "v5p:4x4x4", "--analytic", *SPLIT])
    page = capsys.readouterr().out
    assert "compiled: nothing: our own estimates alone" in page
    assert "\nfits: " in page
    assert "(compute binds)" in page
    cli.run(["plan", "b14", "--topology", "v5e:8x8", "--analytic", *SPLIT])
    assert "does not fit: " in capsys.readouterr().out


def test_a_mesh_is_chosen_where_none_is_named_and_says_why():
    topology = parse("v6e:4x4")
    chosen, why = with_mesh(load("b1"), topology, topology.chip.device_memory)
    assert "chosen, of those that fit the fastest: " in why
    assert plan(chosen, topology, analytic=True)["devices"] == 16
    named = override(load("b1"), ["--config.mesh.fsdp=16"])
    assert with_mesh(named, topology, topology.chip.device_memory) == (named, "")


def test_plan_explain_and_search_take_the_same_mesh(capsys):
    def told(*arguments):
        cli.run([*arguments, "--json"])
        return json.loads(capsys.readouterr().out)

    topology = ["--topology", "v6e:4x4"]
    planned = told("plan", "b1", *topology, "--analytic")
    explained = told("explain", "b1", *topology)
    assert explained["mesh"] == planned["mesh"]
    assert explained["chosen"] == planned["chosen"] != ""
    assert (explained["platform"], explained["batch"]["micro_batches"]) == ("tpu", planned["micro_batches"])
    searched = told("plan", "b1", *topology, "--analytic", "--search")["plans"]
    assert [each["roofline"]["expected"] for each in searched] == sorted(each["roofline"]["expected"] for each in searched)
    assert searched[0]["roofline"]["expected"] <= planned["roofline"]["expected"]


def test_the_budget_of_tokens_is_the_configs_own_or_as_given():
    config = override(load("b14"), SPLIT)
    topology = parse("v5p:4x4x4")
    own, given = (plan(config, topology, tokens, analytic=True)["roofline"] for tokens in (None, 1e9))
    tokens = config.train.batch_size * config.data.sequence_length
    assert own["token_budget"] == config.train.steps * tokens
    assert given["at_best"]["days"] == pytest.approx(1e9 / tokens * given["at_best"]["seconds"] / 86_400)
    assert given["at_best"]["chip_hours"] == pytest.approx(given["at_best"]["days"] * 24 * 64)


def test_mfu_is_the_models_own_work_over_what_the_chips_could_do():
    config, topology = override(load("b14"), SPLIT), parse("v5p:4x4x4")
    found = times(config, Bounds(compute=20.0, memory=2.0, links=6.0, network=0.0), topology, budget=1e9)
    assert found["at_best"]["mfu"] == pytest.approx(model_flops(config) / (20.0 * 64 * 459e12))
    assert found["in_turn"]["mfu"] == pytest.approx(model_flops(config) / (28.0 * 64 * 459e12))
    assert found["binding"] == "compute"


def test_what_the_compiler_refuses_does_not_fit_by_as_much_as_it_says():
    topology, estimate = parse("v5e:2x2"), footprint(load("debug"))
    refused = {"needed_bytes": 20 * 2**30, "available_bytes": 15 * 2**30, "over_bytes": 5 * 2**30}
    found = memory_of(topology, estimate, {"state": {"parameters": 1, "optimizer": 2}, "refused": refused})
    assert (found["fits"], found["needed"] - found["available"]) == (False, 5 * 2**30)
    fitting = memory_of(topology, estimate, {"state": {}, "memory": {"total": 2**30}})
    assert (fitting["fits"], fitting["needed"], fitting["available"]) == (True, 2**30, 16 * 2**30)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lumina\[tpu\]'; or add --analytic") as refused:
        cli.run(["plan", "debug", "--topology", "v5e:2x2"])
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5p:8x8"], "a torus of 3 dimensions"),
        (["--topology", "v5e:2x2", "--tokens", "0"], "--tokens = 0: must be above 0"),
        (["--topology", "v5e:2x2", "--search", "0"], "--search = 0: must be above 0"),
        (["--topology", "cpu:8", "--search"], "--search needs the memory of a device"),
        (["--topology", "v5e:2x2", "--nosuch"], "--nosuch: unknown argument"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(UsageError) as refused:
        cli.run(["plan", "debug", *arguments])
    assert said in str(refused.value)


def test_a_processor_compiles_in_place_of_a_gpu_only_what_it_can():
    assert planning.too_large(load("b14"), parse("gpu:h200x256"))
    assert planning.too_large(load("b300"), parse("gpu:h200x8"))
    assert not planning.too_large(load("b14"), parse("gpu:h200x64"))
    assert not planning.too_large(load("b300"), parse("v5p:16x16x16"))


def test_a_search_counts_and_tells_only_what_fits():
    topology = parse("v6e:4x4")
    limit = 0.9 * topology.chip.device_memory
    found = planning.searched(load("b1"), topology, None, 0)
    assert found["tried"] > 20
    assert all(each["memory"]["estimate"]["total"] <= limit for each in found["plans"])
    for each in found["plans"]:
        split = override(load("b1"), [f"--config.mesh.{axis}={size}" for axis, size in each["mesh"].items()])
        split.train.micro_batches, split.train.remat = each["micro_batches"], each["remat"]
        assert footprint(split, resolve(split, 16)).total == each["memory"]["needed"]


def test_a_search_that_finds_nothing_says_so():
    with pytest.raises(ConfigError, match=r"no mesh, remat policy and micro-batches fit; use more devices"):
        cli.run(["plan", "b300", "--topology", "v5e:2x2", "--search", "--analytic"])
