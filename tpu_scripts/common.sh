# What the scripts here share; sourced, not run.
# shellcheck shell=bash
set -euo pipefail

DRY_RUN=${DRY_RUN:-}
if [[ "${1:-}" == "--dry-run" ]]; then
  DRY_RUN=1
  shift
fi

# need NAME "what it is": stops with a message if the variable is not set.
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

# on_workers COMMAND: on every worker of the TPU at once; their output comes back here.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$TPU" --project "$PROJECT" --zone "$ZONE" \
    --worker=all --command "$1"
}

need_tpu() {
  need PROJECT "the Google Cloud project"
  need ZONE "of the TPU, as us-east5-a"
  need TPU "a name for the TPU, as flexolmo-64"
}

# Where all workers see the same files: a bucket with a hierarchical namespace, so that renaming a
# folder is atomic (https://cloud.google.com/storage/docs/hns-overview), mounted by gcsfuse.
SHARED=${SHARED:-/mnt/flexolmo}
