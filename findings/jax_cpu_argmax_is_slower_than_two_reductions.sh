#!/bin/bash
# jax 0.12.0.1 on CPU (x86-64, 2 cores): jnp.argmax of logits, as greedy decoding takes it, is several times slower than
# their maximum and then the first index that has it, which gives the same. So are jax.random.categorical, which ends in
# an argmax, and with the vocabulary of a real model either can take as long as a small model.
# Seen on 2026-11-30:
#   [16, 100352], milliseconds: argmax 3.49, two reductions 0.44; categorical 15.18, its noise and two reductions 6.04
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
cat > program.py <<'PY'
import time

import jax
import jax.numpy as jnp
import numpy as np


def first_of_the_largest(x):
    index = jnp.arange(x.shape[-1])
    return jnp.min(jnp.where(x == jnp.max(x, -1, keepdims=True), index, x.shape[-1] - 1), -1)


def drawn(keys, x):
    noise = jax.vmap(lambda key, row: jax.random.gumbel(key, row.shape))(keys, x)
    return first_of_the_largest(x + noise)


def milliseconds(function, *arguments):
    run = jax.jit(function)
    found, taken = np.asarray(run(*arguments)), []
    for _ in range(15):
        begun = time.perf_counter()
        run(*arguments).block_until_ready()
        taken.append(1e3 * (time.perf_counter() - begun))
    return found, float(np.median(taken))


logits = jnp.asarray(np.random.default_rng(0).standard_normal((16, 100352), np.float32))
keys = jax.random.split(jax.random.key(0), 16)
index, slow = milliseconds(lambda x: jnp.argmax(x, -1), logits)
own_index, fast = milliseconds(first_of_the_largest, logits)
token, slow_draw = milliseconds(jax.vmap(jax.random.categorical), keys, logits)
own_token, fast_draw = milliseconds(drawn, keys, logits)
assert (index == own_index).all() and (token == own_token).all()
print(f"[16, 100352], milliseconds: argmax {slow:.2f}, two reductions {fast:.2f};", end=" ")
print(f"categorical {slow_draw:.2f}, its noise and two reductions {fast_draw:.2f}")
raise SystemExit(slow < 3 * fast or slow_draw < 1.5 * fast_draw)
PY
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
JAX_PLATFORMS=cpu venv/bin/python program.py
