"""Data sets of Hugging Face: directories as `datasets` saves them, and streams from the Hub. No code of theirs is run."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from lumina.data.extras import need
from lumina.data.reading.streams import shown
from lumina.errors import DataError

PREFIX = "hf:"
_SPLIT = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?=[/_.-]|$)")
_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?::([\w./-]*))?(?::([\w./-]+))?")


# -------------------------------------------------------------------------------------------------------- directories


def local(spec: str) -> tuple[str, str]:
    """(directory, split) of hf:DIR or hf:DIR:SPLIT; directory "" where there is none of that name."""
    named = os.path.expanduser(spec.removeprefix(PREFIX))
    if os.path.isdir(named):
        return named, ""
    directory, _, split = named.rpartition(":")
    return (directory, split) if os.path.isdir(directory) else ("", "")


def files(spec: str) -> tuple[list[str], str]:
    """The .arrow and .parquet files of one split of a directory, in order; and words about which split it is.

    Raises DataError where it has none, several of which none is train, or not the one that is named.
    """
    directory, wanted = local(spec)
    by_split = _saved(directory) or _loose(directory)
    if not by_split:
        raise DataError(f"{shown(spec)}: holds no data set; name what Dataset.save_to_disk wrote, or .parquet or .arrow files")
    splits = ", ".join(sorted(by_split))
    split = wanted or (next(iter(by_split)) if len(by_split) == 1 else "train")
    if split not in by_split:
        example = f"{PREFIX}{directory}:{min(by_split)}"
        raise DataError(
            f"{shown(spec)}: has no split {shown(split)}; it has {shown(splits)}: name one, such as {shown(example)}"
        )
    return by_split[split], f"split {split} of {splits}" if len(by_split) > 1 else ""


def _saved(directory: str) -> dict[str, list[str]]:
    """The files of each split that `save_to_disk` wrote; none where it did not."""
    whole = _json(os.path.join(directory, "dataset_dict.json"))
    splits = [str(name) for name in whole.get("splits", [])]
    parts = {name: os.path.join(directory, _plain(name, directory)) for name in splits} if whole else {"all": directory}
    found = {}
    for split, place in parts.items():
        names = [str(each["filename"]) for each in _json(os.path.join(place, "state.json")).get("_data_files", [])]
        if names:
            found[split] = [os.path.join(place, _plain(name, directory)) for name in names]
    return found


def _loose(directory: str) -> dict[str, list[str]]:
    """The files of each split that their names tell of; where they tell of none, all of them."""
    found: dict[str, list[str]] = {}
    for here, children, names in os.walk(directory):
        children.sort()
        for name in sorted(names):
            if name.endswith((".parquet", ".arrow")):
                path = os.path.join(here, name)
                split = _SPLIT.search(os.path.splitext(os.path.relpath(path, directory))[0])
                found.setdefault(split.group(1) if split else "all", []).append(path)
    return found


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)}: is not JSON; save the data set again") from error
    return value if isinstance(value, dict) else {}


def _plain(name: str, directory: str) -> str:
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise DataError(f"{shown(directory)}: names a file outside of it, {shown(name)}")
    return name


# ---------------------------------------------------------------------------------------------------------- the Hub


class HubDataset(NamedTuple):
    """One split at one commit."""

    name: str
    revision: str
    config: str
    split: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}@{self.revision}:{self.config}:{self.split}"


def parse(spec: str) -> HubDataset:
    """hf:NAME@REVISION[:CONFIG][:SPLIT]; the split is train where none is named. Raises DataError without a revision."""
    match = _HUB.fullmatch(spec.removeprefix(PREFIX))
    if not match:
        raise DataError(f"{shown(spec)}: no such directory, nor a data set's name; name {PREFIX}DIR or {PREFIX}NAME@REVISION")
    name, revision, config, split = (part or "" for part in match.groups())
    if not revision:
        works = f"{PREFIX}{name}@COMMIT, or of a directory {PREFIX}DIR"
        raise DataError(f"{spec}: no such directory, and as a data set of the Hub it needs a revision, as they change: {works}")
    return HubDataset(name, revision, config, split or "train")


def pinned(spec: str) -> tuple[HubDataset, int]:
    """The data set at the commit that its revision is now, and its number of shards. Raises DataError without network."""
    found = parse(spec)
    datasets = need("datasets", f"reading {found.name} from the Hugging Face Hub", "hf")
    hub = need("huggingface_hub", f"reading {found.name} from the Hugging Face Hub", "hf")
    if hub.constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE:
        raise _unreachable(found, "HF_HUB_OFFLINE is set")
    try:
        commit = hub.HfApi().dataset_info(found.name, revision=found.revision).sha
        found = found._replace(revision=commit)
        return found, stream(found).num_shards
    except Exception as error:  # of the network, the Hub, or the data set: many libraries' errors, none of them ours
        raise _unreachable(found, str(error)) from error


def stream(dataset: HubDataset) -> Any:
    """An iterable of records, which downloads as it is read."""
    datasets = need("datasets", f"reading {dataset.name} from the Hugging Face Hub", "hf")
    return datasets.load_dataset(
        dataset.name, dataset.config or None, split=dataset.split, revision=dataset.revision, streaming=True
    )


def rows(dataset: HubDataset, shard: int, shards: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, record) of one shard of them. Raises DataError where the network fails, so that the unit is read again."""
    try:
        yield from named_rows(stream(dataset), str(dataset), shard, shards)
    except Exception as error:
        raise _unreachable(dataset, str(error)) from error


def named_rows(stream: Any, name: str, shard: int, shards: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, record in enumerate(stream.shard(num_shards=shards, index=shard)):
        yield f"{name}[{shard}][{place}]", record


def _unreachable(dataset: HubDataset, why: str) -> DataError:
    works = f"where there is network, Dataset.save_to_disk writes a directory to name here as {PREFIX}DIR"
    return DataError(f"{dataset}: cannot be read from the Hub: {shown(why.splitlines()[0] if why else 'no answer')}; {works}")
