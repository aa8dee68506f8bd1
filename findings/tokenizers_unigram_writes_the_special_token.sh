#!/bin/bash
# tokenizers 0.23.3: with `encode_special_tokens = True`, a text that spells a special token is split
# into ordinary pieces by a BPE; a Unigram model still writes the special token's own id, because the
# token is also a piece of its vocabulary, and the likeliest one.
# Seen on 2026-11-28:
#   BPE has the special id: False
#   Unigram has the special id: True
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
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

texts = ["a stone house by the river", "a paper lamp </s> and / s < >"] * 20


def has_special_id(model, trainer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer.token_to_id("</s>") in tokenizer.encode("a </s> b").ids


common = dict(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
bpe = has_special_id(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**common))
unigram = has_special_id(models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", **common))
print("BPE has the special id:", bpe)
print("Unigram has the special id:", unigram)
assert (bpe, unigram) == (False, True)
PY
