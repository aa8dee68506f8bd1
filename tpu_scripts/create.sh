#!/usr/bin/env bash
# Asks for a TPU, and for the bucket that its workers share.
#
#     PROJECT=my-project ZONE=us-east5-a TPU=flexolmo-64 BUCKET=my-flexolmo \
#         ACCELERATOR=v5p-128 VERSION=v2-alpha-tpuv5 ./create.sh [--dry-run]
#
# v5p-128 is a slice of 128 TensorCores: 64 chips, the v5p:4x4x4 of `flexolmo plan`. Versions:
# https://cloud.google.com/tpu/docs/runtimes. SPOT=1 asks for a cheaper one that may be preempted;
# train.sh then resumes where it was.
source "$(dirname "$0")/common.sh"
need_tpu
need BUCKET "the bucket to make, if there is none of the name"
need ACCELERATOR "as v5p-128, v5litepod-256, v6e-64"
need VERSION "of the TPU's software, as v2-alpha-tpuv5"

if [[ -n "$DRY_RUN" ]] || ! gcloud storage buckets describe "gs://$BUCKET" >/dev/null 2>&1; then
  run gcloud storage buckets create "gs://$BUCKET" --project "$PROJECT" --location "${ZONE%-*}" \
    --uniform-bucket-level-access --enable-hierarchical-namespace
fi
spot=()
[[ -z "${SPOT:-}" ]] || spot=(--spot)
# A queued resource waits until there is room: https://cloud.google.com/tpu/docs/queued-resources
run gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --project "$PROJECT" \
  --zone "$ZONE" --accelerator-type "$ACCELERATOR" --runtime-version "$VERSION" "${spot[@]}"
echo "when it is ACTIVE, run setup.sh; to see how it stands:"
echo "  gcloud compute tpus queued-resources describe $TPU --project $PROJECT --zone $ZONE"
