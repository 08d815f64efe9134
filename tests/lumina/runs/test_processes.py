"""Which process this is, in the environments that launchers make, and those that cannot be right."""

import pytest

from lumina.errors import UsageError
from lumina.runs.processes import Part, first_host, is_first, part

OWN = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
POD = {"TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2,t-3", "TPU_WORKER_ID": "1"}
SLICE = POD | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "s-0:8080"}
BY_SLURM, BY_POD = "SLURM_NTASKS and SLURM_PROCID", "TPU_WORKER_HOSTNAMES and TPU_WORKER_ID"


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Part()),
        (dict.fromkeys(OWN, ""), Part()),
        (OWN, Part(2, 4, "node1:1234", "JAX_NUM_PROCESSES and JAX_PROCESS_ID")),
        (OWN | STEP | {"SLURM_PROCID": "2"}, Part(2, 4, "node1:1234", "JAX_NUM_PROCESSES and JAX_PROCESS_ID")),
        (
            OWN | {"JAX_PROCESS_ID": "", "JOB_COMPLETION_INDEX": "3"},
            Part(3, 4, "node1:1234", "JAX_NUM_PROCESSES and JOB_COMPLETION_INDEX"),
        ),
        ({"JOB_COMPLETION_INDEX": "3"}, Part()),  # an indexed Job of runs that know nothing of each other
        (STEP, Part(3, 4, "gpu007:61441", BY_SLURM)),
        (
            STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"},
            Part(3, 4, "gpu007:61441", BY_SLURM, local_device=1),
        ),
        ({name: value for name, value in STEP.items() if "STEP" not in name}, Part()),  # a batch script without srun
        (STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, Part()),  # the shell of salloc
        (STEP | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Part()),
        (POD, Part(1, 4, "t-0:8482", BY_POD)),
        (POD | {"JAX_COORDINATOR_PORT": "99"}, Part(1, 4, "t-0:99", BY_POD)),
        (SLICE, Part(9, 12, "s-0:8482", f"{BY_POD} and MEGASCALE_SLICE_ID")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, Part()),
        (POD | {"JAX_PLATFORMS": "cpu"}, Part()),
    ],
)
def test_the_environment_tells_which_process_this_is(environment, found):
    assert part(environment) == found
    assert is_first(environment) == (found.number == 0)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_COORDINATOR_ADDRESS is set, .* set JAX_NUM_PROCESSES, JAX_PROCESS_ID as",
        ),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is set, .* set JAX_COORDINATOR_ADDRESS as well"),
        (OWN | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: must be a number"),
        (OWN | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1: must be a number from 0"),
        (OWN | {"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4: must be below JAX_NUM_PROCESSES=4"),
        (OWN | {"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1: must be host:port"),
        (OWN | STEP, "JAX_PROCESS_ID=2 SLURM_PROCID=3: must be the same"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4: must be below SLURM_NTASKS=4"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_ID=0 is set, .* set SLURM_STEP_NODELIST as well"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=2: must be the same"),
        (POD | {"TPU_WORKER_ID": ""}, "TPU_WORKER_HOSTNAMES is set, .* set TPU_WORKER_ID as well"),
        (POD | {"TPU_WORKER_ID": "4"}, "TPU_WORKER_ID=4: must be below 4, the hosts in TPU_WORKER_HOSTNAMES"),
        (SLICE | {"MEGASCALE_SLICE_ID": "3"}, "MEGASCALE_SLICE_ID=3: must be below MEGASCALE_NUM_SLICES=3"),
        (SLICE | {"MEGASCALE_COORDINATOR_ADDRESS": ""}, "MEGASCALE_NUM_SLICES=3 .* set MEGASCALE_COORDINATOR_ADDRESS as well"),
    ],
)
def test_settings_that_cannot_be_right_are_refused_by_name(environment, says):
    with pytest.raises(UsageError, match=says):
        part(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node001", "node001"), ("node001,host2", "node001"), ("n[1-3],m", "n1"), ("a-b[07,9]", "a-b07"), ("r[1-2]-x", "r1-x")],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first
