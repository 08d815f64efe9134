"""What each launch script would run, from its dry run; and what it refuses."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lumina.flags import parse
from lumina.runs.supervisor import FINAL
from tests.launch.scripts import ROOT, call, dry

GPU = (
    "--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_pipelined_all_gather=true "
    "--xla_gpu_enable_pipelined_reduce_scatter=true --xla_gpu_enable_while_loop_double_buffering=true"
)
TPU = (
    "--xla_enable_async_all_gather=true --xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
JAX = ".venv/bin/python -m lumina_jax.train --config configs/debug.py --workdir runs/debug"
TORCH = "lumina_torch.train --config configs/debug.py --workdir runs/debug-torch --config.torch.deepspeed.zero_stage="
RUN = "--export=ALL --kill-on-bad-exit=0 --wait=0 --label sh -c"
SSH = "gcloud compute tpus tpu-vm ssh"
POD = "gcloud compute tpus queued-resources create"

# (script, variables, words, what it prints)
COMMANDS = [
    (
        "local.sh",
        {},
        [],
        "env JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo .venv/bin/python -m lumina.runs.local --count 2 --platform cpu "
        f"--port 0 -- {JAX}",
    ),
    (
        "local.sh",
        {
            "PROCESSES": "8",
            "PLATFORM": "gpu",
            "PORT": "1234",
            "LOGS": "my logs",
            "CONFIG": "b1",
            "WORKDIR": "runs/b 1",
            "PYTHON": "python3",
        },
        ["--config.train.steps=3", "it's", "", "$(id)"],
        f"env 'XLA_FLAGS={GPU}' python3 -m lumina.runs.local --count 8 --platform gpu --port 1234 --logs 'my logs' -- "
        "python3 -m lumina_jax.train --config b1 --workdir 'runs/b 1' --config.train.steps=3 'it'\\''s' '' '$(id)'",
    ),
    (
        "torchrun.sh",
        {"PROCESSES": "8", "NODES": "2", "NODE": "1", "ADDRESS": "machine-0", "PORT": "1", "STAGE": "3"},
        ["a b"],
        ".venv/bin/python -m torch.distributed.run --nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr machine-0 "
        f"--master-port 1 -m {TORCH}3 'a b'",
    ),
    (
        "deepspeed.sh",
        {"HOSTFILE": "pyproject.toml"},
        ["a b"],
        ".venv/bin/deepspeed --num_gpus 2 --hostfile pyproject.toml --master_port 29500 --module --no_local_rank "
        f"{TORCH}auto 'a b'",
    ),
    (
        "slurm.sh",
        {},
        [],
        f"env 'XLA_FLAGS={GPU}' JAX_COORDINATOR_ADDRESS=127.0.0.1:61440 JAX_NUM_PROCESSES=1 "
        f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 {RUN} 'exec env "
        f'JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7 JAX_PROCESS_ID="$SLURM_PROCID" "$@"\' sh {JAX}',
    ),
    (
        "slurm.sh",
        {
            "SLURM_JOB_NUM_NODES": "4",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURMD_NODENAME": "n7",
            "SLURM_JOB_ID": "4097",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "TASKS": "gpu",
            "XLA_FLAGS": "--mine=1",
        },
        ["a b"],
        f"env 'XLA_FLAGS={GPU} --mine=1' JAX_COORDINATOR_ADDRESS=n7:61441 JAX_NUM_PROCESSES=32 "
        f"srun --nodes=4 --ntasks=32 --ntasks-per-node=8 {RUN} "
        f'\'exec env JAX_LOCAL_DEVICE_IDS="$SLURM_LOCALID" JAX_PROCESS_ID="$SLURM_PROCID" "$@"\' sh {JAX} \'a b\'',
    ),
    (
        "slurm.sh",
        {"BACKEND": "torch", "NODES": "2", "GPUS": "4", "PORT": "99"},
        [],
        "env MASTER_ADDR=127.0.0.1 MASTER_PORT=99 WORLD_SIZE=8 LOCAL_WORLD_SIZE=4 "
        f"srun --nodes=2 --ntasks=8 --ntasks-per-node=4 {RUN} "
        '\'exec env RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" "$@"\' sh '
        ".venv/bin/python -m lumina_torch.train --config configs/debug.py --workdir runs/debug",
    ),
    (
        "tpu_pod.sh",
        {
            "TPU": "mine",
            "ZONE": "us-east1-d",
            "TYPE": "v6e-256",
            "RUNTIME": "v2-alpha-tpuv6e",
            "DIRECTORY": "my lumina",
            "SOURCE": "URL",
        },
        ["it's"],
        "# Once, to have the slice, and when it is there to set up its hosts:\n"
        f"# {POD} mine --node-id mine --zone us-east1-d --accelerator-type v6e-256 --runtime-version v2-alpha-tpuv6e\n"
        f"# {SSH} mine --zone us-east1-d --worker=all --command 'git clone URL '\\''my lumina'\\'' && "
        "cd '\\''my lumina'\\'' && make setup && .venv/bin/python -m pip install -c requirements.lock -e '\\''.[tpu]'\\'''\n"
        f"{SSH} mine --zone us-east1-d --worker=all --command 'cd '\\''my lumina'\\'' && exec env CONFIG=configs/debug.py "
        "WORKDIR=runs/debug PORT=8482 launch/tpu_host.sh '\\''it'\\''\\'\\'''\\''s'\\'''",
    ),
]


@pytest.mark.parametrize(("script", "variables", "words", "printed"), COMMANDS)
def test_a_dry_run_prints_the_command(script, variables, words, printed):
    assert dry(script, *words, **variables) == printed + "\n"


@pytest.mark.parametrize("shell", [name for name in ("dash", "bash") if shutil.which(name)])
@pytest.mark.parametrize(
    "words", [["it's"], ["", "'", "''", "a'"], ["two\nlines", " ", "\t", "*", "$HOME", "`id`", "\\", '"'], ["~", "-n", "é"]]
)
def test_what_is_printed_reads_as_the_same_words_again(words, shell):
    code, printed, _ = call("torchrun.sh", *words, shell=shell, DRY_RUN="1")
    again = ["/bin/sh", "-c", f"printf '%s\\0' {printed}"]
    read = subprocess.run(again, check=True, capture_output=True, text=True).stdout
    assert (code, read.split("\0")[-1 - len(words) : -1]) == (0, words)
    assert shlex.split(printed)[-len(words) :] == words


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh"])
def test_the_trainer_takes_what_a_script_gives_it(script):
    words = shlex.split(dry(script, "--config.train.steps=300"))
    config, workdir, _ = parse("lumina_jax.train", words[words.index("lumina_jax.train") + 1 :])
    assert (config.train.steps, str(workdir)) == (300, "runs/debug")


def commands_of(page):
    """(variables, script, words) of each command of a page that starts a script of launch/ that runs a trainer here."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.split("&&")[-1], comments=True)
        for at, word in enumerate(words):
            if word.startswith("launch/"):
                yield dict(w.split("=", 1) for w in words[:at] if re.match("[A-Z_]+=", w)), word[7:], words[at + 1 :]


