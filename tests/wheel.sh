#!/usr/bin/env bash
# An installed wheel does its work in a folder that holds nothing of the checkout: bundled texts and configs are in it.
#
#     tests/wheel.sh VENV
set -euo pipefail
bin=$(realpath "$1")/bin
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export XDG_CACHE_HOME=$folder/cache
export XDG_STATE_HOME=$folder/state  # the text is the same in every run, and each has a ledger of its own
"$bin/python" -c '
import itertools, json
from flexolmo_jax.data.sources import read_documents
for name in ("public", "math"):
    rows = [json.dumps({"text": d.text}) for d in itertools.islice(read_documents(f"corpus:{name}"), 150)]
    open(f"{name}.jsonl", "w").write("\n".join(rows))
'
short=(--steps 2 --data.batch-size 8 --data.length 32)

"$bin/python" -W error -c 'import flexolmo_jax; assert "site-packages" in flexolmo_jax.__file__, flexolmo_jax.__file__'
"$bin/flexolmo" train anchor demo_anchor --data public.jsonl --out anchor "${short[@]}" \
  --model.vocab-size 300 --model.width 32 --model.num-layers 2 --model.num-heads 2 --model.ffn-width 64 \
  --evidence-rank 8
"$bin/flexolmo" train expert demo_private_expert --data math.jsonl --anchor anchor --name math --out math \
  --dp-epsilon 8 --head-rank 8 --evidence-rank 8 "${short[@]}"
"$bin/flexolmo" privacy verify math
"$bin/flexolmo" merge --anchor anchor --expert math --out merged
"$bin/flexolmo" generate --model merged --prompt "One" --without math --max-new-tokens 4
echo "the wheel works"
