#!/bin/bash
# jax 0.12.0.1 on CPU: one program writes a token's key into a donated cache, attends to the cache and returns it, as
# decoding does. XLA writes it twice, once into what the attention reads and once into what is returned, so the donated
# buffer isn't updated in place and the whole cache is copied, four times. With jax.lax.optimization_barrier between the
# write and the attention nothing is copied; the outputs are the same bits.
# Seen on 2026-11-30:
#   copies of the cache: 4, with a barrier: 0; same outputs: True
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
cat > program.py <<'PY'
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (1, 8, 128, 64)  # sequences, heads, slots, head size


def step(cache, query, key, slot, barrier):
    cache = cache.at[jnp.arange(1)[:, None], :, slot].set(key, mode="drop")
    if barrier:
        cache = jax.lax.optimization_barrier(cache)
    return cache, jnp.einsum("bhqd,bhsd->bhqs", query, cache)


numbers = np.random.default_rng(0)
query = numbers.standard_normal((1, 8, 1, 64), np.float32)
key = numbers.standard_normal((1, 1, 8, 64), np.float32)
slot = jnp.full((1, 1), 5)
copies, outputs = {}, {}
for barrier in (False, True):
    run = jax.jit(functools.partial(step, barrier=barrier), donate_argnums=0)
    cache = jnp.ones(SHAPE)
    program = run.lower(cache, query, key, slot).compile().as_text()
    copies[barrier] = len(re.findall(r"= f32\[1,8,128,64\]\S* copy\(", program))
    outputs[barrier] = [np.asarray(x) for x in run(cache, query, key, slot)]
same = all(np.array_equal(one, other) for one, other in zip(outputs[False], outputs[True]))
print(f"copies of the cache: {copies[False]}, with a barrier: {copies[True]}; same outputs: {same}")
raise SystemExit(not (copies[False] > 0 == copies[True] and same))
PY
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
JAX_PLATFORMS=cpu venv/bin/python program.py
