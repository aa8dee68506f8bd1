#!/bin/bash
# tokenizers 0.23.3: `Tokenizer.encode_special_tokens = True` makes the text of a special token
# ordinary text. `save`, `to_str`, `pickle`, `copy.copy` and `copy.deepcopy` all lose it, without a
# word: the copy reads "<s>" in a text as the special token again.
# Seen on 2026-11-28:
#   original True [1, 0]
#   save False [1, 2]
#   to_str False [1, 2]
#   pickle False [1, 2]
#   copy False [1, 2]
#   deepcopy False [1, 2]
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check tokenizers==0.23.3 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PY'
import copy
import pickle

from tokenizers import Tokenizer, models, pre_tokenizers

made = Tokenizer(models.BPE({"[UNK]": 0, "a": 1, "<s>": 2}, [], unk_token="[UNK]", fuse_unk=True))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
made.add_special_tokens(["<s>"])
made.encode_special_tokens = True
made.save("tokenizer.json")
copies = {
    "save": Tokenizer.from_file("tokenizer.json"),
    "to_str": Tokenizer.from_str(made.to_str()),
    "pickle": pickle.loads(pickle.dumps(made)),
    "copy": copy.copy(made),
    "deepcopy": copy.deepcopy(made),
}
for name, one in {"original": made, **copies}.items():
    ids = one.encode("a <s>").ids
    print(name, one.encode_special_tokens, ids)
    assert (one.encode_special_tokens, ids) == ((True, [1, 0]) if one is made else (False, [1, 2]))
PY
