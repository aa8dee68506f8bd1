"""One of several processes that load a merged model together; run by test_processes.py.

python one_of_several.py MODEL OUT COORDINATOR PROCESSES PROCESS
"""

import json
import sys
from pathlib import Path

import numpy as np

from flexolmo_jax import load, make_mesh
from flexolmo_jax.parallel.placement import to_host
from flexolmo_jax.runtime import processes

model, out, coordinator, count, number = sys.argv[1:]
processes.start(coordinator, int(count), int(number), wait=60)
spread = load(model, mesh=make_mesh(2))
logits = to_host(spread.logits(np.arange(24).reshape(4, 6)))
texts = spread.generate(["one", "and the other"], 8, without=["math"])
if processes.is_main_process():
    np.save(Path(out) / "logits.npy", logits)
    (Path(out) / "texts.json").write_text(json.dumps(texts))
