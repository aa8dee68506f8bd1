#!/bin/bash
# transformers 5.23.0, torch 2.13.0: `transformers serve MODEL --trust-remote-code` does not serve a
# model whose class comes with it, which AutoModelForCausalLM loads: it looks for the class of
# config.json's `architectures` in transformers itself.
# Seen on 2026-11-29:
#   AutoModelForCausalLM: OwnForCausalLM
#   AttributeError: module transformers has no attribute OwnForCausalLM
# (Any build of torch does; PyPI's for Linux is a download of gigabytes.)
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check "transformers[serving]==5.23.0" torch==2.13.0 2> pip.log || {
    cat pip.log >&2
    exit 2
}
mkdir model
cat > modeling_own.py <<'PY'
from transformers import GPT2Config, GPT2LMHeadModel


class OwnConfig(GPT2Config):
    model_type = "own"


class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig


OwnConfig.register_for_auto_class()
OwnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
PY
export HF_HUB_OFFLINE=1
venv/bin/python - 2> /dev/null <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_own import OwnConfig, OwnForCausalLM

tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained("model")
sizes = dict(n_layer=1, n_embd=8, n_head=1, vocab_size=3, n_positions=16)
OwnForCausalLM(OwnConfig(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
print("AutoModelForCausalLM:", type(model).__name__)
PY
timeout 120 venv/bin/transformers serve "$FOLDER/model" --trust-remote-code --device cpu --port 8972 > serve.log 2>&1 || true
grep -o "AttributeError: module transformers has no attribute OwnForCausalLM" serve.log