@pytest.mark.parametrize(
    ("variables", "script", "words"), [each for page in ("scale.md", "deepspeed.md") for each in commands_of(page)]
)
def test_a_command_of_the_docs_is_one_that_trainers_take(variables, script, words):
    variables = {
        name: "pyproject.toml" if name == "HOSTFILE" else value for name, value in variables.items() if name != "DRY_RUN"
    }
    printed = dry(script, *words, **({"SOURCE": "URL"} | variables))  # a dry run of tpu_pod.sh needs it
    if script == "tpu_pod.sh":
        return  # what it is given goes on to launch/tpu_host.sh, over there
    if script == "kubernetes.sh":
        job = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]
        given = job["template"]["spec"]["containers"][0]["args"]
    else:
        given = shlex.split(printed)
    program = next(word for word in given if re.fullmatch("lumina_(jax|torch).train", word))
    parse(program, given[given.index(program) + 1 :])


@pytest.mark.parametrize(
    ("script", "name", "value", "must"),
    [
        ("local.sh", "PROCESSES", "0", "a number of at least 1"),
        ("local.sh", "PROCESSES", "two", "a number of at least 1"),
        ("local.sh", "PROCESSES", "1 2", "a number of at least 1"),
        ("local.sh", "PROCESSES", "08", "a number of at least 1"),
        ("local.sh", "PORT", "65536", "a number of at least 0, at most 65535"),
        ("local.sh", "PLATFORM", "tpu", "one of: cpu gpu"),
        ("torchrun.sh", "NODE", "1", "a number of at least 0, at most 0"),
        ("torchrun.sh", "STAGE", "4", "one of: auto 0 1 2 3"),
        ("deepspeed.sh", "PORT", "x", "a number of at least 1, at most 65535"),
        ("deepspeed.sh", "HOSTFILE", "none", "a file that can be read"),
        ("slurm.sh", "BACKEND", "tf", "one of: jax torch"),
        ("slurm.sh", "TASKS", "8", "one of: node gpu"),
        ("slurm.sh", "REQUEUES", "-1", "a number of at least 0"),
        ("tpu_pod.sh", "TPU", "--all", "of letters, digits and . _ : / @ -"),
        ("slurm.sh", "TASKS", "", None),
        ("tpu_pod.sh", "ZONE", "a b", "of letters, digits and . _ : / @ -"),
        ("tpu_host.sh", "PORT", "99999", "a number of at least 1, at most 65535"),
        ("kubernetes.sh", "NAME", "Big", "of a to z, 0 to 9 and -, as Kubernetes names are"),
        ("kubernetes.sh", "PLATFORM", "cpu", "one of: tpu gpu"),
        ("kubernetes.sh", "IMAGE", "a: {b}", "of letters, digits and . _ : / @ -"),
        ("kubernetes.sh", "CLAIM", "${HOME}", "of letters, digits and . _ : / @ -"),
        ("kubernetes.sh", "TOPOLOGY", "4xx4", "of numbers joined by x, such as 4x4x4"),
        ("kubernetes.sh", "TOPOLOGY", "x4", "of numbers joined by x, such as 4x4x4"),
        ("kubernetes.sh", "TOPOLOGY", "4x04", "of numbers joined by x, such as 4x4x4"),
        ("kubernetes.sh", "TOPOLOGY", "4x4x2", "of as many chips as HOSTS * CHIPS = 16 * 4 = 64"),
        ("kubernetes.sh", "HOSTS", "15", None),
        ("kubernetes.sh", "LIBTPU_INIT_ARGS", '--a="b"', None),
    ],
)
def test_a_variable_that_cannot_be_is_refused_in_one_line(script, name, value, must):
    if value == "":  # as good as not set
        assert call(script, DRY_RUN="1", **{name: value})[0] == 0
        return
    code, output, errors = call(script, DRY_RUN="1", **{name: value})
    assert (code, output) == (2, "")
    assert errors.startswith("error: TOPOLOGY=4x4x4: must be of" if name == "HOSTS" else f"error: {name}=")
    assert errors.count("\n") == 1
    assert must is None or errors == f"error: {name}={value}: must be {must}\n"


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "launch").glob("*.sh") if "CONFIG=" in path.read_text())
)
def test_a_config_that_there_is_not_is_refused(script, tmp_path):
    code, output, errors = call(script, DRY_RUN="1", SOURCE="URL", CONFIG="b77:moe")
    assert (code, output) == (2, "")
    assert re.fullmatch(r"error: CONFIG=b77:moe: must be a file, a run directory, or one of: auto b1 .* tiny\n", errors)


