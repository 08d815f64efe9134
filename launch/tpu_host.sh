#!/bin/sh
# What each host of a TPU pod slice runs, see launch/tpu_pod.sh: it asks the slice who the hosts are. DRY_RUN=1 prints the command.
set -eu

CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug}           # which all hosts see
PORT=${PORT:-8482}                       # free on the first host
PYTHON=${PYTHON:-.venv/bin/python}
METADATA=${METADATA:-http://metadata.google.internal/computeMetadata/v1/instance/attributes}

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
config "$CONFIG"
number PORT "$PORT" 1 65535
PLATFORM=tpu
# shellcheck source=launch/flags.sh
. "$here/flags.sh"

# As in jax/_src/clusters/cloud_tpu_cluster.py: hosts in their order, separated by commas, the address of each in the third field.
ask() {
    curl --silent --show-error --fail --header 'Metadata-Flavor: Google' "$METADATA/$1"
}
number=$(ask agent-worker-number)
hosts=$(ask worker-network-endpoints)
number JAX_PROCESS_ID "$number" 0
first=$(echo "${hosts%%,*}" | cut -d : -f 3)
count=$(($(echo "$hosts" | tr -cd , | wc -c) + 1))
word JAX_COORDINATOR_ADDRESS "$first"

run env "$FLAGS_NAME=$FLAGS_VALUE" JAX_COORDINATOR_ADDRESS="$first:$PORT" JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$number" \
    "$PYTHON" -m lumina.cli run -- "$PYTHON" -m lumina_jax.train --config "$CONFIG" --workdir "$WORKDIR" "$@"
