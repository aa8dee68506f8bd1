#!/bin/bash
# jax 0.12.0.1 on CPU: the product of one row and a matrix of 512 x 512 float32 numbers runs on one core; one of 1024 x
# 1024 uses several. So a small model, whose products come one after the other, decodes at the memory bandwidth of a core.
# Seen on 2026-11-30, 2 cores:
#   width 512: one core; width 1024: several cores
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
cat > program.py <<'PY'
import os
import time

import jax
import jax.numpy as jnp


@jax.jit
def one_after_the_other(x, matrices):
    for matrix in matrices:
        x = (x @ matrix) * 0.01
    return x


def cores(width):
    """By processor time over time."""
    matrices = [jnp.ones((width, width)) + i for i in range(2**26 // width**2)]
    x = jnp.ones((1, width))
    one_after_the_other(x, matrices).block_until_ready()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(20):
        one_after_the_other(x, matrices).block_until_ready()
    used = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return "one core" if used < 1.3 else "several cores"


if len(os.sched_getaffinity(0)) < 2:
    raise SystemExit("needs 2 cores")
found = cores(512), cores(1024)
print("width 512: {}; width 1024: {}".format(*found))
raise SystemExit(found != ("one core", "several cores"))
PY
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
JAX_PLATFORMS=cpu venv/bin/python program.py
