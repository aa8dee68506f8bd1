#!/bin/bash
# Flax 0.12.8, JAX 0.11.1 (Python 3.12 or 3.13; set PYTHON to one of them).
# pip installs the two together, and `pip check` finds nothing to complain of, because Flax 0.12.8
# sets no upper bound on JAX. `from flax import nnx` then fails: it uses a name of jax.experimental
# that JAX 0.11.1 no longer has. Flax 0.12.12 works with JAX 0.11.1.
# Seen on 2026-11-28:
#   No broken requirements found.
#   AttributeError: module 'jax.experimental.hijax' has no attribute 'MutableHiType'
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check flax==0.12.8 jax==0.11.1 jaxlib==0.11.1 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python -m pip check
said=$(venv/bin/python -c "from flax import nnx" 2>&1 | tail -1) || true
echo "$said"
[[ $said == "AttributeError: module 'jax.experimental.hijax' has no attribute 'MutableHiType'" ]]