def test_a_config_is_a_preset_or_a_file_and_one_of_an_image_is_not_looked_for_here(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for config in ("auto", "b7:dense", "configs/b7.py:moe", str(tmp_path), str(tmp_path / "config.json")):
        assert config in dry("local.sh", CONFIG=config)
    assert call("local.sh", DRY_RUN="1", CONFIG="/runs/none.json")[0] == 2
    assert "/runs/none.json" in dry("kubernetes.sh", CONFIG="/runs/none.json")


def test_the_hosts_of_a_slice_need_something_to_clone():
    said = "error: SOURCE=: must be the repository that the hosts clone, as in SOURCE=https://example.com/lumina.git\n"
    assert call("tpu_pod.sh", DRY_RUN="1") == (2, "", said)


def test_a_dry_run_tells_the_variables_so_that_a_misspelt_one_is_not_among_them():
    _, _, errors = call("local.sh", DRY_RUN="1", PROCESES="4", LOGS="my logs")
    assert errors == (
        "# with PROCESSES=2 PLATFORM=cpu PORT=0 'LOGS=my logs' CONFIG=configs/debug.py WORKDIR=runs/debug "
        "PYTHON=.venv/bin/python\n"
    )


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")  # where the dev extra puts it
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not found:
        pytest.skip("no shellcheck: make setup-dev installs it")
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run([found, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(scripts) == 9


# --------------------------------------------------------------------------------------- what other machines would run


@pytest.fixture
def stand_in(tmp_path):
    """A function that puts a program of this text first on PATH: PATH."""

    def put(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return put


SRUN = 'while [ "$1" != --label ]; do shift; done; shift; SLURM_PROCID=5 SLURM_LOCALID=1 "$@"'


@pytest.mark.parametrize(
    ("ended", "restarts", "again"),
    [(75, "0", True), (1, "4", True), (137, "", True), (1, "5", False), (75, "5", False)]
    + [(code, "0", False) for code in sorted(FINAL)],
)
def test_a_job_goes_back_into_the_queue_when_that_can_help(stand_in, tmp_path, ended, restarts, again):
    stand_in("srun", SRUN)
    stand_in("python", f"exit {ended}")
    path = stand_in("scontrol", f'echo "$@" > {tmp_path}/asked')
    job = {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_RESTART_COUNT": restarts}
    code, output, errors = call("slurm.sh", PATH=path, PYTHON=str(tmp_path / "python"), REQUEUES="5", **job)
    assert (code, output, errors) == (ended, "", "")
    assert (tmp_path / "asked").exists() == again
    assert not again or (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "JAX_COORDINATOR_ADDRESS=n0:61517 JAX_LOCAL_DEVICE_IDS=0,1 JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=5"),
        ({"TASKS": "gpu"}, "JAX_COORDINATOR_ADDRESS=n0:61517 JAX_LOCAL_DEVICE_IDS=1 JAX_NUM_PROCESSES=8 JAX_PROCESS_ID=5"),
        ({"BACKEND": "torch"}, "LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=n0 MASTER_PORT=61517 RANK=5 WORLD_SIZE=8"),
    ],
    ids=["a_node", "a_gpu", "torch"],
)
def test_a_task_of_a_job_learns_its_place(stand_in, tmp_path, variables, told):
    path = stand_in("srun", SRUN)
    stand_in("python", "env | grep -E '^(JAX_|MASTER|WORLD|LOCAL|RANK)' | sort | paste -sd ' '; printf '%s|' \"$@\"")
    job = {"SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), "SLURMD_NODENAME": "n0"}
    job |= {"SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "2"} | variables
    code, output, _ = call("slurm.sh", "a b", "$HOME", PATH=path, PYTHON=str(tmp_path / "python"), **job)
    assert (code, output.splitlines()[0]) == (0, told)
    assert output.endswith("|a b|$HOME|")


def test_slurm_is_told_to_warn_in_time_and_to_take_the_job_back():
    lines = (ROOT / "launch" / "slurm.sh").read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    assert {"#SBATCH --signal=USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(head)


def test_outside_a_job_there_is_nothing_to_run():
    assert call("slurm.sh") == (2, "", "error: SLURM_JOB_ID=: must be set, as in a job: sbatch launch/slurm.sh\n")


@pytest.mark.parametrize(
    ("hosts", "number", "told"),
    [
        ("a:b:10.0.0.1", "0", "JAX_COORDINATOR_ADDRESS=10.0.0.1:8482 JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0"),
        (
            "a:b:10.0.0.9,c:d:10.0.0.2,e:f:10.0.0.3",
            "2",
            "JAX_COORDINATOR_ADDRESS=10.0.0.9:8482 JAX_NUM_PROCESSES=3 JAX_PROCESS_ID=2",
        ),
    ],
)
def test_a_host_of_a_slice_asks_who_the_hosts_are(stand_in, hosts, number, told):
    path = stand_in(
        "curl", f'case $* in *-endpoints) echo "{hosts}" ;; *"Metadata-Flavor: Google"*-number) echo {number} ;; esac'
    )
    printed = dry("tpu_host.sh", "a b", PATH=path)
    assert printed == f"env 'LIBTPU_INIT_ARGS={TPU}' {told} .venv/bin/python -m lumina.cli run -- {JAX} 'a b'\n"


def test_a_host_that_gets_no_answer_does_not_train_alone(stand_in):
    code, output, _ = call("tpu_host.sh", PATH=stand_in("curl", "exit 22"), PYTHON="echo")
    assert (code, output) == (22, "")


def test_what_a_slice_is_sent_runs_there_with_the_same_words(stand_in, tmp_path):
    path = stand_in("gcloud", 'while [ "$1" != --command ]; do shift; done; cd "$(dirname "$0")" && sh -c "$2"')
    (tmp_path / "a 'b" / "launch").mkdir(parents=True)
    stand_in("a 'b/launch/tpu_host.sh", 'echo "$CONFIG $WORKDIR $PORT"; printf "%s|" "$@"')
    words = ["it's", "$HOME", "a b"]
    code, output, _ = call("tpu_pod.sh", *words, PATH=path, DIRECTORY="a 'b", CONFIG="my config.json", WORKDIR="/nfs", PORT="9")
    assert (code, output) == (0, "my config.json /nfs 9\nit's|$HOME|a b|")


# ----------------------------------------------------------------------------------------------------------- Kubernetes


def manifest(*words, **variables):
    return yaml.safe_load(dry("kubernetes.sh", *words, **variables))


def test_a_manifest_has_what_was_asked_for_tpu_slices():
    made = manifest(
        '"quoted" \\ $(X) ${NAME}', NAME="big", SLICES="2", HOSTS="16", ACCELERATOR="tpu-v6e-slice", TOPOLOGY="8x8",
        RESTARTS="3", IMAGE="eu.gcr.io/a/b:1", CLAIM="disk", MOUNT="/nfs", CONFIG="b14", LIBTPU_INIT_ARGS="--mine=1",
    )  # fmt: skip
    assert made["metadata"]["name"] == "big"
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in made["metadata"]["annotations"]
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
    (hosts,) = made["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert (hosts["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 16, 16, 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    # 130 and 141 come from a terminal, which a pod has not.
    assert set(rule["onExitCodes"]["values"]) == set(FINAL) - {0, 130, 141}
    pod = job["template"]["spec"]
    (trainer,) = pod["containers"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    assert trainer["image"] == "eu.gcr.io/a/b:1"
    assert trainer["resources"] == {"limits": {"google.com/tpu": 4}}
    assert trainer["volumeMounts"] == [{"name": "runs", "mountPath": "/nfs"}]
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}]
    told = {each["name"]: each.get("value") for each in trainer["env"]}
    assert told == {
        "JOB_INDEX": None,
        "JAX_COORDINATOR_ADDRESS": "big-host-0-0.big:8482",
        "JAX_NUM_PROCESSES": "32",
        "LIBTPU_INIT_ARGS": f"{TPU} --mine=1",
    }
    assert trainer["args"] == [
        *("python", "-m", "lumina_jax.train", "--config", "b14", "--workdir", "/nfs/debug"),
        '"quoted" \\ $$(X) $${NAME}',
    ]


def test_a_manifest_for_gpus_asks_for_gpus_alone():
    text = dry("kubernetes.sh", PLATFORM="gpu", ACCELERATOR="nvidia-h200-141gb", HOSTS="4", CHIPS="8")
    assert "tpu" not in text.replace("end in tpu or gpu", "").replace("TPU slices", "")
    pod = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert {"name": "XLA_FLAGS", "value": GPU} in pod["containers"][0]["env"]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/runs", "/dev/shm"}  # noqa: S108


def test_each_pod_of_each_slice_has_a_number_of_its_own():
    (trainer,) = manifest(HOSTS="3", TOPOLOGY="2x2x3")["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    command = [word.replace("$$", "$") for word in trainer["command"]]  # as Kubernetes does
    numbers = [
        subprocess.run(
            [*command, "sh", "-c", 'echo "$JAX_PROCESS_ID"'],
            env={"PATH": os.environ["PATH"], "JOB_INDEX": str(slice_), "JOB_COMPLETION_INDEX": str(pod)},
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for slice_ in range(2)
        for pod in range(3)
    ]  # fmt: skip
    assert numbers == list("012345")


def test_the_cluster_gets_the_manifest_that_is_printed(stand_in, tmp_path):
    path = stand_in("kubectl", f'echo "$@"; cat > {tmp_path}/applied')
    assert call("kubernetes.sh", "a b", PATH=path) == (0, "apply --filename -\n", "")
    assert (tmp_path / "applied").read_text() == dry("kubernetes.sh", "a b")
