#!/bin/sh
# Train on all hosts of a TPU pod slice, over ssh: TPU=mine ZONE=us-east5-a launch/tpu_pod.sh [more flags for the trainer]
# Each host runs launch/tpu_host.sh in its own checkout, supervised. When this command's connection is lost the hosts save and stop:
# run it in tmux, near the pod. DRY_RUN=1 prints the command, after those that make the slice and set up its hosts.
set -eu

TPU=${TPU:-lumina}                       # the name of the slice
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-128}                    # of the slice, as v5p-128 or v6e-256; for the printed commands alone
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}       # its software: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e; for them too
DIRECTORY=${DIRECTORY:-lumina}           # the checkout on each host, below the home directory
SOURCE=${SOURCE:-}                       # what they clone it from; for the printed commands, which need it
CONFIG=${CONFIG:-configs/debug.py}
WORKDIR=${WORKDIR:-runs/debug}           # which all hosts see
PORT=${PORT:-8482}                       # free on the first host

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
THERE=1 config "$CONFIG"
word TPU "$TPU"
word ZONE "$ZONE"
word TYPE "$TYPE"
word RUNTIME "$RUNTIME"
number PORT "$PORT" 1 65535

remote="cd $(quoted "$DIRECTORY") && exec $(quoted env CONFIG="$CONFIG" WORKDIR="$WORKDIR" PORT="$PORT" launch/tpu_host.sh "$@")"
if [ -n "${DRY_RUN:-}" ]; then
    [ -n "$SOURCE" ] || refuse SOURCE '' 'the repository that the hosts clone, as in SOURCE=https://example.com/lumina.git'
    install="$(quoted git clone "$SOURCE" "$DIRECTORY") && cd $(quoted "$DIRECTORY") && make setup"
    install="$install && .venv/bin/python -m pip install -c requirements.lock -e '.[tpu]'"
    echo '# Once, to have the slice, and when it is there to set up its hosts:'
    printf '# '
    quoted gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME"
    printf '# '
    quoted gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$install"
fi
run gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$remote"
