#!/bin/bash
# jax 0.12.0.1 on CPU (x86-64 with AVX-512, Python 3.13): the float32 sum of squares of one row, as RMSNorm takes it,
# has other last bits among 4 rows than among 16; wide rows differ less often. Who serves requests in batches of changing
# size expects matmuls to do this: here those of the very same rows give the same bits for 4 to 16 rows, and it is the
# norm before them that does not.
# Seen on 2026-11-30:
#   sums of squares that differ from those among 16 rows, by width: {256: [4, 8, 12], 384: [4, 8], 512: [4], 768: [4]}
#   matmuls that differ, by width: {256: [], 384: [], 512: [], 768: []}
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
cat > program.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

numbers = np.random.default_rng(0)
square_sum = jax.jit(lambda x: jnp.sum(x * x, axis=-1))
matmul = jax.jit(jnp.matmul)


def differing(function, rows, *others):
    among_16 = np.asarray(function(rows, *others))
    return [n for n in (4, 8, 12) if (np.asarray(function(rows[:n], *others)) != among_16[:n]).any()]


sums, products = {}, {}
for width in (256, 384, 512, 768):
    rows = numbers.standard_normal((16, width), np.float32)
    weights = numbers.standard_normal((width, 1408), np.float32)
    sums[width] = differing(square_sum, rows)
    products[width] = differing(matmul, rows, weights)
print("sums of squares that differ from those among 16 rows, by width:", sums)
print("matmuls that differ, by width:", products)
raise SystemExit(not any(sums.values()) or any(products.values()))
PY
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
JAX_PLATFORMS=cpu venv/bin/python program.py
