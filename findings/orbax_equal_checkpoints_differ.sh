#!/bin/bash
# orbax-checkpoint 0.12.8 with jax 0.10.2 (Python 3.11): two checkpoints of the same arrays differ, in
# two files: `_CHECKPOINT_METADATA` holds when the writing began and ended, to the nanosecond, and
# `commit_success.txt` the path of the folder. So a digest over the folder names a moment and a
# place, not the weights.
# Seen on 2026-11-28:
#   differs: ['_CHECKPOINT_METADATA', 'commit_success.txt']
#   its times: ['commit_timestamp_nsecs', 'init_timestamp_nsecs']
set -euo pipefail
FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT
cd "$FOLDER"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2> pip.log || {
    cat pip.log >&2
    exit 2
}
venv/bin/python - <<'PY'
import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

for name in ("one", "two"):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(name).absolute(), args=ocp.args.PyTreeSave({"x": np.arange(4.0)}))
files = sorted(f.relative_to("one") for f in Path("one").rglob("*") if f.is_file())
assert files == sorted(f.relative_to("two") for f in Path("two").rglob("*") if f.is_file())
differs = [str(f) for f in files if Path("one", f).read_bytes() != Path("two", f).read_bytes()]
print("differs:", differs)
about = json.loads(Path("one/_CHECKPOINT_METADATA").read_text())
times = sorted(key for key in about if key.endswith("_nsecs"))
print("its times:", times)
assert differs == ["_CHECKPOINT_METADATA", "commit_success.txt"]
assert times == ["commit_timestamp_nsecs", "init_timestamp_nsecs"]
PY
