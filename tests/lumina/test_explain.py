"""`lumina explain`: that it tells of every preset, and that what it tells adds up."""

import json
import math
import re

import pytest

from lumina import cli
from lumina.architecture import layer_kinds, tensor_table
from lumina.config import load, presets
from lumina.errors import ConfigError, UsageError
from lumina.explain import batch_path, columns, explain, text
from lumina.footprint import footprint
from lumina.mesh import AXES, RULES, Sizes

PRESETS = [name for name in presets() if name != "auto"]
KERNELS = [("attention", "chunked", "as asked")]


def told(name, sizes, hosts=1):
    found = explain(load(name), sizes, hosts, KERNELS)
    return {"config": name, "platform": "cpu", "chosen": "", **found}


def numbers(pattern: str) -> list[int]:
    """The layers that a pattern such as 1-7:2 or 0,3 names."""
    if "-" not in pattern:
        return [int(number) for number in pattern.split(",")]
    first, last, step = (int(number) for number in (*pattern.replace(":", "-").split("-"), 1)[:3])
    return list(range(first, last + 1, step))


@pytest.mark.parametrize("name", PRESETS)
def test_the_tensors_told_are_those_of_the_table(name):
    table = {tensor.name: tensor for tensor in tensor_table(load(name).model)}
    names = []
    for each in told(name, Sizes())["tensors"]:
        parts = each["name"].split(".", 2)
        own = [f"blocks.{i}.{parts[2]}" for i in numbers(parts[1])] if parts[0] == "blocks" else [each["name"]]
        assert {table[one].shape for one in own} == {tuple(each["shape"])}
        assert each["bytes"] == sum(4 * table[one].size for one in own)
        names += own
    assert sorted(names) == sorted(table)


@pytest.mark.parametrize("name", PRESETS)
def test_a_devices_tensors_are_its_parts_and_its_parameters(name):
    sizes = Sizes(data=2, fsdp=2, tensor=2 if name != "debug" else 1)  # which has a single key/value head
    config, found = load(name), told(name, sizes)
    parts = {}
    for tensor in tensor_table(config.model):
        split = [axis for over in RULES.layout(tensor) for axis in over if axis in ("fsdp", "tensor")]
        parts[tensor.name] = 4 * tensor.size // math.prod(getattr(sizes, axis) for axis in split)
    assert sum(each["bytes_per_device"] for each in found["tensors"]) == sum(parts.values())
    assert found["memory"]["parameters"] == sum(parts.values())
    assert found["memory"]["total"] == footprint(config, sizes).total


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_told_in_lines_that_fit_a_terminal(name):
    for sizes in (Sizes(), Sizes(data=2, fsdp=2, context=2, tensor=2)):
        lines = text(told(name, sizes)).split("\n")
        assert max(map(len, lines)) <= 120
        heads = [re.match("[A-Z' ]{5,}", line) for line in lines]
        assert [head.group().strip() for head in heads if head] == [
            "LAYERS",
            "TENSORS",
            "KERNELS",
            "THE BATCH'S PATH",
            "MEMORY",
            "COLLECTIVES",
        ]


@pytest.mark.parametrize("name", ["debug", "b14", "small"])
def test_layers_are_told_in_the_order_in_which_they_run(name):
    kinds = layer_kinds(load(name).model)
    for each in told(name, Sizes())["layers"]:
        assert {kinds[i] for i in numbers(each["layers"])} == {each["kind"]}


def test_layers_that_alternate_are_named_by_their_step():
    config = load("debug")
    config.model.num_layers, config.model.moe.pattern = 6, "interleaved"
    found = explain(config, Sizes(), 1, KERNELS)
    names = [each["name"] for each in found["tensors"]]
    assert {"blocks.0-5.attention.query", "blocks.1-5:2.moe.router", "blocks.0-4:2.feedforward.gate"} <= set(names)
    assert [(each["layers"], each["repeats"]) for each in found["layers"]] == [("0-4:2", 3), ("1-5:2", 3)]


def test_what_is_left_whole_is_named_with_the_reason():
    found = told("b14", Sizes(fsdp=2, tensor=2))
    whole = {each["name"]: each["whole"] for each in found["tensors"]}
    assert "one dimension" in whole["final_norm.scale"]
    assert "along tensor" in whole["blocks.0-39.moe.router"]
    assert not whole["blocks.0-39.moe.experts.gate"]
    assert not any(each["whole"] for each in told("b14", Sizes(data=8))["tensors"])


