"""How long a large merged model takes to load, and how much memory it needs meanwhile.

    flexolmo study loading FOLDER [--experts 7]

Writes a model of 0.8 GB an expert to FOLDER, and loads it with one process and with two, over two
virtual CPU devices in all. For comparison, as many processes only read the same files into memory.
The two alternate, three times: after the files were evicted from the system's memory, and again at
once.
"""

import argparse
import datetime
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.anchor import read_anchor, write_anchor
from flexolmo_jax.federation.expert import write_expert
from flexolmo_jax.federation.merge import add_expert, merge, remove_expert
from flexolmo_jax.model import load
from flexolmo_jax.modeling.transformer import init_anchor
from flexolmo_jax.parallel.mesh import make_mesh
from flexolmo_jax.runtime import processes as runtime_processes
from flexolmo_jax.studies.engine.report import add_page_argument, machine, table, write_page

DEVICES = 2
REPEATS = 3
MODEL = ModelConfig(vocab_size=32_768, width=2048, num_layers=6, num_heads=16, ffn_width=5632)
HEAD = ["processes", "", "load", "plain", "ratio", "part of a process", "above its part"]
INTRODUCTION = """\
# Loading a large model

`flexolmo study loading FOLDER`, {date}, {machine}: {gb:.1f} GB, an anchor and {experts} experts,
onto {devices} virtual CPU devices with the mesh 1x{devices}. *Cold*: no file is in the system's
memory. Every byte is checked against its digest before it is used. *Plain*: as many processes read
the same files, each its share of them, and keep the bytes. The two alternate; medians of {repeats},
smallest and largest. *Above its part*: the largest resident memory of a process while it loads,
less what it had before and less the part of the model that it holds in the end; the largest tensor
of the model, with all its experts, has {leaf:.2f} GB. Below 0: two devices of one process share the
matrices that both have.
"""


class Answer(NamedTuple):
    """What one process reports; sizes in bytes."""

    seconds: float
    part: int = 0  # of the model, or of the files, that the process holds in the end
    peak: int = 0  # resident memory while it loads, above what it had before
    largest_leaf: int = 0


Work = Callable[[Path, int, int, int], Answer]  # folder, port, number of processes, process index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `flexolmo study loading`."""
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--experts", type=int, default=7)
    add_page_argument(parser, "loading.md")


def run(args: argparse.Namespace) -> None:
    """Writes the model unless it exists, measures, and writes the page."""
    folder = args.folder / "large"
    if not folder.exists():
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write_model, args=(folder, args.experts))
        writer.start()
        writer.join()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    rows, largest_leaf = [], 0
    for processes in (1, 2):
        for is_cold in (True, False):
            cells, largest_leaf = measure(folder, processes, is_cold)
            rows.append(cells)
    started = time.perf_counter()
    remove_expert(folder / "model", "expert1")
    removed = time.perf_counter()
    add_expert(folder / "model", folder / "expert1")
    added = time.perf_counter()
    introduction = INTRODUCTION.format(
        date=datetime.date.today(), machine=machine(), gb=size / 1e9, experts=args.experts,
        devices=DEVICES, repeats=REPEATS, leaf=largest_leaf / 1e9,
    )  # fmt: skip
    lines = [
        *introduction.splitlines(),
        "",
        *table(HEAD, rows, "llr"),
        "",
        f"Removing an expert from this model on disk took {removed - started:.3f} s. Adding it "
        "again, which reads the anchor and the package in full and routes public text, took "
        f"{added - removed:.1f} s.",
    ]
    write_page(args.page, lines)


def measure(folder: Path, processes: int, is_cold: bool) -> tuple[list[str], int]:
    """One row of the table, and the bytes of the model's largest tensor."""
    times: dict[str, list[float]] = {"load": [], "plain": []}
    answers: list[Answer] = []
    for _ in range(REPEATS):
        for name, work in (("plain", read_files), ("load", load_model)):
            if is_cold:
                evict(folder)
            answers = run_processes(work, folder, processes)
            times[name].append(max(answer.seconds for answer in answers))
    largest = max(answers, key=lambda answer: answer.peak)
    load_seconds, plain_seconds = (statistics.median(times[name]) for name in ("load", "plain"))
    spread = (
        f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        for seconds in times.values()
    )
    cells = [
        str(processes), "cold" if is_cold else "warm", *spread,
        f"{load_seconds / plain_seconds:.2f}", f"{largest.part / 1e9:.2f} GB",
        f"{(largest.peak - largest.part) / 1e9:.2f} GB",
    ]  # fmt: skip
    return cells, largest.largest_leaf


def write_model(folder: Path, experts: int, config: ModelConfig = MODEL) -> None:
    """Writes FOLDER/anchor, FOLDER/expertN and FOLDER/model with random weights."""
    shapes = jax.eval_shape(lambda key: init_anchor(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(tree):
        return jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape, np.float32)), tree)

    tokenizer = Tokenizer.train(["Some words that suffice for a tokenizer."], 260)
    write_anchor(folder / "anchor", draw(shapes), config, tokenizer, ["Some words."], {})
    anchor = read_anchor(folder / "anchor", on_disk=True)
    paths = [folder / f"expert{number}" for number in range(1, experts + 1)]
    for path in paths:
        write_expert(path, draw(shapes.public), path.name, anchor, {})
    merge(folder / "anchor", paths, folder / "model")


def load_model(folder: Path, port: int, processes: int, index: int) -> Answer:
    """Loads the model, as one of several processes."""
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    if processes > 1:
        runtime_processes.start(f"localhost:{port}", processes, index)
    mesh = make_mesh(DEVICES)
    runtime_processes.all_agree(True)  # a barrier: all processes start the clock together
    _reset_peak()
    before, started = _resident("VmRSS"), time.perf_counter()
    model = load(folder / "model", mesh=mesh)
    jax.block_until_ready((model.backbone, model.experts))
    runtime_processes.all_agree(True)
    seconds = time.perf_counter() - started
    leaves = jax.tree.leaves((model.backbone, model.experts))
    part = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    peak = _resident("VmHWM") - before
    return Answer(seconds, part, peak, max(leaf.nbytes for leaf in leaves))


def read_files(folder: Path, port: int, processes: int, index: int) -> Answer:
    """Reads a share of the files into memory, and holds the bytes."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)
    started = time.perf_counter()
    held = [np.fromfile(file, np.uint8) for file in files[index::processes]]
    return Answer(time.perf_counter() - started, sum(x.nbytes for x in held))


def _resident(which: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if which in line)
    return int(line.split()[1]) * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS


def run_processes(work: Work, folder: Path, processes: int) -> list[Answer]:
    """Runs `work` in several new processes at once; returns the answer of each."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    answers = context.Queue()
    workers = [
        context.Process(target=_put_answer, args=(answers, work, folder, port, processes, index))
        for index in range(processes)
    ]
    for worker in workers:
        worker.start()
    results = [answers.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join()
    return results


def _put_answer(answers, work: Work, folder: Path, port: int, processes: int, index: int) -> None:
    answers.put(work(folder, port, processes, index))


def evict(folder: Path) -> None:
    """Evicts the files from the system's memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
