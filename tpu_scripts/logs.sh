#!/usr/bin/env bash
# Follows the log of one worker.
#
#     PROJECT=... ZONE=... TPU=... [WORKER=0] ./logs.sh [--dry-run]
source "$(dirname "$0")/common.sh"
need_tpu
run gcloud compute tpus tpu-vm ssh "$TPU" --project "$PROJECT" --zone "$ZONE" \
  --worker="${WORKER:-0}" --command "tail -n 100 -F flexolmo.log"
