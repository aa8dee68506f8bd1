# Functions that the scripts share; sourced, not run.
# shellcheck shell=bash
set -euo pipefail

DRY_RUN=${DRY_RUN:-}
if [[ "${1:-}" == "--dry-run" ]]; then
  DRY_RUN=1
  shift
fi

# need NAME "description": exits with a message if the variable is not set.
need() {
  if [[ -z "${!1:-}" ]]; then
    echo "$(basename "$0"): set $1: $2" >&2
    exit 2
  fi
}

# run COMMAND...: prints the command, and runs it unless --dry-run was given.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n "$DRY_RUN" ]] || "$@"
}

# on_workers COMMAND: runs it on all workers of the TPU at once, and prints their output.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU" --project "$PROJECT" --zone "$ZONE" \
    --worker=all --command "$1"
}

need_tpu() {
  need PROJECT "the Google Cloud project"
  need ZONE "of the TPU, such as us-east5-a"
  need TPU "the name of the TPU, such as flexolmo-64"
}

# The files that all workers share: a bucket, mounted by gcsfuse, with a hierarchical namespace, so
# that renaming a folder is atomic (https://cloud.google.com/storage/docs/hns-overview).
SHARED=${SHARED:-/mnt/flexolmo}