def test_every_axis_that_splits_is_told():
    found = told("b14", Sizes(fsdp=2, expert=4, context=2, tensor=2))
    split = {each["name"]: each["split"] for each in found["tensors"]}
    assert split["blocks.0-39.moe.experts.gate"] == [["expert"], ["fsdp", "context"], ["tensor"]]
    assert split["embedding.weight"] == [["tensor"], ["fsdp", "expert", "context"]]
    assert "  8 x 5120 x 22016  expert, fsdp+context, tensor  " in text(found)


@pytest.mark.parametrize(
    ("hosts", "apart", "together"), [(1, 1, 1), (4, 4, 1), (8, 8, 1), (16, 8, 2)], ids=lambda value: str(value)
)
def test_hosts_read_the_rows_of_their_devices(hosts, apart, together):
    config = load("b14")
    config.train.micro_batches = 16
    path = batch_path(config, Sizes(data=2, fsdp=4, context=2, tensor=4), hosts)  # 64 devices, 8 at a time on a row
    assert path["rows_per_host"] == 1024 // apart
    assert path["hosts_per_row"] == together
    assert (path["rows_per_device"], path["rows_at_once"]) == (1024 // 8, 1024 // 8 // 16)
    assert (path["positions_per_device"], path["residual_positions_per_device"]) == (2048, 512)


def test_a_host_whose_devices_share_a_row_with_its_neighbours_reads_all_that_they_touch():
    config = load("b14")
    config.train.batch_size, config.train.micro_batches = 24, 1
    path = batch_path(config, Sizes(data=6, tensor=4), 4)  # 6 devices a host: one and a half rows' parts
    assert (path["rows_per_host"], path["hosts_per_row"]) == (8, 2)
    path = batch_path(config, Sizes(data=2, tensor=3), 3)
    assert (path["rows_per_host"], path["hosts_per_row"]) == (24, 2)


def test_columns_line_up():
    assert columns([("a", "1"), ("long", "100")], "lr") == "  a       1\n  long  100"


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_tells_the_kernels_of_a_platform(capsys):
    cli.run(["explain", "debug", "--platform", "tpu", "--json", "--devices", "4", "--config.mesh.fsdp=2"])
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2}
    forms = {each["what"]: each["form"] for each in found["kernels"]}
    assert forms == {"attention": "splash", "dropless experts": "ragged"}
    cli.run(["explain", "debug", "--platform", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {each["form"] for each in found["kernels"]} == {"chunked", "blocks"}
    assert found["collectives"] == {"layer": {"moe+mod": []}, "step": []}


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_takes_every_preset_as_it_is(name, capsys):
    cli.run(["explain", name])
    assert capsys.readouterr().out.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--devices", "64", "--hosts", "7"], UsageError, "--hosts = 7: must divide the 64 devices"),
        (["--devices", "63"], ConfigError, "mesh.auto: 63 devices cannot share train.batch_size"),
        (["--devices", "64", "--hosts", "8"], UsageError, "mesh.auto = True: needs the memory"),
    ],
)
def test_what_no_memory_makes_possible_is_refused_before_memory_is_asked_for(arguments, error, said):
    with pytest.raises(error, match=re.escape(said)):
        cli.run(["explain", "b14", *arguments])


def test_with_a_devices_memory_the_command_chooses_a_mesh(capsys):
    cli.run(["explain", "large", "--devices", "8", "--memory", "24"])
    said = capsys.readouterr().out
    assert "8 devices of 24.0 GiB" in said
    assert "passed over: data 8: needs" in said


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["--devices", "0"], UsageError, "--devices = 0: must be above 0"),
        (["--hosts", "3", "--devices", "4"], UsageError, "--hosts = 3: must divide the 4 devices"),
        (["--config.mesh.auto=True", "--devices", "2"], UsageError, "mesh.auto = True: needs the memory"),
        (["--topology", "v5e:2x2", "--devices", "2"], UsageError, "--devices with --topology"),
        (["--devices", "16"], ConfigError, "mesh.data = 16"),
        (["--devices", "2", "--config.mesh.tensor=2"], ConfigError, "kv_heads, which cannot be split into 2"),
        (["--config.model.attention_form=splash", "--platform", "cpu"], ConfigError, "splash runs on tpu, not on cpu"),
    ],
)
def test_what_cannot_be_is_refused(arguments, error, said):
    with pytest.raises(error, match=re.escape(said)):
        cli.run(["explain", "debug", *arguments])
