#!/bin/bash
# libtpu 0.0.52 with jax 0.10.2 (Python 3.11, Linux x86_64), no TPU needed: the topology "v4:2x2x1", of four chips, has
# eight devices, and `jax.experimental.mesh_utils` refuses to make a mesh of them; described with
# `chip_config_name="megacore"` it has four.
# Seen on 2026-11-28:
#   v4:2x2x1 8 devices
#   v4:2x2x1, megacore 4 devices
#   AssertionError: Creating meshes for TPU >v3 requires one device per chip
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PY'
import os

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
from jax.experimental import mesh_utils, topologies

plain = topologies.get_topology_desc("v4:2x2x1", "tpu").devices
megacore = topologies.get_topology_desc("v4:2x2x1", "tpu", chip_config_name="megacore").devices
print("v4:2x2x1", len(plain), "devices")
print("v4:2x2x1, megacore", len(megacore), "devices")
try:
    mesh_utils.create_device_mesh((8,), plain)
    said = "no error"
except Exception as error:
    said = f"{type(error).__name__}: {str(error).splitlines()[0]}"
print(said)
assert (len(plain), len(megacore)) == (8, 4)
assert said.startswith("AssertionError: Creating meshes for TPU >v3 requires one device per chip")
PY
