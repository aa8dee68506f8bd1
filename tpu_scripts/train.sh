#!/usr/bin/env bash
# Runs one `flexolmo train` on all workers, and repeats it until its package exists.
#
#     PROJECT=... ZONE=... TPU=... OUT=/mnt/flexolmo/mine ./train.sh [--dry-run] \
#         expert flexolmo_2x7b_expert --anchor /mnt/flexolmo/anchor \
#         --data /mnt/flexolmo/texts --name mine
#
# The arguments are passed to `flexolmo train`, with --out, --distributed and --resume. A TPU that
# is preempted gets SIGTERM, saves, and exits with 0; after a kill, the run resumes from its last
# checkpoint.
source "$(dirname "$0")/common.sh"
need_tpu
need OUT "the package to write, in a folder that all workers share ($SHARED/...)"
[[ $# -gt 0 ]] || { echo "train.sh: say what to train, such as: expert CONFIG --data ..." >&2; exit 2; }

# No XLA flags: on TPU, the pinned libtpu overlaps collectives with computation by default.
words=$(printf ' %q' "$@")
tries=${TRIES:-100}
for ((try = 1; try <= tries; try++)); do
  # `pgrep`: a worker whose earlier run still saves must end before a new one starts.
  on_workers "cd flexolmo_jax && while pgrep -f '[f]lexolmo train' >/dev/null; do sleep 5; done
.venv/bin/flexolmo train$words --out $OUT --distributed --resume 2>&1 | tee -a ~/flexolmo.log" ||
    echo "train.sh: the run ended early; trying again ($try of $tries)" >&2
  if [[ -n "$DRY_RUN" ]]; then
    exit 0
  elif gcloud compute tpus tpu-vm ssh "$TPU" --project "$PROJECT" --zone "$ZONE" --worker=0 \
    --command "test -e $OUT/manifest.json"; then
    echo "train.sh: $OUT exists"
    exit 0
  fi
  sleep "${PAUSE:-60}"
done
echo "train.sh: $OUT does not exist after $tries tries; see logs.sh" >&2
exit 1
