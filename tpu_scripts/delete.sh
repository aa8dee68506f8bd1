#!/usr/bin/env bash
# Deletes the TPU, but not the bucket.
#
#     PROJECT=... ZONE=... TPU=... ./delete.sh [--dry-run]
source "$(dirname "$0")/common.sh"
need_tpu
run gcloud compute tpus queued-resources delete "$TPU" --project "$PROJECT" --zone "$ZONE" \
  --force --quiet
