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

set -- --master_port "$PORT" --module --no_local_rank \
    lumina_torch.train --config "$CONFIG" --workdir "$WORKDIR" --config.torch.deepspeed.zero_stage="$STAGE" "$@"
if [ -n "$HOSTFILE" ]; then
    set -- --hostfile "$HOSTFILE" "$@"
fi
set -- "$DEEPSPEED" --num_gpus "$PROCESSES" "$@"
if [ -n "${DRY_RUN:-}" ]; then
    echo "$@"
else
    exec "$@"
fi
