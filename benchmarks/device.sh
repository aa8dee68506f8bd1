#!/usr/bin/env bash
# Measures one machine with a CUDA GPU beside transformers: parity, training steps, layers, decoding and first runs.
#
#     benchmarks/device.sh OUT          # at most 8 minutes; writes OUT/device.txt, device.json and device.log
#     benchmarks/device.sh OUT --toy    # any machine, at toy size
#
# The machine needs no network and no installation of this project, but Python 3.12 or newer with jax 0.11.2 or newer,
# flax, optax, jaxtyping, PyTorch and transformers. OUT is by default $OUT, then build/device.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.device "$@"
