"""What Orbax wrote of a JAX state, read and named without JAX: one step's `state/`, and `state.1/` ... of further processes.

R repeats of a segment, stacked in a leaf.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import Segment, canonical_names, layer_kinds, layer_plan
from lumina.config import ModelConfig
from lumina.errors import CheckpointError

_PARTS = (
    (r"variables\.(?:params|biases)\.(.+)", "weights"),
    (r"optimizer\.\d+\.mu\.(.+)", "first_moment"),
    (r"optimizer\.\d+\.nu\.(.+)", "second_moment"),
)
_SCALARS = ((r"step", "step"), (r"optimizer\.\d+\.count", "updates"), (r"guard\.(losses_W|skipped)", ""))
_CACHE_BYTES = 2**26  # of what leaves share: indices, not values
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


class Piece(NamedTuple):
    """A box of a leaf, as one process wrote it."""

    process: int
    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def record(self) -> list[Any]:
        """As in a manifest."""
        return [self.process, list(self.begin), list(self.shape)]


def directory_of(process: int) -> str:
    """Where a process writes, in a step's directory."""
    return f"state.{process}" if process else "state"


def key_of(name: str, piece: int) -> str:
    """Under which the piece of that place in a leaf's list is kept."""
    return f"{name}@{piece}"


class Reader:
    """The leaves of one step, of which parts can be read. A leaf is whole with process 0, or in the pieces of its record."""

    def __init__(self, directory: Path, leaves: Mapping[str, dict[str, Any]]):
        """`leaves` as in the manifest; raises CheckpointError, naming the leaf, where pieces do not make one up."""
        import tensorstore

        self._directory, self._context = directory, tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._pieces: dict[str, list[tuple[Piece, str]]] = {}
        for name, record in leaves.items():
            shape = tuple(record["shape"])
            pieces = [Piece(process, tuple(begin), tuple(size)) for process, begin, size in record.get("pieces", [])]
            if wrong := _uncovered(shape, pieces):
                raise CheckpointError(f"{directory}: {name}: {wrong}")
            keyed = [(piece, key_of(name, number)) for number, piece in enumerate(pieces)]
            self._pieces[name] = keyed or [(Piece(0, (0,) * len(shape), shape), name)]

    def begin(self, name: str, begin: Sequence[int], shape: Sequence[int]) -> Callable[[], np.ndarray]:
        """Begin to read a box of a leaf, of the pieces that it meets alone; what returns waits for it.

        Raises CheckpointError for a piece that is not there, ValueError where storage fails.
        """
        reading = []
        for piece, key in self._pieces[name]:
            low = [max(a, b) for a, b in zip(begin, piece.begin, strict=True)]
            high = [min(a + m, b + n) for a, m, b, n in zip(begin, shape, piece.begin, piece.shape, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                there, here = (
                    tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
                    for origin in (piece.begin, begin)
                )
                stored = self._open(piece, key)
                reading.append((here, stored, stored[there].read()))

        def wait() -> np.ndarray:
            if len(reading) == 1:  # scalars among them
                return np.asarray(reading[0][2].result()).reshape(tuple(shape))
            whole = np.empty(tuple(shape), reading[0][1].dtype.numpy_dtype)
            for here, _, part in reading:
                whole[here] = part.result()
            return whole

        return wait

    def _open(self, piece: Piece, key: str) -> Any:
        import tensorstore

        spec = {"driver": "zarr", "kvstore": _store(self._directory, piece.process, key)}
        try:
            opened = tensorstore.open(spec, open=True, read=True, context=self._context).result()
        except ValueError as error:
            if "NOT_FOUND" not in str(error):
                raise
            raise CheckpointError(f"{self._directory}: {directory_of(piece.process)} has no {key}") from error
        if tuple(opened.shape) != piece.shape:
            raise CheckpointError(f"{self._directory}: {key} is {tuple(opened.shape)}, the manifest says {piece.shape}")
        return opened


def _uncovered(shape: tuple[int, ...], pieces: list[Piece]) -> str:
    """What is wrong with pieces of an array, if not each element is in one; none at all stands for a whole leaf."""
    if not pieces:
        return ""
    edges = [
        sorted({0, length, *(p.begin[axis] for p in pieces), *(p.begin[axis] + p.shape[axis] for p in pieces)})
        for axis, length in enumerate(shape)
    ]
    counts = np.zeros([len(each) - 1 for each in edges], np.int32)  # by cell between edges: how many pieces have it
    for piece in pieces:
        ends = [begin + size for begin, size in zip(piece.begin, piece.shape, strict=True)]
        if any(begin < 0 or end > length for begin, end, length in zip(piece.begin, ends, shape, strict=True)):
            return f"a piece of {piece.shape} at {piece.begin} lies outside {shape}"
        cells = (slice(each.index(a), each.index(b)) for each, a, b in zip(edges, piece.begin, ends, strict=True))
        counts[tuple(cells)] += 1
    if (counts < 1).any():
        return f"its {len(pieces)} pieces do not cover {shape}"
    return f"its {len(pieces)} pieces overlap in {shape}" if (counts > 1).any() else ""


def read(directory: Path, leaves: Mapping[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """The leaves of a step as its manifest has them.

    Raises CheckpointError for one that is not there, ValueError where storage fails.
    """
    reader = Reader(directory, leaves)
    reading = {name: reader.begin(name, (0,) * len(record["shape"]), record["shape"]) for name, record in leaves.items()}
    return {name: wait() for name, wait in reading.items()}


def write(directory: Path, process: int, named: dict[str, np.ndarray]) -> None:
    """Write arrays as Orbax does, which writes those of the first process alone; raises ValueError where the disk fails."""
    import tensorstore

    context = tensorstore.Context()
    writing = []
    for key, array in named.items():
        spec = {"driver": "zarr", "kvstore": _store(directory, process, key), "metadata": {"compressor": None}}
        chunks = tensorstore.ChunkLayout(chunk_shape=array.shape)
        dtype = tensorstore.dtype(array.dtype)
        opened = tensorstore.open(
            spec, create=True, delete_existing=True, context=context, dtype=dtype, shape=array.shape, chunk_layout=chunks
        )
        writing.append((opened, array))
    # All at once: what is written at the same time shares files and one commit.
    for future in [opened.result().write(array, can_reference_source_data_indefinitely=True) for opened, array in writing]:
        future.result()


def _store(directory: Path, process: int, key: str) -> dict[str, Any]:
    """Where a process keeps an array."""
    return {"driver": "ocdbt", "base": f"file://{(directory / directory_of(process)).resolve()}/", "path": f"{key}/"}


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
