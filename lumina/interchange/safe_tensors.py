"""A directory of safetensors files: written in parts of at most a size, read by name, and never outside of the directory."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lumina.errors import CheckpointError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 << 30  # as transformers writes them
FLOATS = ("F32", "F16", "BF16")


def write(directory: Path, sizes: dict[str, int], tensor: Callable[[str], np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors of these sizes in bytes, each made when its turn comes, into one file or into several with an index.

    A tensor larger than `shard_bytes` has a file of its own.
    """
    from safetensors.numpy import save_file

    shards = _shards(sizes, shard_bytes)
    where = {}
    for number, names in enumerate(shards, 1):
        file = FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensor(name) for name in names}, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class SafeTensors:
    """The tensors of a directory that was downloaded or given: model.safetensors, or an index of several files.

    Raises:
        CheckpointError: there are none, only pickles, or a name in the index leads outside of the directory.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        index = directory / INDEX
        if index.is_file():
            self._where = _weight_map(index)
        elif (directory / FILE).is_file():
            self._where = dict.fromkeys(_names(_inside(directory, FILE)), FILE)
        else:
            pickles = sorted(path.name for path in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt*"))
            what = f"only {pickles[0]}, a pickle, which is never loaded" if pickles else f"neither {FILE} nor {INDEX}"
            raise CheckpointError(f"{directory}: has {what}; save the model as safetensors")

    @property
    def files(self) -> list[str]:
        """Names of the files that hold them."""
        return sorted(set(self._where.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def load(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, float32 array) of each name, file by file; bfloat16 and float16 widen exactly."""
        from safetensors import SafetensorError, safe_open

        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._where[name], []).append(name)
        for file, inside in wanted.items():
            path = _inside(self.directory, file)
            try:
                with safe_open(path, "np") as opened:
                    for name in inside:
                        kind = opened.get_slice(name).get_dtype()
                        if kind not in FLOATS:
                            raise CheckpointError(f"{path}: {name} is of type {kind}; {', '.join(FLOATS)} can be imported")
                        if kind == "BF16":
                            yield name, _bfloat16(path, name)
                        else:
                            yield name, opened.get_tensor(name).astype(np.float32)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: cannot be read as safetensors: {_short(error)}") from error


def _bfloat16(path: Path, name: str) -> np.ndarray:
    """A tensor of a file whose header the library has checked, in float32; NumPy has no type for it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))[name]
    begin, end = about["data_offsets"]
    upper = np.fromfile(path, "<u2", count=(end - begin) // 2, offset=8 + size + begin)
    return (upper.astype(np.uint32) << 16).view(np.float32).reshape(about["shape"])


def _weight_map(index: Path) -> dict[str, str]:
    try:
        where: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not where or not all(isinstance(file, str) for file in where.values()):
            raise ValueError("its weight_map is not tensor names to file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index: {_short(error)}") from error
    for file in sorted(set(where.values())):
        names = set(_names(_inside(index.parent, file)))
        if missing := sorted(name for name, at in where.items() if at == file and name not in names):
            raise CheckpointError(f"{index}: {file} has no {missing[0]}, which is said to be there")
    return dict(where)


def _inside(directory: Path, file: str) -> Path:
    """The file of this plain name. Raises CheckpointError for any that leads elsewhere, or is no safetensors file."""
    path = directory / file
    if set(file) & set("/\\\0") or not file.endswith(".safetensors") or file.startswith("."):
        raise CheckpointError(f"{directory}: names {file!r} as a part; a part is a .safetensors file in the directory itself")
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    return path


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {_short(error)}") from error


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
