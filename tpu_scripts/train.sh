#!/usr/bin/env bash
# Runs one `flexolmo train` on all workers, and again until its package is there.
#
#     PROJECT=... ZONE=... TPU=... OUT=/mnt/flexolmo/mine ./train.sh [--dry-run] \
#         expert flexolmo_2x7b_expert --anchor /mnt/flexolmo/anchor \
#         --data /mnt/flexolmo/texts --name mine
#
# What follows is given to `flexolmo train`; --out, --distributed and --resume are added. A TPU that
# is preempted gets SIGTERM, saves, and ends with 0; a killed one resumes from its last checkpoint.
source "$(dirname "$0")/common.sh"
need_tpu
need OUT "the package to make, in a folder that all workers see ($SHARED/...)"
[[ $# -gt 0 ]] || { echo "train.sh: say what to train, as: expert CONFIG --data ..." >&2; exit 2; }

# Collectives run beside compute: https://docs.jax.dev/en/latest/gpu_performance_tips.html has the
# same idea for GPUs; these are on by default for TPU in the pinned libtpu, so none is set here.
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
    echo "train.sh: $OUT is there"
    exit 0
  fi
  sleep "${PAUSE:-60}"
done
echo "train.sh: $OUT is not there after $tries tries; see logs.sh" >&2
exit 1
