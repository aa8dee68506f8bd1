#!/usr/bin/env bash
# Compiles a config's step for a TPU slice on this machine, and says whether it fits. It needs no TPU
# and no account.
#
#     TOPOLOGY=v5p:4x4x4 ./plan.sh [--dry-run] flexolmo_2x7b_expert [--microbatches 8 ...]
source "$(dirname "$0")/common.sh"
need TOPOLOGY "such as v5p:4x4x4, v5e:16x16, v6e:8x8, tpu7x:2x2x1, v4:4x4x4"
[[ $# -gt 0 ]] || { echo "plan.sh: name a config, such as flexolmo_2x7b_expert" >&2; exit 2; }
run "${FLEXOLMO:-flexolmo}" plan "$@" --topology "$TOPOLOGY"
