#!/bin/bash
# bm25s 0.3.16, any JAX (seen with JAX 0.10.2, Python 3.11).
# `import bm25s` computes a top-k with JAX where JAX is installed (bm25s/selection.py), although its
# default backend is numpy. That starts JAX's devices: on a machine with a GPU the process takes
# three quarters of its memory, on one with a TPU the whole TPU, and jax.distributed.initialize,
# which has to come first, fails from then on. We rank a handful of passages, so we compute BM25
# ourselves; a test compares the two.
# Seen on 2026-11-29:
#   after import jax: False
#   after import bm25s: True
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check bm25s==0.3.16 jax 2> pip.log || {
    cat pip.log >&2
    exit 2
}
said=$(JAX_PLATFORMS=cpu venv/bin/python -c "
import jax
from jax._src.xla_bridge import backends_are_initialized as started
print('after import jax:', started())
import bm25s
print('after import bm25s:', started())
" 2> said.log)
echo "$said"
[[ $said == *"bm25s: True" ]]
