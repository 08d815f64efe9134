#!/bin/sh
# Train with several JAX processes on this machine: launch/local.sh [more flags for the trainer]
# A signal to it reaches all of them; when one ends badly the others are ended, and its exit code is returned: `lumina run -- launch/local.sh`
# restarts all. One process drives all the devices of a machine: several are for trying out a cluster's way. DRY_RUN=1 prints the command.
set -eu

PROCESSES=${PROCESSES:-2}
PLATFORM=${PLATFORM:-cpu}                # cpu: joined by gloo; gpu: one process a GPU
PORT=${PORT:-0}                          # where process 0 listens; 0 takes one that is free
LOGS=${LOGS:-}                           # a directory: a file for each process, not lines that begin with its number
CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug}
PYTHON=${PYTHON:-.venv/bin/python}

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
number PROCESSES "$PROCESSES" 1
number PORT "$PORT" 0 65535
choice PLATFORM "$PLATFORM" cpu gpu

set -- -- "$PYTHON" -m lumina_jax.train --config "$CONFIG" --workdir "$WORKDIR" "$@"
if [ -n "$LOGS" ]; then
    set -- --logs "$LOGS" "$@"
fi
run "$PYTHON" -m lumina.runs.processes --count "$PROCESSES" --platform "$PLATFORM" --port "$PORT" "$@"
