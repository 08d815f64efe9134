#!/bin/sh
# Train on the devices of this machine with torchrun: launch/torchrun.sh [more flags for the trainer]
# On several machines, run it on each with NODES, NODE and ADDRESS set. DRY_RUN=1 prints the command.
set -eu

PROCESSES=${PROCESSES:-2}                # on this machine, one a device
NODES=${NODES:-1}                        # machines
NODE=${NODE:-0}                          # the number of this one, from 0
ADDRESS=${ADDRESS:-127.0.0.1}            # of machine 0
PORT=${PORT:-29500}                      # free on machine 0
CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug-torch}
STAGE=${STAGE:-auto}                     # of ZeRO: auto, 0, 1, 2 or 3
PYTHON=${PYTHON:-.venv/bin/python}

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
config "$CONFIG"
number PROCESSES "$PROCESSES" 1
number NODES "$NODES" 1
number NODE "$NODE" 0 $((NODES - 1))
number PORT "$PORT" 1 65535
choice STAGE "$STAGE" auto 0 1 2 3

run "$PYTHON" -m torch.distributed.run --nproc-per-node "$PROCESSES" --nnodes "$NODES" --node-rank "$NODE" \
    --master-addr "$ADDRESS" --master-port "$PORT" \
    -m lumina_torch.train --config "$CONFIG" --workdir "$WORKDIR" --config.torch.deepspeed.zero_stage="$STAGE" "$@"
