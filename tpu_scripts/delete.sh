#!/usr/bin/env bash
# Gives the TPU back; the bucket stays.
#
#     PROJECT=... ZONE=... TPU=... ./delete.sh [--dry-run]
source "$(dirname "$0")/common.sh"
need_tpu
run gcloud compute tpus queued-resources delete "$TPU" --project "$PROJECT" --zone "$ZONE" \
  --force --quiet
