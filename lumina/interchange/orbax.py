"""What Orbax wrote of a JAX state, read and named without JAX: one step's `state/` directory.

R repeats of a segment, stacked in a leaf.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import Segment, canonical_names, layer_kinds, layer_plan
from lumina.config import ModelConfig

_PARTS = (
    (r"variables\.(?:params|biases)\.(.+)", "weights"),
    (r"optimizer\.\d+\.mu\.(.+)", "first_moment"),
    (r"optimizer\.\d+\.nu\.(.+)", "second_moment"),
)
_SCALARS = ((r"step", "step"), (r"optimizer\.\d+\.count", "updates"), (r"guard\.(losses_W|skipped)", ""))
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # eight bytes count as two words


class Leaf(NamedTuple):
    """Where a leaf of the JAX state belongs."""

    part: str  # weights, first_moment, second_moment, or the name of what is one array for all
    names: list[str]  # canonical; empty for the last
    stacked: bool  # whether there is a leading axis R over `names`


def leaf(plan: list[Segment], name: str) -> Leaf:
    """Of a leaf named as in a manifest, such as `optimizer.1.mu.segments.0.1.moe.router`; raises ValueError for any other."""
    for pattern, part in _PARTS:
        if match := re.fullmatch(pattern, name):
            names = canonical_names(plan, match[1].split("."))
            return Leaf(part, names, match[1].startswith("segments."))
    for pattern, part in _SCALARS:
        if match := re.fullmatch(pattern, name):
            return Leaf(part or match[1], [], False)
    raise ValueError(f"{name}: no such part of a state")


def from_leaves(model: ModelConfig, leaves: dict[str, np.ndarray]) -> dict[str, Any]:
    """The parts of a state: arrays by canonical name in weights, first_moment and second_moment, and what is one array."""
    plan = layer_plan(layer_kinds(model))
    parts: dict[str, Any] = {part: {} for _, part in _PARTS}
    for name, array in leaves.items():
        where = leaf(plan, name)
        if where.names:
            parts[where.part].update(zip(where.names, array if where.stacked else [array], strict=True))
        else:
            parts[where.part] = array
    return parts


def to_leaves(model: ModelConfig, parts: dict[str, Any], names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse: (name, array) of each leaf in `names`; raises KeyError for a tensor that `parts` lacks."""
    plan = layer_plan(layer_kinds(model))
    for name in names:
        where = leaf(plan, name)
        of = parts[where.part]
        if where.names:
            of = np.stack([of[each] for each in where.names]) if where.stacked else of[where.names[0]]
        yield name, np.asarray(of)


def read(directory: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays of a step that Orbax wrote; raises ValueError for one that is not there."""
    import tensorstore

    store = {"driver": "ocdbt", "base": f"file://{(directory / 'state').resolve()}/"}
    opened = {
        name: tensorstore.open({"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}}, open=True, read=True)
        for name in names
    }
    reading = {name: future.result().read() for name, future in opened.items()}
    return {name: np.asarray(future.result()) for name, future in reading.items()}


def digest(array: np.ndarray) -> str:
    """What `lumina_jax.digest` finds for the same bits: 16 hexadecimal digits."""
    flat = np.asarray(array, order="C").reshape(-1)
    words = flat.view(_UNSIGNED[array.dtype.itemsize]).astype(np.uint32)
    mixed = _mix(words ^ np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B9))
    sums = np.array([mixed.sum(dtype=np.uint32), (mixed * mixed).sum(dtype=np.uint32)])
    return sums.astype(">u4").tobytes().hex()


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return x ^ x >> np.uint32(16)
