#!/usr/bin/env bash
# Do head and evidence still matter beside a released model? On one machine with a GPU.
#
#     ANCHOR=OLMo-2-0425-1B TEXTS=flexmix OUT=DIR tpu_scripts/heads.sh [--dry-run] math news
#
# ANCHOR is a Hugging Face folder, TEXTS one that `flexolmo data flexmix` wrote, and the arguments
# are owners in it. Each owner trains an expert with heads, and one without, on the same text; the
# experts of each kind are merged, and routed by evidence or by rows. Bits per byte of held-out text
# are printed for the anchor and both. A stopped run continues when the command is repeated: what is
# done is skipped. OPTIONS are passed to `flexolmo train expert`.
source "$(dirname "$0")/common.sh"
need ANCHOR "a Hugging Face folder of an OLMo 2 model"
need TEXTS "the folder that flexolmo data flexmix wrote"
need OUT "a folder for the models"
[[ $# -gt 0 ]] || { echo "heads.sh: name owners in $TEXTS, such as: math news" >&2; exit 2; }
flexolmo="${VENV:-.venv}/bin/flexolmo"
read -ra options <<<"${OPTIONS:-}"

# make FOLDER COMMAND...: runs the command, which writes the folder, unless the folder is complete.
make() {
  [[ -e "$1/manifest.json" ]] || run "$flexolmo" "${@:2}" --out "$1"
}

public="$TEXTS/public/train.jsonl"
make "$OUT/anchor" train evidence demo_evidence --anchor "$ANCHOR" --data "$public" \
  --data.batch-size 64 --resume
heldout=("public=$TEXTS/public/heldout.jsonl")
for owner in "$@"; do
  heldout+=("$owner=$TEXTS/$owner/heldout.jsonl")
  expert=(train expert olmo2_1b_expert --anchor "$OUT/anchor" --name "$owner"
    --data "$TEXTS/$owner/train.jsonl" --resume "${options[@]}")
  make "$OUT/headed/$owner" "${expert[@]}"
  make "$OUT/plain/$owner" "${expert[@]}" --head-rank 0 --evidence-rank 0
done
for kind in plain headed; do
  make "$OUT/merged_$kind" merge --anchor "$OUT/anchor" --expert "${@/#/$OUT/$kind/}"
done
for model in anchor merged_plain merged_headed; do
  run "$flexolmo" evaluate --model "$OUT/$model" --data "${heldout[@]}"
done
