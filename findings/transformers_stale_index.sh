#!/bin/bash
# transformers 5.23.0, torch 2.13.0: `save_pretrained` into a folder that holds a model in several
# shards, when the new one fits into one file, removes the old shards and leaves their
# model.safetensors.index.json. The index then names files that are not there; whoever reads the
# index first, as many loaders do, finds no model.
# Seen on 2026-11-28:
#   8 shards and an index
#   ['model.safetensors', 'model.safetensors.index.json']
#   files that the index names and that are there: 0 of 8
# (Any build of torch does; PyPI's for Linux is a download of gigabytes.)
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - 2> /dev/null <<'PY'
import json
import os

from transformers import GPT2Config, GPT2LMHeadModel

sizes = dict(n_layer=2, n_embd=32, n_head=2, vocab_size=200, n_positions=32)
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
model.save_pretrained("model", max_shard_size="20KB")
shards = [name for name in os.listdir("model") if name.startswith("model-")]
print(len(shards), "shards and an index")
model.save_pretrained("model")
left = sorted(name for name in os.listdir("model") if "safetensors" in name)
print(left)
named = set(json.load(open("model/model.safetensors.index.json"))["weight_map"].values())
there = named & set(left)
print(f"files that the index names and that are there: {len(there)} of {len(named)}")
assert left == ["model.safetensors", "model.safetensors.index.json"] and not there
PY
