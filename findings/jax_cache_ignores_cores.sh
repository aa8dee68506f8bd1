#!/bin/bash
# jax 0.12.0.1 on CPU (Python 3.13): the persistent compilation cache takes a program that was compiled where the
# process might use one core for the same program where it may use two. XLA divides an elementwise program among
# cores when it compiles it, so that such a program runs on one core from then on, in every process that shares
# the cache: after a job with one core in a container or under a scheduler, say. Nothing is said.
# Seen on 2026-11-28:
#   1 core: compiled, not divided
#   2 cores: from the cache, not divided
#   2 cores, new cache: compiled, divided
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
cat > program.py <<'PY'
import os
import sys

number, cache = int(sys.argv[1]), sys.argv[2]
cores = sorted(os.sched_getaffinity(0))
if len(cores) < 2:
    sys.exit(2)
os.sched_setaffinity(0, cores[:number])

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
numbers = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
program = jax.jit(lambda x: jnp.sin(x) * jnp.cos(x) + jnp.exp(-x)).lower(numbers).compile()
was_cached = any(name.endswith("cache_hits") for name in events)
is_divided = '"outer_dimension_partitions":["' in program.as_text()
print("from the cache," if was_cached else "compiled,", "divided" if is_divided else "not divided")
PY
one=$(venv/bin/python program.py 1 shared) two=$(venv/bin/python program.py 2 shared) new=$(venv/bin/python program.py 2 new) || exit 2
printf '1 core: %s\n2 cores: %s\n2 cores, new cache: %s\n' "$one" "$two" "$new"
[ "$one" = "compiled, not divided" ] && [ "$two" = "from the cache, not divided" ] && [ "$new" = "compiled, divided" ]
