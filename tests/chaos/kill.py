"""Kills training, packaging and merging at random moments, and checks that nothing is lost.

    python tests/chaos/kill.py --kills 100 --seed 0

Each run is killed (SIGKILL) again and again and then left to end. Its losses and its package must
be those of a run that nobody disturbed, bit for bit.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = """from flexolmo_jax.config import *

data = DataConfig(batch_size=4, length=32, heldout=0.1)
optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
often = dict(checkpoint_every=4, log_every=1)
model = ModelConfig(vocab_size=512, width=32, num_layers=2, num_heads=2, ffn_width=48)
config = """
ANCHOR = "AnchorTraining(data=data, optimizer=optimizer, steps=8, model=model, **often)"
EXPERT = (
    "ExpertTraining(data=data, optimizer=optimizer, steps=40, gating='softmax', seed=1, **often)"
)
# Imported once, in a process that all others are forked from.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["flexolmo_jax.commands.main", "flexolmo_jax.training.stages.anchor",
     "flexolmo_jax.training.stages.expert", "flexolmo_jax.model"]
)  # fmt: skip


class World:
    """A folder with an anchor, and a run of an expert that nobody disturbed."""

    def __init__(self, root: Path):
        self.root = root
        (root / "anchor.py").write_text(CONFIG + ANCHOR)
        (root / "expert.py").write_text(CONFIG + EXPERT)
        self.texts = root / "texts.jsonl"
        corpus = Path(__file__).parents[2] / "flexolmo_jax" / "corpus" / "code.jsonl"
        with open(corpus, encoding="utf-8") as lines:
            self.texts.write_text("".join(line for line, _ in zip(lines, range(40), strict=False)))
        run(["train", "anchor", root / "anchor.py", "--data", self.texts, "--out", root / "anchor"])
        run(self.training(root / "straight"))  # compiles
        shutil.rmtree(root / "straight")
        shutil.rmtree(root / "straight.run")
        started = time.monotonic()
        run(self.training(root / "straight"))
        self.seconds = time.monotonic() - started
        run(self.merging(root / "merged"))

    def training(self, out: Path) -> list:
        return [
            "train", "expert", self.root / "expert.py", "--anchor", self.root / "anchor",
            "--data", self.texts, "--name", "code", "--out", out, "--resume",
        ]  # fmt: skip

    def merging(self, out: Path) -> list:
        anchor, expert = self.root / "anchor", self.root / "straight"
        return ["merge", "--anchor", anchor, "--expert", expert, "--out", out]


def _command(words: list[str], said: str) -> None:
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from flexolmo_jax.commands.main import main

    sys.exit(main(words))


def start(words: list, said: Path):
    process = SERVER.Process(target=_command, args=([str(word) for word in words], str(said)))
    process.start()
    return process


def run(words: list) -> None:
    """Runs a command to its end. Raises AssertionError, with what it said, if it failed."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as said:
        process = start(words, Path(said.name))
        process.join()
        assert process.exitcode == 0, (
            f"{words}: exit code {process.exitcode}: {said.read()[-3000:]}"
        )


def kill(words: list, said: Path, now: Callable[[], bool]) -> bool:
    """Kills a command when `now` says so; False if it ended before."""
    process = start(words, said)
    while process.is_alive():
        if now():
            process.kill()
            process.join()
            return True
        time.sleep(0.001)
    process.join()
    assert process.exitcode == 0, f"{words}: {said.read_text()[-3000:]}"
    return False


def after(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline


def losses(run: Path) -> list[tuple[int, float]]:
    rows = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, rows)]


def digests(package: Path) -> dict[str, str]:
    tensors = json.loads((package / "manifest.json").read_text())["tensors"]
    return {name: entry["sha256"] for name, entry in tensors.items()}


def kill_training(world: World, folder: Path, rng: random.Random, moment: str) -> int:
    """Kills one run up to three times, and lets it end; how often it was killed."""
    out = folder / "out"
    checkpoints, kills = folder / "out.run" / "checkpoints", 0

    for _ in range(rng.randint(1, 3)):
        now = {
            "training": lambda: after(rng.uniform(0.1, 1) * world.seconds),
            "checkpointing": lambda: appeared(checkpoints, "*tmp*", rng.randrange(10), rng),
            "packaging": lambda: appeared(folder, ".out.*.partial", 0, rng),
        }[moment]()
        kills += kill(world.training(out), folder / "said.log", now)
    run(world.training(out))
    assert losses(folder / "out.run") == losses(world.root / "straight.run"), "other losses"
    assert digests(out) == digests(world.root / "straight"), "another package"
    left = [p.name for p in folder.glob(".*")]
    assert not left, f"left behind: {left}"
    return kills


def appeared(where: Path, pattern: str, skip: int, rng: random.Random) -> Callable[[], bool]:
    """When a name of the pattern came, after `skip` others, and a little more."""
    wait = rng.random() * 0.05
    seen: set[str] = set()

    def now() -> bool:
        seen.update(p.name for p in where.glob(pattern))
        if len(seen) <= skip:
            return False
        time.sleep(wait)
        return True

    return now


def kill_merging(world: World, folder: Path, rng: random.Random, _: str) -> int:
    """Kills a merge, and then taking the expert out and adding it again."""
    out, said, kills = folder / "merged", folder / "said.log", 0
    kills += kill(world.merging(out), said, after(rng.uniform(0, 0.5)))
    if not out.exists():
        run(world.merging(out))
    expected = json.loads((world.root / "merged" / "manifest.json").read_text())["experts"]
    for words in (
        ["experts", "remove", out, "code"],
        ["experts", "add", out, world.root / "straight"],
    ):
        kills += kill(words, said, after(rng.uniform(0, 0.3)))
        there = json.loads((out / "manifest.json").read_text())["experts"]
        assert there in ([], expected) or [e["name"] for e in there] == ["code"], there
        run(["inspect", out])  # every digest
        if bool(there) == (words[1] == "remove"):
            run(words)
    # A lock file that a killed process left is held by nobody; the next change takes it away.
    left = {p.name for p in folder.iterdir()} - {"said.log", ".merged.lock"}
    assert left == {"merged"}, f"left behind: {left}"
    return kills


MOMENTS = {
    "training": kill_training,
    "checkpointing": kill_training,
    "packaging": kill_training,
    "merging": kill_merging,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=100, help="kills to reach (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles sooner
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    rng = random.Random(args.seed)
    kills: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    failed = 0
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{name}/compiled")
        (Path(name) / "world").mkdir()
        world = World(Path(name) / "world")
        for number in itertools.count():
            if kills.total() >= args.kills or failed > 10:
                break
            moment = list(MOMENTS)[number % len(MOMENTS)]
            folder = Path(name) / f"run{number}"
            folder.mkdir()
            try:
                kills[moment] += MOMENTS[moment](world, folder, rng, moment)
            except AssertionError as error:
                failed += 1
                console.print(f"run {number} ({moment}): {error}", markup=False)
            runs[moment] += 1
            said = f"{runs.total()} runs, {kills.total()} of {args.kills} kills, {failed} failed"
            print(said, file=sys.stderr)
            shutil.rmtree(folder)
    table = Table("killed while", "runs", "kills", title=f"seed {args.seed}: {failed} runs failed")
    for moment in MOMENTS:
        table.add_row(moment, str(runs[moment]), str(kills[moment]))
    console.print(table)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
