#!/bin/bash
# jax 0.12.0.1 on CPU: the product of a row and a matrix of 8-bit integers is a loop over its sums, with the cast inside.
# XLA puts what makes the row into that loop, too, here a gated activation: it is multiplied out again for each of the
# 512 sums, and the product takes about twice as long. With jax.lax.optimization_barrier around the row it is made once.
# Seen on 2026-11-30, 2 cores of an AMD EPYC:
#   multiplications in the loop: 2, with a barrier: 0; same numbers: True; it takes longer without: True
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
cat > program.py <<'PY'
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, HIDDEN = 512, 1408
OPTIONS = {"xla_cpu_enable_fast_math": True}  # else the sum isn't vectorized


def product(matrix, gate, up, barrier):
    row = jax.nn.silu(gate) * up
    if barrier:
        row = jax.lax.optimization_barrier(row)
    return row @ matrix.astype(jnp.float32).T


numbers = np.random.default_rng(0)
matrix = numbers.integers(-127, 127, (WIDTH, HIDDEN), np.int8)
gate, up = numbers.standard_normal((2, 1, HIDDEN), np.float32)
arguments = [jnp.asarray(x) for x in (matrix, gate, up)]
inside, outputs, seconds, programs = {}, {}, {False: [], True: []}, {}
for barrier in (False, True):
    run = jax.jit(functools.partial(product, barrier=barrier), compiler_options=OPTIONS)
    programs[barrier] = run.lower(*arguments).compile()
    (loop,) = [part for part in programs[barrier].as_text().split("\n\n") if " dot(" in part]
    inside[barrier] = loop.count(" multiply(")
    outputs[barrier] = np.asarray(programs[barrier](*arguments))
for _ in range(400):
    for barrier, run in programs.items():
        begun = time.perf_counter()
        run(*arguments).block_until_ready()
        seconds[barrier].append(time.perf_counter() - begun)
same = np.allclose(outputs[False], outputs[True], rtol=1e-4, atol=1e-3 * np.abs(outputs[True]).max())
slower = statistics.median(seconds[False]) > 1.2 * statistics.median(seconds[True])
print(
    f"multiplications in the loop: {inside[False]}, with a barrier: {inside[True]}; "
    f"same numbers: {same}; it takes longer without: {slower}"
)
raise SystemExit(not (inside[False] > 0 == inside[True] and same and slower))
PY
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
JAX_PLATFORMS=cpu venv/bin/python program.py
