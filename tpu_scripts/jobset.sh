#!/usr/bin/env bash
# Runs one `flexolmo train` on a TPU slice of a GKE cluster, as a JobSet (jobset.yaml).
#
#     NAME=mine IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/flexolmo_jax BUCKET=my-flexolmo \
#         ./jobset.sh [--dry-run] expert flexolmo_2x7b_expert --anchor /shared/anchor \
#         --data /shared/texts --name mine --out /shared/mine
#
# The cluster needs JobSet (https://jobset.sigs.k8s.io) and the Cloud Storage FUSE driver; `xpk
# cluster create` creates such a cluster (https://github.com/AI-Hypercomputer/xpk). The image: any with
# a supported Python and `pip install '.[tpu]'` of a checkout.
source "$(dirname "$0")/common.sh"
need NAME "of the job"
need IMAGE "a container image with flexolmo_jax and its extra tpu"
need BUCKET "with a hierarchical namespace, mounted at /shared"
[[ $# -gt 0 ]] || { echo "jobset.sh: say what to train, such as: expert CONFIG --data ..." >&2; exit 2; }

words=""
for word in train "$@" --distributed --resume; do
  word=${word//\\/\\\\}
  words+="${words:+, }\"${word//\"/\\\"}\""
done
manifest=$(<"$(dirname "$0")/jobset.yaml")
# shellcheck disable=SC2153 # `need` has checked them
declare -A values=(
  [NAME]=$NAME [IMAGE]=$IMAGE [BUCKET]=$BUCKET [WORDS]=$words
  [ACCELERATOR]=${ACCELERATOR:-tpu-v5p-slice} [TOPOLOGY]=${TOPOLOGY:-4x4x4} [HOSTS]=${HOSTS:-16}
)
for name in "${!values[@]}"; do
  manifest=${manifest//"<$name>"/"${values[$name]}"}
done
if [[ -n "$DRY_RUN" ]]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi
