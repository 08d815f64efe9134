"""`lumina explain`: what a config makes of a model and of devices, told without training and without any array."""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lumina import mesh
from lumina import topology as topologies
from lumina.architecture import Group, counts, layer_kinds, layer_plan, numbered, tensor_groups
from lumina.config import Config, MeshConfig, load, override
from lumina.errors import UsageError
from lumina.footprint import footprint
from lumina.layout import choose, require_shared, with_mesh
from lumina.mesh import AXES, ROWS, RULES, SEQUENCE, Sizes
from lumina.runs.units import gib, si
from lumina.traffic import FLOAT32, Transfer, gathered_over, layer_transfers, stored, transfers

PLATFORMS = ("cpu", "gpu", "tpu")
Kernels = Callable[[Config, str], list[tuple[str, str, str]]]  # of a config on a platform: what, the form, why


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lumina explain`."""
    parser.add_argument(
        "config", metavar="CONFIG", help="preset, auto, .py, .json or .yaml file, or run directory; NAME:VARIANT"
    )
    parser.add_argument(
        "--topology", metavar="KIND:SHAPE", help=f"devices, their platform and memory at once, such as {topologies.FORMS}"
    )
    parser.add_argument("--devices", type=int, metavar="N", help="in all (default: as many as config.mesh names)")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="that the devices are in, evenly (default: 1)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of a device: choose a mesh and micro-batches that fit, and say why"
    )
    parser.add_argument("--platform", choices=PLATFORMS, help="whose kernels are told (default: the topology's, else tpu)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def tell(arguments: argparse.Namespace, kernels: Kernels) -> None:
    """Print the explanation. Raises UsageError and ConfigError for what cannot be."""
    for flag, value in (("--devices", arguments.devices), ("--hosts", arguments.hosts), ("--memory", arguments.memory)):
        if value is not None and not value > 0:
            raise UsageError(f"{flag} = {value:g}: must be above 0")
    config, why = override(load(arguments.config), arguments.overrides), ""
    named = 1
    for axis in AXES:
        named *= max(1, getattr(config.mesh, axis))
    devices = arguments.devices or named
    platform = arguments.platform or "tpu"
    if arguments.topology:
        for flag in ("devices", "memory", "platform"):
            if getattr(arguments, flag) is not None:
                raise UsageError(f"--{flag} with --topology: a topology has its own; leave one of them out")
        topology = topologies.parse(arguments.topology)
        devices, platform = topology.devices, topology.chip.platform
        config, why = with_mesh(config, topology, topology.chip.device_memory)
    elif arguments.memory is not None:
        topology = topologies.unnamed("devices without a --topology", platform, devices)
        config, why = choose(config, topology, int(arguments.memory * 2**30))
    elif config.mesh.auto and devices > 1 and not mesh.named(config.mesh):
        _require_even(arguments.hosts, devices)
        require_shared(config, devices)
        raise UsageError(
            "mesh.auto = True: needs the memory of a device to choose by; give it, as in --memory 80 or --topology v5p:4x4x4"
        )
    elif config.mesh.auto and not mesh.named(config.mesh):
        why = "mesh.auto: the mesh is chosen for the devices at hand; --topology, or --devices and --memory, tell which"
    sizes = mesh.resolve(config, devices)
    _require_even(arguments.hosts, sizes.devices)
    config = replace(config, mesh=MeshConfig(**sizes._asdict()))
    found = explain(config, sizes, arguments.hosts, kernels(config, platform))
    found = {"config": arguments.config, "platform": platform, "chosen": why, **found}
    print(json.dumps(found, indent=2) if arguments.json else text(found))


def _require_even(hosts: int, devices: int) -> None:
    if devices % hosts:
        raise UsageError(f"--hosts = {hosts}: must divide the {devices} devices of the mesh")


# ----------------------------------------------------------------------------------------------------------- gathering


def explain(config: Config, sizes: Sizes, hosts: int, kernels: list[tuple[str, str, str]]) -> dict[str, Any]:
    """All that is told, as plain values; bytes are of one device unless they say otherwise."""
    model, kinds = config.model, layer_kinds(config.model)
    needed, count = footprint(config, sizes), counts(config)
    return {
        "mesh": sizes._asdict(),
        "devices": sizes.devices,
        "parameters": count.total,
        "mean_active": count.mean_active,
        "layers": [
            {"layers": numbered(segment.layers(place)), "kind": kind, "segment": number, "repeats": segment.repeats}
            for number, segment in enumerate(layer_plan(kinds))
            for place, kind in enumerate(segment.kinds)
        ],
        "tensors": [_tensor(group, sizes) for group in tensor_groups(model)],
        "kernels": [{"what": what, "form": form, "why": why} for what, form, why in kernels],
        "batch": batch_path(config, sizes, hosts),
        "memory": {**needed._asdict(), "total": needed.total},
        "collectives": {
            "layer": {kind: _plain(layer_transfers(config, sizes, kind)) for kind in dict.fromkeys(kinds)},
            "step": _plain(transfers(config, sizes)),
        },
    }


def _tensor(group: Group, sizes: Sizes) -> dict[str, Any]:
    tensor = group.tensor
    split = [[axis for axis in over if getattr(sizes, axis) > 1] for over in RULES.layout(tensor)]
    return {
        "name": group.name,
        "copies": group.copies,
        "shape": list(tensor.shape),
        "axes": list(tensor.axes),
        "split": split,
        "gathered": [axis for axis in gathered_over(tensor) if getattr(sizes, axis) > 1],
        "bytes": FLOAT32 * tensor.size * group.copies,
        "bytes_per_device": FLOAT32 * stored(tensor, sizes) * group.copies,
        "trained": tensor.trained,
        "whole": _whole(group, sizes),
    }


def _whole(group: Group, sizes: Sizes) -> str:
    """Why an axis that splits other weights does not split this tensor; empty where none is left out."""
    used = {axis for over in RULES.layout(group.tensor) for axis in over}
    left = [axis for axis in AXES if axis != "data" and getattr(sizes, axis) > 1 and axis not in used]
    if not left:
        return ""
    if len(group.tensor.shape) < 2:
        return "of one dimension, not worth a gather"
    return f"along {'+'.join(left)}, whose devices route the same tokens and decide alike"


def _plain(found: list[Transfer]) -> list[dict[str, Any]]:
    return [{**each._asdict(), "axes": list(each.axes)} for each in found]


def batch_path(config: Config, sizes: Sizes, hosts: int) -> dict[str, int]:
    """Where the rows of a step go, in numbers."""
    train, T, parts = config.train, config.data.sequence_length, sizes.row_parts
    each, same = sizes.devices // hosts, sizes.along(SEQUENCE)
    # Devices are in the mesh's order; those along `context` and `tensor`, which may span several hosts, have the same rows.
    read = [set(range(host * each // same, ((host + 1) * each - 1) // same + 1)) for host in range(hosts)]
    return {
        "rows": train.batch_size,
        "tokens": train.batch_size * T,
        "sequence_length": T,
        "hosts": hosts,
        "rows_per_host": max(map(len, read)) * train.batch_size // parts,
        "hosts_per_row": max(Counter(part for of_host in read for part in of_host).values()),
        "row_parts": parts,
        "rows_per_device": train.batch_size // parts,
        "micro_batches": train.micro_batches,
        "rows_at_once": train.batch_size // train.micro_batches // parts,
        "positions_per_device": T // sizes.context,
        "residual_positions_per_device": T // sizes.context // sizes.tensor,
    }


# ---------------------------------------------------------------------------------------------------------------- text


def text(found: dict[str, Any]) -> str:
    """The explanation for a terminal of 100 columns and more."""
    parts = [_head(found), _layers(found), _tensors(found), _kernels(found), _batch(found), _memory(found), _collectives(found)]
    return "\n\n".join(parts)


def columns(rows: Sequence[tuple[str, ...]], right: str = "") -> str:
    """Aligned columns, two spaces apart; those whose letter in `right` is `r` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = right.ljust(len(widths), "l")
    return "\n".join(
        "  " + "  ".join(c.rjust(w) if s == "r" else c.ljust(w) for c, w, s in zip(row, widths, sides, strict=True)).rstrip()
        for row in rows
    )


def _mesh(found: dict[str, Any]) -> str:
    return str(Sizes(**found["mesh"]))


def _head(found: dict[str, Any]) -> str:
    line = f"{found['config']}: {si(found['parameters'])} parameters, {si(found['mean_active'])} mean active"
    head = f"{line}, on {found['devices']} device{'s' if found['devices'] > 1 else ''}: {_mesh(found)}"
    return head + "".join(f"\n  {line}" for line in found["chosen"].splitlines())


def _layers(found: dict[str, Any]) -> str:
    rows = [("layers", "kind", "")]
    for each in found["layers"]:
        times = f"compiled once, run {each['repeats']} times" if each["repeats"] > 1 else "compiled and run once"
        rows.append((each["layers"], each["kind"], f"segment {each['segment']}: {times}"))
    return "LAYERS\n" + columns(rows)


def _tensors(found: dict[str, Any]) -> str:
    rows = [("tensor", "shape", "each split over", "on a device", "of")]
    for each in found["tensors"]:
        shape = " x ".join(map(str, each["shape"])) or "one number"
        rows.append((each["name"], shape, _split(each), _bytes(each["bytes_per_device"]), _bytes(each["bytes"])))
    total = [sum(each[key] for each in found["tensors"]) for key in ("bytes_per_device", "bytes")]
    rows.append(("all of them", "", "", _bytes(total[0]), _bytes(total[1])))
    lines = "TENSORS, float32; gradients and AdamW's two moments lie likewise\n" + columns(rows, "lllrr")
    if found["mesh"]["data"] > 1:
        lines += f"\n  Each of the {found['mesh']['data']} parts along data has a copy of them all: that is what data does."
    reasons: dict[str, list[dict[str, Any]]] = {}
    for each in found["tensors"]:
        if each["whole"]:
            reasons.setdefault(each["whole"], []).append(each)
    for why, tensors in reasons.items():
        names = dict.fromkeys(each["name"].split(".", 2 if each["copies"] > 1 else 0)[-1] for each in tensors)
        size = _bytes(sum(each["bytes_per_device"] for each in tensors))
        lines += f"\n  Left whole on purpose, {size}, {why}:\n    {', '.join(names)}"
    return lines


def _split(tensor: dict[str, Any]) -> str:
    """The mesh axes of each dimension; - for whole ones."""
    return ", ".join("+".join(over) or "-" for over in tensor["split"]) if any(tensor["split"]) else "-"


def _kernels(found: dict[str, Any]) -> str:
    rows = [(each["what"], each["form"], each["why"]) for each in found["kernels"]]
    return f"KERNELS on {found['platform']}\n" + columns(rows)


def _batch(found: dict[str, Any]) -> str:
    path, sizes = found["batch"], Sizes(**found["mesh"])
    axes = " x ".join(f"{axis} {getattr(sizes, axis)}" for axis in ROWS if getattr(sizes, axis) > 1) or "one device"
    rows = [
        ("a step", f"{path['rows']:,} rows of {path['sequence_length']:,} tokens: {si(path['tokens'])} tokens"),
        ("hosts", f"{path['hosts']}, each reads {path['rows_per_host']:,} rows")
        if path["hosts_per_row"] == 1
        else ("hosts", f"{path['hosts']}, each {path['hosts_per_row']} of them read the same {path['rows_per_host']:,} rows"),
        ("devices", f"rows are split over {axes}: {path['rows_per_device']:,} rows a device"),
        ("micro-batches", f"{path['micro_batches']:,}, so {path['rows_at_once']:,} of its rows at a time on a device"),
    ]
    if sizes.context > 1 or sizes.tensor > 1:
        held = f"of a row a device computes {path['positions_per_device']:,} positions"
        rows.append(("positions", held + f", and keeps {path['residual_positions_per_device']:,} between blocks"))
    return "THE BATCH'S PATH\n" + columns(rows)


def _memory(found: dict[str, Any]) -> str:
    parts = [f"{part} {_bytes(size)}" for part, size in found["memory"].items() if part != "total"]
    return f"MEMORY, expected on a device: {_bytes(found['memory']['total'])}\n  {', '.join(parts)}"


def _collectives(found: dict[str, Any]) -> str:
    layer, step = found["collectives"]["layer"], found["collectives"]["step"]
    if not step:
        return "COLLECTIVES\n  none: one device"
    lines = "COLLECTIVES: bytes that one device sends; forward and backward together"
    for kind, sent in layer.items():
        lines += f"\n  a layer ({kind}), for one micro-batch\n{_sent(sent)}"
    return f"{lines}\n  a step, all layers and micro-batches\n{_sent(step)}"


def _sent(sent: list[dict[str, Any]]) -> str:
    if not sent:
        return "    nothing"
    rows = [("  " + e["what"], e["kind"], "+".join(e["axes"]), f"{e['count']:,} x", _bytes(e["bytes"])) for e in sent]
    total = ("  in all", "", "", f"{sum(e['count'] for e in sent):,} x", _bytes(sum(e["bytes"] for e in sent)))
    return columns([*rows, total], "lllrr")


def _bytes(count: float) -> str:
    """As `gib`, but small sizes too."""
    if count < 1024:
        return f"{count:.0f} B"
    return f"{count / 1024:.0f} KiB" if count < 1023.5 * 1024 else gib(count)
