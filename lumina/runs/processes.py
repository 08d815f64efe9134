"""Which of several JAX processes this one is, as the environment tells, before JAX is imported.

By the first that is there: JAX's own variables, a SLURM step, a TPU pod. In Kubernetes JAX's own may lack the number, which is
then the pod's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lumina.errors import UsageError

OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
NUMBERS = ("SLURM_PROCID", "JOB_COMPLETION_INDEX")  # what may stand in for the last of them
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
SLICES = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "MEGASCALE_COORDINATOR_ADDRESS")
TPU_PORT = 8482  # as in JAX: jax/_src/clusters/cloud_tpu_cluster.py
FIRST_SPECIAL_STEP = 4_294_967_290  # SLURM's steps from here on are shells and scripts, of one process (slurm/slurm.h)


@dataclass(frozen=True)
class Part:
    """A process's place among those of a run."""

    number: int = 0
    count: int = 1
    coordinator: str = ""  # host:port of the first; empty for a process alone
    source: str = ""  # what told
    local_device: int | None = None  # the one device of this machine that is its own; None for all

    def __str__(self) -> str:
        return f"process {self.number} of {self.count}, as {self.source} say; process 0 is at {self.coordinator}"


def part(environment: Mapping[str, str]) -> Part:
    """This process's place; raises UsageError, by name, for settings that lack something or contradict each other."""
    return _own(environment) or _slurm(environment) or _tpu(environment) or Part()


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the process that writes and speaks."""
    return part(environment).number == 0


def _own(environment: Mapping[str, str]) -> Part | None:
    given = [name for name in OWN if environment.get(name)]
    if not given:
        return None
    names = list(OWN)
    if OWN[2] not in given:
        names[2] = next((name for name in NUMBERS if environment.get(name)), OWN[2])
    address, count, number = _all(environment, names, f"{given[0]} is set, so this is one of several processes")
    if not re.fullmatch(r".+:[0-9]+", address):
        raise UsageError(f"{OWN[0]}={address}: must be host:port of the first process")
    return _checked(environment, names[2], number, names[1], count, address, f"{names[1]} and {names[2]}")


def _slurm(environment: Mapping[str, str]) -> Part | None:
    step = environment.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= FIRST_SPECIAL_STEP or environment.get("SLURM_NTASKS") == "1":
        return None
    job, nodes, count, number = _all(environment, SLURM, f"SLURM_STEP_ID={step} is set, so srun started this process")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", count)
    if tasks != count:
        raise UsageError(f"SLURM_NTASKS={count} SLURM_STEP_NUM_TASKS={tasks}: must be the same; start all with one srun")
    port = 65536 - 4096 + _number("SLURM_JOB_ID", job) % 4096  # as in JAX: jax/_src/clusters/slurm_cluster.py
    alone_on_node = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    address, source = f"{first_host(nodes)}:{port}", "SLURM_NTASKS and SLURM_PROCID"
    found = _checked(environment, SLURM[3], number, SLURM[2], count, address, source)
    if alone_on_node:
        return found
    (local,) = _all(environment, ["SLURM_LOCALID"], "several tasks share this node")
    return replace(found, local_device=_number("SLURM_LOCALID", local))


def first_host(nodes: str) -> str:
    """The first of a SLURM list of nodes, such as node[007-009,12],login1."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^\[,]*))?", nodes)
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST={nodes}: cannot be read as a list of nodes")
    return match[1] + (match[2] or "") + (match[3] or "")


def _tpu(environment: Mapping[str, str]) -> Part | None:
    hosts_name = next((name for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES") if environment.get(name)), "")
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    if not hosts_name or "tpu" not in platforms.split(","):
        return None
    hosts = environment[hosts_name].split(",")
    slices = _number(SLICES[0], environment.get(SLICES[0]) or "1")
    if len(hosts) * slices == 1:
        return None
    (own,) = _all(environment, ["TPU_WORKER_ID"], f"{hosts_name} is set, so this is one of several processes")
    number = _number("TPU_WORKER_ID", own)
    if number >= len(hosts):
        raise UsageError(f"TPU_WORKER_ID={own}: must be below {len(hosts)}, the hosts in {hosts_name}")
    first, source = hosts[0], f"{hosts_name} and TPU_WORKER_ID"
    if slices > 1:
        _, place, first = _all(environment, SLICES, f"{SLICES[0]}={slices} is set, so there are several slices")
        if _number(SLICES[1], place) >= slices:
            raise UsageError(f"{SLICES[1]}={place}: must be below {SLICES[0]}={slices}")
        number += _number(SLICES[1], place) * len(hosts)
        source += f" and {SLICES[1]}"
    port = environment.get("JAX_COORDINATOR_PORT") or TPU_PORT
    return Part(number, len(hosts) * slices, f"{first.split(':')[0]}:{port}", source)


def _all(environment: Mapping[str, str], names: list[str] | tuple[str, ...], why: str) -> list[str]:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UsageError(f"{why}: set {', '.join(missing)} as well")
    return [environment[name] for name in names]


def _number(name: str, value: str) -> int:
    if not re.fullmatch("[0-9]+", value):
        raise UsageError(f"{name}={value}: must be a number from 0")
    return int(value)


def _checked(
    environment: Mapping[str, str], number_name: str, number: str, count_name: str, count: str, address: str, source: str
) -> Part:
    made = Part(_number(number_name, number), _number(count_name, count), address, source)
    if made.number >= made.count:
        raise UsageError(f"{number_name}={number}: must be below {count_name}={count}")
    other = environment.get("SLURM_PROCID", "") if environment.get("SLURM_STEP_ID") else ""
    if environment.get("SLURM_NTASKS") == count and other not in ("", number):
        raise UsageError(f"{number_name}={number} SLURM_PROCID={other}: must be the same, or unset one")
    return made
