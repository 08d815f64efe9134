#!/bin/sh
# Train on Kubernetes by launch/jobset.yaml: IMAGE=... launch/kubernetes.sh [more flags for the trainer]
# The cluster needs JobSet (jobset.sigs.k8s.io) 0.6 or newer, an image with Lumina installed, and a claim to a volume that all pods
# write (ReadWriteMany). DRY_RUN=1 prints the manifest.
set -eu

NAME=${NAME:-lumina}                     # of the JobSet; `kubectl delete jobset NAME` stops it, saved
PLATFORM=${PLATFORM:-tpu}                # tpu or gpu
ACCELERATOR=${ACCELERATOR:-tpu-v5p-slice} # as the cluster labels its nodes: tpu-v5p-slice, nvidia-h200-141gb, ...
TOPOLOGY=${TOPOLOGY:-4x4x4}              # of a TPU slice
SLICES=${SLICES:-1}                      # TPU slices, or 1
HOSTS=${HOSTS:-16}                       # in a slice, or GPU nodes; one process on each
CHIPS=${CHIPS:-4}                        # or GPUs, on each host
IMAGE=${IMAGE:-lumina:latest}
CLAIM=${CLAIM:-lumina}                   # to the volume
MOUNT=${MOUNT:-/runs}                    # where pods see it
PORT=${PORT:-8482}                     # of the first pod
RESTARTS=${RESTARTS:-20}                 # of all pods, before it is given up
CONFIG=${CONFIG:-debug}
WORKDIR=${WORKDIR:-$MOUNT/debug}
PYTHON=${PYTHON:-python}                 # in the image

here=$(dirname -- "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"
THERE=1 config "$CONFIG"
choice PLATFORM "$PLATFORM" tpu gpu
number SLICES "$SLICES" 1
number HOSTS "$HOSTS" 1
number CHIPS "$CHIPS" 1
number PORT "$PORT" 1 65535
number RESTARTS "$RESTARTS" 0
word ACCELERATOR "$ACCELERATOR"
word IMAGE "$IMAGE"
word CLAIM "$CLAIM"
word MOUNT "$MOUNT"
if [ "$PLATFORM" = tpu ]; then
    case $TOPOLOGY in
        '' | *[!0-9x]* | [0x]* | *x | *x[0x]*) refuse TOPOLOGY "$TOPOLOGY" 'of numbers joined by x, such as 4x4x4' ;;
    esac
    [ $(($(echo "$TOPOLOGY" | sed 's/x/*/g'))) -eq $((HOSTS * CHIPS)) ] ||
        refuse TOPOLOGY "$TOPOLOGY" "of as many chips as HOSTS * CHIPS = $HOSTS * $CHIPS = $((HOSTS * CHIPS))"
fi
case $NAME in
    '' | [!a-z]* | *[!a-z0-9-]* | *-) refuse NAME "$NAME" 'of a to z, 0 to 9 and -, as Kubernetes names are' ;;
esac
# shellcheck source=launch/flags.sh
. "$here/flags.sh"
case $FLAGS_VALUE in
    *[!A-Za-z0-9._:/@,=\ -]*) refuse "$FLAGS_NAME" "$FLAGS_VALUE" 'without quotes, $ and line breaks' ;;
esac

# The words of the command as JSON, which is YAML too; $$ is how Kubernetes writes a $ that it is to leave alone.
WORDS=
for each in "$PYTHON" -m lumina_jax.train --config "$CONFIG" --workdir "$WORKDIR" "$@"; do
    case $each in
        *[[:cntrl:]]*) refuse argument "$each" 'without line breaks and other control characters' ;;
    esac
    # shellcheck disable=SC2089 # no shell reads these quotes
    WORDS="$WORDS${WORDS:+, }\"$(printf '%s\n' "$each" | sed 's/[\\"]/\\&/g; s/\$/$$/g')\""
done
WORDS="[$WORDS]"
PROCESSES=$((SLICES * HOSTS))

# shellcheck disable=SC2090
export NAME PLATFORM ACCELERATOR TOPOLOGY SLICES HOSTS CHIPS IMAGE CLAIM MOUNT PORT RESTARTS FLAGS_NAME FLAGS_VALUE WORDS PROCESSES
manifest() {
    # Values are put in as they are, once: nothing in them is looked at again, by awk or a shell.
    awk '
        / # (tpu|gpu)$/ {
            if (!sub(" # " ENVIRON["PLATFORM"] "$", "")) next
        }
        {
            filled = ""
            while (at = index($0, "${")) {
                rest = substr($0, at + 2)
                name = substr(rest, 1, index(rest, "}") - 1)
                if (!(name in ENVIRON)) {
                    print "error: launch/jobset.yaml has ${" name "}, which launch/kubernetes.sh does not set" > "/dev/stderr"
                    exit 2
                }
                filled = filled substr($0, 1, at - 1) ENVIRON[name]
                $0 = substr(rest, length(name) + 2)
            }
            print filled $0
        }' "$here/jobset.yaml"
}
text=$(manifest)
if [ -n "${DRY_RUN:-}" ]; then
    told
    printf '%s\n' "$text"
else
    printf '%s\n' "$text" | kubectl apply --filename -
fi
