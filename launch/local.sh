#!/bin/sh
# Train with several JAX processes on this machine: launch/local.sh [more flags for the trainer]
# One process drives all devices of a machine by itself: several are for trying out what a cluster does, or for one process a GPU.
# A signal reaches all; when one ends badly the others are ended, with its exit code: `lumina run -- launch/local.sh` starts all
# again. DRY_RUN=1 prints the command.
set -eu

PROCESSES=${PROCESSES:-2}
PLATFORM=${PLATFORM:-cpu}                # cpu, or gpu: one process a GPU
PORT=${PORT:-0}                          # where process 0 listens; 0 takes one that is free
LOGS=${LOGS:-}                           # a directory: a file for each process, instead of lines that begin with its number
CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug}
PYTHON=${PYTHON:-.venv/bin/python}

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
config "$CONFIG"
number PROCESSES "$PROCESSES" 1
number PORT "$PORT" 0 65535
choice PLATFORM "$PLATFORM" cpu gpu
# shellcheck source=launch/flags.sh
. "$here/flags.sh"

set -- -- "$PYTHON" -m lumina_jax.train --config "$CONFIG" --workdir "$WORKDIR" "$@"
if [ -n "$LOGS" ]; then
    set -- --logs "$LOGS" "$@"
fi
set -- "$PYTHON" -m lumina.runs.local --count "$PROCESSES" --platform "$PLATFORM" --port "$PORT" "$@"
run env "$FLAGS_NAME=$FLAGS_VALUE" "$@"
