"""One of several processes that load a merged model together; run by tests/test_parallel.py.

python one_of_several.py MODEL OUT COORDINATOR PROCESSES PROCESS
"""

import json
import sys
from pathlib import Path

import numpy as np

from flexolmo_jax import distributed, load, make_mesh
from flexolmo_jax.sharding import on_host

model, out, coordinator, processes, process = sys.argv[1:]
distributed.start(coordinator, int(processes), int(process), wait=60)
spread = load(model, mesh=make_mesh(2))
logits = on_host(spread.logits(np.arange(24).reshape(4, 6)))
texts = spread.generate(["one", "and the other"], 8, without=["math"])
if distributed.is_first():
    np.save(Path(out) / "logits.npy", logits)
    (Path(out) / "texts.json").write_text(json.dumps(texts))
