#!/bin/bash
# jax 0.12.0.1 on CPU: the product of one row and a matrix has no `op_name` in the compiled program, while that of eight
# rows has. So where a profile is summed by named scope, the products of decoding one sequence belong to no part.
# Seen on 2026-12-01:
#   1 row: no op_name; 8 rows: jit(product)/experts/dot_general
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
cat > program.py <<'PY'
import re

import jax
import jax.numpy as jnp


@jax.jit
def product(x, matrix):
    with jax.named_scope("experts"):
        return jnp.tanh(x) @ matrix


def scope(rows):
    """Of the instruction that multiplies."""
    program = product.lower(jnp.ones((rows, 512)), jnp.ones((512, 512))).compile().as_text()
    (line,) = (line for line in program.splitlines() if " dot(" in line)
    name = re.search(r'op_name="([^"]*)"', line)
    return name[1] if name else "no op_name"


found = scope(1), scope(8)
print("1 row: {}; 8 rows: {}".format(*found))
raise SystemExit(found != ("no op_name", "jit(product)/experts/dot_general"))
PY
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
JAX_PLATFORMS=cpu venv/bin/python program.py
