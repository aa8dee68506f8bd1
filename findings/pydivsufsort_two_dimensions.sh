#!/bin/bash
# pydivsufsort 0.0.20: of an array of two dimensions, divsufsort answers for as many entries as there
# are rows, without an error: it takes the length of the first axis for that of the text. Flatten it.
# Seen on 2026-11-29:
#   of 3 rows of 4 tokens: 3 suffixes; of the same 12 tokens in one row: 12
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pydivsufsort==0.0.20 2> pip.log || {
    cat pip.log >&2
    exit 2
}
said=$(venv/bin/python - <<'END'
import numpy as np
from pydivsufsort import divsufsort

tokens = np.arange(12, dtype=np.uint32).reshape(3, 4)
rows, flat = divsufsort(tokens), divsufsort(tokens.reshape(-1))
print(f"of 3 rows of 4 tokens: {len(rows)} suffixes; of the same 12 tokens in one row: {len(flat)}")
END
)
echo "$said"
[[ $said == "of 3 rows of 4 tokens: 3 suffixes; of the same 12 tokens in one row: 12" ]]
