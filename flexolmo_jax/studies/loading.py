"""How long a large merged model takes to load, and how much memory: writes docs/loading.md.

    .venv/bin/python flexolmo_jax/studies/loading.py FOLDER [--experts 7]

Makes a model of 0.8 GB an expert in FOLDER, and loads it with one process and with two, over two
virtual CPU devices in all; beside it, as many processes only read the same files into memory. Each
in turn, three times: after the files were put out of the system's memory, and again at once.
"""

import argparse
import datetime
import multiprocessing
import os
import platform
import socket
import statistics
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DEVICES = 2
PAGE = """\
# Loading a large model

`python flexolmo_jax/studies/loading.py`, {date}, {cores} cores ({machine}, Linux): {gb:.1f} GB, an anchor and
{experts} experts, onto {devices} virtual CPU devices with the mesh 1x{devices}. *Cold*: no file is
in the system's memory. Every byte is checked against its digest before it is used. *Plain*: as many
processes read the same files, each its share of them, and keep the bytes. The two take turns;
medians of three, smallest and largest. *Above its part*: the largest resident memory of a process
while it loads, less what it had before and less the part of the model that it holds in the end; the
largest tensor of the model, with all its experts, has {leaf:.2f} GB. Below 0: two devices of one
process share the matrices that both have.

| processes | | load | plain | ratio | part of a process | above its part |
| --- | --- | ---: | ---: | ---: | ---: | ---: |
{rows}
Taking an expert out of this model on disk took {remove:.3f} s. Adding it again, which reads the
anchor and the package in full and routes public text, took {add:.1f} s.
"""


def make(folder: Path, experts: int) -> None:
    """Writes the model; in a process of its own."""
    import jax
    import jax.numpy as jnp

    from flexolmo_jax.config import ModelConfig
    from flexolmo_jax.data.tokenizer import Tokenizer
    from flexolmo_jax.federation.anchor import read_anchor, write_anchor
    from flexolmo_jax.federation.expert import write_expert
    from flexolmo_jax.federation.merge import merge
    from flexolmo_jax.modeling.transformer import init_anchor

    config = ModelConfig(
        vocab_size=32_768, width=2048, num_layers=6, num_heads=16, ffn_width=5632
    )  # fmt: skip
    shapes = jax.eval_shape(lambda key: init_anchor(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(tree):
        return jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape, np.float32)), tree)

    tokenizer = Tokenizer.train(["Some words, that do for a tokenizer."], 260)
    write_anchor(folder / "anchor", draw(shapes), config, tokenizer, ["Some words."], {})
    anchor = read_anchor(folder / "anchor", on_disk=True)
    paths = [folder / f"expert{number}" for number in range(1, experts + 1)]
    for path in paths:
        write_expert(path, draw(shapes.public), path.name, anchor, {})
    merge(folder / "anchor", paths, folder / "model")


def load_it(folder: Path, port: int, processes: int, number: int, answers) -> None:
    """Loads the model, as one of several processes."""
    import jax

    from flexolmo_jax.model import load
    from flexolmo_jax.parallel.mesh import make_mesh
    from flexolmo_jax.runtime import processes as runtime_processes

    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        runtime_processes.start(f"localhost:{port}", processes, number)
    mesh = make_mesh(DEVICES)
    runtime_processes.all_agree(True)
    _forget_peak()
    before, started = _resident("VmRSS"), time.perf_counter()
    model = load(folder / "model", mesh=mesh)
    jax.block_until_ready((model.backbone, model.experts))
    runtime_processes.all_agree(True)
    seconds = time.perf_counter() - started
    leaves = jax.tree.leaves((model.backbone, model.experts))
    part = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    peak = _resident("VmHWM") - before
    answers.put((seconds, part, peak, max(leaf.nbytes for leaf in leaves)))


def read_it(folder: Path, port: int, processes: int, number: int, answers) -> None:
    """Reads a share of the files into memory, and keeps them."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    started = time.perf_counter()
    kept = [np.fromfile(file, np.uint8) for file in files[number::processes]]
    answers.put((time.perf_counter() - started, sum(x.nbytes for x in kept), 0, 0))


def _resident(which: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if which in x)
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew


def run(work, folder: Path, processes: int) -> list[tuple]:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    answers = context.Queue()
    started = [
        context.Process(target=work, args=(folder, port, processes, number, answers))
        for number in range(processes)
    ]
    for process in started:
        process.start()
    found = [answers.get(timeout=1800) for _ in started]
    for process in started:
        process.join()
    return found


def put_out(folder: Path) -> None:
    """Puts the files out of the system's memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            opened = os.open(file, os.O_RDONLY)
            os.fsync(opened)
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(opened)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=7)
    args = parser.parse_args()
    folder = args.folder / "large"
    if not folder.exists():
        context = multiprocessing.get_context("spawn")
        made = context.Process(target=make, args=(folder, args.experts))
        made.start()
        made.join()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    rows, leaf = "", 0
    for processes in (1, 2):
        for state in ("cold", "warm"):
            times: dict[str, list[float]] = {"load": [], "plain": []}
            for _ in range(3):
                for name, work in (("plain", read_it), ("load", load_it)):
                    if state == "cold":
                        put_out(folder)
                    found = run(work, folder, processes)
                    times[name].append(max(one[0] for one in found))
            _, part, peak, leaf = max(found, key=lambda one: one[2])
            load, plain = (statistics.median(times[name]) for name in ("load", "plain"))
            cells = [f"{processes}", state]
            for name in ("load", "plain"):
                low, middle, high = sorted(times[name])
                cells.append(f"{middle:.1f} s ({low:.1f} to {high:.1f})")
            cells += [
                f"{load / plain:.2f}",
                f"{part / 1e9:.2f} GB",
                f"{(peak - part) / 1e9:.2f} GB",
            ]
            rows += f"| {' | '.join(cells)} |\n"
            print(rows, flush=True)
    from flexolmo_jax.federation.merge import add_expert, remove_expert

    started = time.perf_counter()
    remove_expert(folder / "model", "expert1")
    removed = time.perf_counter()
    add_expert(folder / "model", folder / "expert1")
    added = time.perf_counter()
    page = PAGE.format(
        date=datetime.date.today(), cores=os.cpu_count(), machine=platform.machine(),
        gb=size / 1e9, experts=args.experts, devices=DEVICES, leaf=leaf / 1e9, rows=rows,
        remove=removed - started, add=added - removed,
    )  # fmt: skip
    (HERE / "loading.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
