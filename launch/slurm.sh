#!/bin/sh
#SBATCH --job-name=lumina
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Train on a SLURM cluster: sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh [more flags for the trainer]
# Five minutes before the time limit all trainers get SIGUSR1: they save and exit with 75, and the job goes back into the queue to
# go on, as it does after a crash. DRY_RUN=1 prints the command, in a job or outside one.
set -eu

BACKEND=${BACKEND:-jax}                  # jax, or torch: DeepSpeed
NODES=${SLURM_JOB_NUM_NODES:-${NODES:-1}} # from sbatch --nodes
GPUS=${SLURM_GPUS_ON_NODE:-${GPUS:-8}}   # on each node, from sbatch --gpus-per-node
TASKS=${TASKS:-node}                     # jax: one process a node, or one a gpu; torch always has one a GPU
ADDRESS=${SLURMD_NODENAME:-127.0.0.1}    # of the first node, where this script runs
PORT=${PORT:-$((61440 + ${SLURM_JOB_ID:-0} % 4096))} # free there, so other than that of another job
REQUEUES=${REQUEUES:-100}                # at most, after time limits and crashes
CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug}           # which all nodes see
PYTHON=${PYTHON:-.venv/bin/python}

here=${SLURM_SUBMIT_DIR:-$(dirname -- "$0")/..}/launch # SLURM runs a copy of this script, from elsewhere
# shellcheck source=launch/common.sh
. "$here/common.sh"
config "$CONFIG"
choice BACKEND "$BACKEND" jax torch
choice TASKS "$TASKS" node gpu
number NODES "$NODES" 1
number GPUS "$GPUS" 1
number PORT "$PORT" 1 65535
number REQUEUES "$REQUEUES" 0
if [ -z "${SLURM_JOB_ID:-}" ] && [ -z "${DRY_RUN:-}" ]; then
    refuse SLURM_JOB_ID '' 'set, as in a job: sbatch launch/slurm.sh'
fi
PLATFORM=gpu
# shellcheck source=launch/flags.sh
. "$here/flags.sh"

each=1
if [ "$TASKS" = gpu ] || [ "$BACKEND" = torch ]; then
    each=$GPUS
fi
all=$((NODES * each))

# What a task learns only where it runs: the variables are SLURM's. Under SLURM a JAX that is not told its GPUs takes one alone.
# shellcheck disable=SC2016
case $BACKEND-$TASKS in
    jax-node) place="exec env JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS - 1)))"' JAX_PROCESS_ID="$SLURM_PROCID" "$@"' ;;
    jax-gpu) place='exec env JAX_LOCAL_DEVICE_IDS="$SLURM_LOCALID" JAX_PROCESS_ID="$SLURM_PROCID" "$@"' ;;
    torch-*) place='exec env RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" "$@"' ;;
esac
set -- sh -c "$place" sh "$PYTHON" -m "lumina_$BACKEND.train" --config "$CONFIG" --workdir "$WORKDIR" "$@"
# The first to end must not end the others, which may be saving still; when one is lost they end by themselves.
set -- srun --nodes="$NODES" --ntasks="$all" --ntasks-per-node="$each" --export=ALL --kill-on-bad-exit=0 --wait=0 --label "$@"
if [ "$BACKEND" = jax ]; then
    set -- env "$FLAGS_NAME=$FLAGS_VALUE" JAX_COORDINATOR_ADDRESS="$ADDRESS:$PORT" JAX_NUM_PROCESSES="$all" "$@"
else
    set -- env MASTER_ADDR="$ADDRESS" MASTER_PORT="$PORT" WORLD_SIZE="$all" LOCAL_WORLD_SIZE="$each" "$@"
fi
if [ -n "${DRY_RUN:-}" ]; then
    run "$@"
    exit
fi

code=0
"$@" || code=$?
case $code in
    0 | 2 | 3 | 4 | 5 | 6 | 93 | 126 | 127 | 130 | 141) exit "$code" ;; # nor does `lumina run` start these again
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt "$REQUEUES" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
