#!/bin/sh
# Train on the devices of this machine with DeepSpeed's launcher: launch/deepspeed.sh [more flags for the trainer]
# On several machines, give the names of a hostfile in HOSTFILE; it needs ssh without a password. DRY_RUN=1 prints the command.
set -eu

PROCESSES=${PROCESSES:-2}                # on each machine, one a device
HOSTFILE=${HOSTFILE:-}                   # lines such as: machine-0 slots=8
PORT=${PORT:-29500}                      # free on the first machine
CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug-torch}
STAGE=${STAGE:-auto}                     # of ZeRO: auto, 0, 1, 2 or 3
DEEPSPEED=${DEEPSPEED:-.venv/bin/deepspeed}

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
config "$CONFIG"
number PROCESSES "$PROCESSES" 1
number PORT "$PORT" 1 65535
choice STAGE "$STAGE" auto 0 1 2 3
if [ -n "$HOSTFILE" ] && [ ! -r "$HOSTFILE" ]; then # DeepSpeed would train on this machine alone
    refuse HOSTFILE "$HOSTFILE" 'a file that can be read'
fi

set -- --master_port "$PORT" --module --no_local_rank \
    lumina_torch.train --config "$CONFIG" --workdir "$WORKDIR" --config.torch.deepspeed.zero_stage="$STAGE" "$@"
if [ -n "$HOSTFILE" ]; then
    set -- --hostfile "$HOSTFILE" "$@"
fi
run "$DEEPSPEED" --num_gpus "$PROCESSES" "$@"
