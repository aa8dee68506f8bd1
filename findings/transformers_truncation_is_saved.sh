#!/bin/bash
# transformers 5.23.0, tokenizers 0.23.3: calling a fast tokenizer once with `truncation=True` leaves
# the truncation set in the tokenizer underneath, and `save_pretrained` writes it into tokenizer.json.
# Whoever reads that file with `tokenizers.Tokenizer.from_file` gets texts cut to that length.
# Seen on 2026-11-28:
#   fresh: truncation None, 6 ids
#   after one call with truncation=True, max_length=2: truncation at 2, 2 ids
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PY'
import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
fast = PreTrainedTokenizerFast(tokenizer_object=made)


def saved(folder):
    fast.save_pretrained(folder)
    truncation = json.load(open(f"{folder}/tokenizer.json"))["truncation"]
    return truncation, len(Tokenizer.from_file(f"{folder}/tokenizer.json").encode("a " * 6).ids)


truncation, ids = saved("fresh")
print(f"fresh: truncation {truncation}, {ids} ids")
assert (truncation, ids) == (None, 6)
fast("a a a a", truncation=True, max_length=2)
truncation, ids = saved("called")
print("after one call with truncation=True, max_length=2: ", end="")
print(f"truncation at {truncation['max_length']}, {ids} ids")
assert (truncation["max_length"], ids) == (2, 2)
PY
