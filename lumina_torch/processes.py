"""The processes that share the work, one a device, as torchrun or DeepSpeed's launcher starts them.

Each takes some rows of every batch. They join when WORLD_SIZE says that there are several.
"""

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lumina.errors import ConfigError, UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # as launchers set them, in the order of a Place


class Place(NamedTuple):
    """Which of the processes this is."""

    number: int = 0
    processes: int = 1  # that there are
    local: int = 0  # its number on this machine: that of its device


def place_of() -> Place:
    """What RANK, WORLD_SIZE and LOCAL_RANK say; raises UsageError where they contradict each other."""
    given = {name: os.environ.get(name, "") for name in VARIABLES}
    if not any(given.values()):
        return Place()
    for name, value in given.items():
        if not value.isdigit():
            raise UsageError(f"{name} = {value!r}: must be a number; start with torchrun or deepspeed, which set it")
    number, count, local = (int(value) for value in given.values())
    if not (0 <= number < count and local <= number):
        raise UsageError(f"RANK = {number}, WORLD_SIZE = {count}, LOCAL_RANK = {local}: contradict each other")
    return Place(number, count, local)


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, on each."""
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def agreed(value: Any, device: torch.device) -> Any:
    """What the first process says, so that all do the same: None, a truth value, or a number from 0."""
    told = torch.tensor(-1 if value is None else int(value), dtype=torch.int64, device=device)
    dist.broadcast(told, 0)
    number = int(told)
    return bool(number) if isinstance(value, bool) else None if number < 0 else number


def in_any(value: bool, device: torch.device) -> bool:
    """Whether it holds in any process."""
    return int(total(torch.tensor(int(value), device=device))) > 0


def require_same(what: str, digest: str, device: torch.device) -> None:
    """Raise a ConfigError, in all processes, unless each has the same: 64 hexadecimal digits."""
    own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    different = [number for number, each in enumerate(found) if not torch.equal(each, found[0])]
    if different:
        raise ConfigError(f"{what}: process {different[0]} has another than process 0; start all with the same")
