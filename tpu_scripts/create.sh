#!/usr/bin/env bash
# Requests a TPU, and creates the bucket that its workers share.
#
#     PROJECT=my-project ZONE=us-east5-a TPU=flexolmo-64 BUCKET=my-flexolmo \
#         ACCELERATOR=v5p-128 VERSION=v2-alpha-tpuv5 ./create.sh [--dry-run]
#
# v5p-128 is a slice of 128 TensorCores: 64 chips, the v5p:4x4x4 of `flexolmo plan`. Versions:
# https://cloud.google.com/tpu/docs/runtimes. SPOT=1 requests a cheaper, preemptible TPU; train.sh
# then resumes from the last checkpoint.
source "$(dirname "$0")/common.sh"
need_tpu
need BUCKET "the bucket to create, if it does not exist"
need ACCELERATOR "such as v5p-128, v5litepod-256, v6e-64"
need VERSION "of the TPU software, such as v2-alpha-tpuv5"

if [[ -n "$DRY_RUN" ]] || ! gcloud storage buckets describe "gs://$BUCKET" >/dev/null 2>&1; then
  run gcloud storage buckets create "gs://$BUCKET" --project "$PROJECT" --location "${ZONE%-*}" \
    --uniform-bucket-level-access --enable-hierarchical-namespace
fi
spot=()
[[ -z "${SPOT:-}" ]] || spot=(--spot)
# A queued resource waits for capacity: https://cloud.google.com/tpu/docs/queued-resources
run gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --project "$PROJECT" \
  --zone "$ZONE" --accelerator-type "$ACCELERATOR" --runtime-version "$VERSION" "${spot[@]}"
echo "when it is ACTIVE, run setup.sh; to see its state:"
echo "  gcloud compute tpus queued-resources describe $TPU --project $PROJECT --zone $ZONE"
